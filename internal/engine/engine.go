// Package engine computes a graph of operations: each at most once, none that
// no result needs, independent ones at the same time.
//
// Every operation has a key, computed once from its fields and its inputs'
// keys, before anything runs. The engine asks the cache from the target
// backwards: a hit makes everything that only it needs unnecessary. An
// operation that was missed has its inputs computed, and is then asked for once more by what
// they really contain, so that a rebuilt stage with the same content goes no further.
// docs/design/cache-key.md explains both keys.
//
// The engine knows no registry: images come through Images.
package engine

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/source/remote"
)

// Solve computes the graph's target.
func (s *Solver) Solve(ctx context.Context, g *Graph, w Watch) (Result, error) {
	if g.Target.Op == nil {
		return Result{}, nil
	}
	if err := s.emptyCaches(ctx, g.Ops); err != nil {
		return Result{}, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r := &run{Solver: s, fail: cancel, watch: w, states: map[*Op]*state{}, sessions: map[*Op]*session{}}
	defer r.close()
	r.prepare(g)
	out, err := r.eval(ctx, g.Target)
	for _, s := range r.locals {
		s.finish()
	}
	if Rebuildable(context.Cause(ctx)) {
		r.cancelSteps(g.Ops)
	}
	if err := diag.Ended(ctx, err); err != nil {
		return Result{}, err // the first failure, or why the build was ended
	}
	for _, op := range g.Ops {
		if s := r.states[op]; !s.opened.Load() {
			s.step.Cached() // whatever was not needed
		}
	}
	return out, r.tellRest(ctx, g.Ops)
}

// prepare makes the states of all operations.
func (r *run) prepare(g *Graph) {
	for _, op := range g.Ops {
		s := &state{op: op, consumers: map[*Op]bool{}, forced: op.IgnoreCache, wanted: map[int]bool{}, inResult: none}
		step := progress.StepInfo{Name: op.Name, Stage: op.Stage, Digest: op.Digest, Group: op.Group}
		r.states[op] = s
		for _, in := range op.Inputs {
			if in.Op != nil {
				r.states[in.Op].consumers[op] = true
				step.Inputs = append(step.Inputs, in.Op.Digest)
				r.states[in.Op].wanted[in.Index] = true
				s.forced = s.forced || r.states[in.Op].forced
			}
		}
		s.step = r.Progress.Plan(step)
	}
	for _, op := range g.Ops {
		if s := r.states[op]; isLocal(op) {
			s.users.Store(int32(len(s.consumers)))
			r.locals = append(r.locals, s)
		}
	}
	r.states[g.Target.Op].wanted[g.Target.Index] = true
	for in := g.Target; in.Op != nil; in = base(in) {
		r.states[in.Op].inResult = in.Index
	}
}

// base is the input whose layers are at the bottom of a result, Op nil if there is none.
func base(in Input) Input {
	n := 0
	switch do := in.Op.Do.(type) {
	case *File:
		ref := do.Actions[do.Result].Base
		for ref.Kind == RefAction {
			ref = do.Actions[ref.N].Base
		}
		if ref.Kind == RefScratch {
			return Input{}
		}
		n = ref.N
	case *Exec:
		if m := do.result(in.Index); m != Root {
			n = do.Mounts[m].Input
		}
	}
	if n >= len(in.Op.Inputs) {
		return Input{}
	}
	return in.Op.Inputs[n]
}

// run is one Solve.
type run struct {
	*Solver
	fail       context.CancelCauseFunc // ends everything that the run does
	watch      Watch
	states     map[*Op]*state
	locals     []*state // of build contexts
	background sync.WaitGroup

	sessionMu sync.Mutex
	sessions  map[*Op]*session
}

// none is no number of a result.
const none = -1

// state is what a run knows about one operation.
type state struct {
	op        *Op
	consumers map[*Op]bool
	wanted    map[int]bool // results that others take, and that are looked up and recorded
	inResult  int          // the result whose layers are the bottom of the target's, or none
	// forced: the cache is not to be asked by definition, because this operation or one that
	// it needs is to be run in any case.
	forced bool
	step   *progress.Step

	keyOnce sync.Once
	key     digest.Digest
	keyErr  error
	// copied are content digests of what the actions copy from contexts, or of
	// what is mounted from them, by number of the action or mount. The key is computed before anything else needs it.
	copied map[int]digest.Digest

	opened atomic.Bool  // of a build context: it is being used
	users  atomic.Int32 // of a build context: operations that use it and whose keys are not known yet

	versionOnce sync.Once
	version     remote.Version // of a remote source
	versionErr  error

	ran      bool // its own work has begun, and failed
	evalOnce sync.Once
	outs     []Result
	told     bool // of its results
	err      error
}

func (r *run) close() {
	r.sessionMu.Lock()
	for _, s := range r.sessions {
		r.closeSession(s)
	}
	r.sessions = nil
	r.sessionMu.Unlock()
	r.background.Wait()
	for _, s := range r.states {
		if s.version != nil {
			if err := s.version.Close(); err != nil {
				r.Progress.Warn("remove what was fetched: " + err.Error())
			}
		}
	}
}

// eval computes an operation, once, and gives one of its results.
func (r *run) eval(ctx context.Context, in Input) (Result, error) {
	if in.Op == nil {
		return Result{}, nil
	}
	s := r.states[in.Op]
	s.evalOnce.Do(func() {
		s.outs, s.err = r.compute(ctx, s)
		if s.err != nil {
			s.err = r.failed(ctx, s, s.err)
			return
		}
		if n := s.inResult; n != none && r.watch.Layers != nil && s.outs[n].context == nil {
			r.watch.Layers(s.outs[n].Layers)
		}
	})
	if s.err != nil {
		return Result{}, s.err
	}
	return s.outs[in.Index], nil
}

// failed ends the run because of what happened in s, unless it is ending
// already. Only the first failure is shown, the rest follows from it; and the step
// that was running when --timeout passed, for what it printed last may say why.
func (r *run) failed(ctx context.Context, s *state, err error) error {
	first := ctx.Err() == nil
	if first || s.ran {
		err = &OpError{Op: s.op.Digest, Err: at(s.op, err)}
	}
	if Rebuildable(err) {
		s.step.Cancel() // the caller knows what to do
		r.fail(err)
		return err
	}
	err = diag.Ended(ctx, err)
	if first || s.ran && diag.ExitCode(err) == diag.ExitTimeout {
		s.step.Start()
		s.step.Done(err)
	}
	r.fail(err)
	return err
}

// compute gives all results of an operation.
func (r *run) compute(ctx context.Context, s *state) ([]Result, error) {
	switch do := s.op.Do.(type) {
	case *Local:
		t, err := r.local(ctx, s)
		if err != nil {
			return nil, err
		}
		return []Result{{context: t, local: do}}, nil
	case *Image, *Layout:
		out, err := r.image(ctx, s)
		return []Result{out}, err
	}
	key, err := r.keyOf(ctx, s.op)
	if err != nil {
		return nil, err
	}
	if !s.forced {
		if hit, err := r.lookup(ctx, s, key); hit != nil || err != nil {
			return r.found(s, hit), err
		}
	}
	// Of several Solves that want it now, one does it.
	unlock, err := r.flights.lock(ctx, key)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if done := r.finished(key); done != nil {
		return r.found(s, done), nil
	}
	if s.forced {
		return r.produce(ctx, s, key)
	}
	hit, release, err := r.claim(ctx, s, key)
	if err != nil {
		return nil, err
	}
	defer release()
	if hit != nil {
		return r.found(s, hit), nil
	}
	return r.produce(ctx, s, key)
}

// claim waits while another build, in whatever process, does the same operation, and gives what that came
// to; nil: it is to be done here. As with flights, who has claimed an operation claims its inputs only.
func (r *run) claim(ctx context.Context, s *state, key digest.Digest) (recs []cache.Record, release func(), err error) {
	name := "operation " + string(key)
	release, ok, err := r.Store.TryLock(name)
	if err != nil {
		return nil, nil, err
	}
	if !ok {
		long := time.AfterFunc(time.Second, func() { r.Progress.Note(fmt.Sprintf("another build does %q: waiting for it", s.op.Name)) })
		defer long.Stop()
		if release, err = r.Store.Lock(ctx, name); err != nil {
			return nil, nil, err
		}
	}
	// It may have been done since it was looked for, also while other caches were asked.
	if recs, err = lookupBy(ctx, s, key, r.inStore); err != nil {
		release()
		return nil, nil, err
	}
	return recs, release, nil
}

// produce gives the results of an operation that is not known by its definition: by the
// content of its inputs, or by doing it.
func (r *run) produce(ctx context.Context, s *state, key digest.Digest) ([]Result, error) {
	ins, err := r.inputs(ctx, s.op)
	if err != nil {
		return nil, err
	}
	content, err := r.contentKey(ctx, s.op, ins)
	if err != nil {
		return nil, err
	}
	var recs []cache.Record
	if !s.op.IgnoreCache {
		if recs, err = r.lookup(ctx, s, content); err != nil {
			return nil, err
		}
	}
	did := recs == nil
	if did {
		outs, err := r.do(ctx, s, ins)
		if err != nil {
			s.ran = true
			return nil, err
		}
		for i, out := range outs {
			s.wanted[i] = true // perhaps by the next build
			recs = append(recs, cache.Record{Layers: out.Layers})
		}
	}
	if err := r.save(ctx, s, key, content, recs); err != nil {
		return nil, err
	}
	if !did {
		return r.found(s, recs), nil
	}
	s.step.Done(nil)
	r.flights.finish(key, recs)
	return r.found(s, recs), nil
}

// inputs computes all inputs of op at the same time. What one begins may
// outlive this (a sandbox's session), so they share the run's context.
func (r *run) inputs(ctx context.Context, op *Op) ([]Result, error) {
	out := make([]Result, len(op.Inputs))
	var g errgroup.Group
	for i, in := range op.Inputs {
		g.Go(func() (err error) {
			out[i], err = r.eval(ctx, in)
			return err
		})
	}
	return out, g.Wait()
}

func (r *run) do(ctx context.Context, s *state, ins []Result) ([]Result, error) {
	s.step.Start()
	r.reads(s)
	switch do := s.op.Do.(type) {
	case *Exec:
		return r.exec(ctx, s, do, ins)
	case *File:
		ls, err := r.file(ctx, do, ins)
		return []Result{{Layers: ls}}, err
	case *Remote:
		ls, err := r.remote(ctx, s)
		return []Result{{Layers: ls}}, err
	case *Merge:
		ls, err := r.merge(ctx, ins)
		return []Result{{Layers: ls}}, err
	case *Diff:
		ls, err := r.diff(ctx, ins)
		return []Result{{Layers: ls}}, err
	default:
		return nil, fmt.Errorf("operation %T is not known", do)
	}
}
