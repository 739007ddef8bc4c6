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
	"errors"
	"fmt"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/source/remote"
)

// Solve computes the graph's target.
func (s *Solver) Solve(ctx context.Context, g *Graph, onLayers OnLayers) (Result, error) {
	if g.Target.Op == nil {
		return Result{}, nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r := &run{Solver: s, fail: cancel, onLayers: onLayers, states: map[*Op]*state{}, sessions: map[*Op]*session{}}
	defer r.close()
	r.prepare(g)
	out, err := r.eval(ctx, g.Target.Op)
	if cause := context.Cause(ctx); cause != nil {
		if errors.Is(err, cause) && diag.ExitCode(cause) == diag.ExitTimeout {
			return Result{}, err // the cause, and the step that took so long
		}
		return Result{}, cause // the first failure, or why the build was ended
	}
	if err != nil {
		return Result{}, err
	}
	for _, op := range g.Ops {
		r.states[op].step.Cached() // whatever was not needed
	}
	return out, nil
}

// prepare makes the states of all operations.
func (r *run) prepare(g *Graph) {
	for _, op := range g.Ops {
		s := &state{op: op, consumers: map[*Op]bool{}, forced: op.IgnoreCache}
		step := progress.StepInfo{Name: op.Name, Stage: op.Stage, Digest: op.Digest, Group: op.Group}
		r.states[op] = s
		for _, in := range op.Inputs {
			if in.Op != nil {
				r.states[in.Op].consumers[op] = true
				step.Inputs = append(step.Inputs, in.Op.Digest)
				s.forced = s.forced || r.states[in.Op].forced
			}
		}
		s.step = r.Progress.Plan(step)
	}
	for op := g.Target.Op; op != nil; op = base(op) {
		r.states[op].inResult = true
	}
}

// base is the operation whose layers are at the bottom of op's result, nil if none.
func base(op *Op) *Op {
	n := 0
	if f, ok := op.Do.(*File); ok {
		ref := f.Actions[f.Result].Base
		for ref.Kind == RefAction {
			ref = f.Actions[ref.N].Base
		}
		if ref.Kind == RefScratch {
			return nil
		}
		n = ref.N
	}
	if n >= len(op.Inputs) {
		return nil
	}
	return op.Inputs[n].Op
}

// run is one Solve.
type run struct {
	*Solver
	fail       context.CancelCauseFunc // ends everything that the run does
	onLayers   OnLayers
	states     map[*Op]*state
	background sync.WaitGroup

	sessionMu sync.Mutex
	sessions  map[*Op]*session
}

// state is what a run knows about one operation.
type state struct {
	op        *Op
	consumers map[*Op]bool
	inResult  bool // its layers are the bottom of the target's
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

	versionOnce sync.Once
	version     remote.Version // of a remote source
	versionErr  error

	ran      bool // its own work has begun, and failed
	evalOnce sync.Once
	out      Result
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

// eval computes an operation, once.
func (r *run) eval(ctx context.Context, op *Op) (Result, error) {
	if op == nil {
		return Result{}, nil
	}
	s := r.states[op]
	s.evalOnce.Do(func() {
		s.out, s.err = r.compute(ctx, s)
		if s.err != nil {
			s.err = r.failed(ctx, s, s.err)
			return
		}
		if s.inResult && r.onLayers != nil && s.out.context == nil {
			r.onLayers(s.out.Layers)
		}
	})
	return s.out, s.err
}

// failed ends the run because of what happened in s, unless it is ending
// already. Only the first failure is shown: the rest follows from it.
func (r *run) failed(ctx context.Context, s *state, err error) error {
	err = r.at(ctx, s.op, err)
	// Of what --timeout ended, too: what it printed last may say why it took so long.
	if ctx.Err() == nil || s.ran && diag.ExitCode(err) == diag.ExitTimeout {
		s.step.Start()
		s.step.Done(err)
	}
	r.fail(err)
	return err
}

func (r *run) compute(ctx context.Context, s *state) (Result, error) {
	switch do := s.op.Do.(type) {
	case *Local:
		t, err := r.local(ctx, do)
		if err != nil {
			return Result{}, err
		}
		s.step.Start()
		s.step.Done(nil)
		return Result{context: t, local: do}, nil
	case *Image, *Layout:
		return r.image(ctx, s)
	}
	key, err := r.keyOf(ctx, s.op)
	if err != nil {
		return Result{}, err
	}
	if !s.forced {
		if hit, err := r.lookup(ctx, s, key); hit != nil || err != nil {
			return Result{Layers: hit}, err
		}
	}
	// Of several Solves that want it now, one does it.
	unlock, err := r.flights.lock(ctx, key)
	if err != nil {
		return Result{}, err
	}
	defer unlock()
	if done := r.flights.finished(key); done != nil {
		s.step.Cached()
		return Result{Layers: done}, nil
	}
	ins, err := r.inputs(ctx, s.op)
	if err != nil {
		return Result{}, err
	}
	content, err := r.contentKey(ctx, s.op, ins)
	if err != nil {
		return Result{}, err
	}
	var hit []image.Layer
	if !s.op.IgnoreCache {
		if hit, err = r.lookup(ctx, s, content); err != nil {
			return Result{}, err
		}
	}
	if hit == nil {
		if hit, err = r.do(ctx, s, ins); err != nil {
			s.ran = true
			return Result{}, err
		}
		if err := r.save(ctx, content, hit); err != nil {
			return Result{}, err
		}
		s.step.Done(nil)
	}
	if err := r.save(ctx, key, hit); err != nil {
		return Result{}, err
	}
	r.flights.finish(key, hit)
	return Result{Layers: hit}, nil
}

// inputs computes all inputs of op at the same time. What one begins may
// outlive this (a sandbox's session), so they share the run's context.
func (r *run) inputs(ctx context.Context, op *Op) ([]Result, error) {
	out := make([]Result, len(op.Inputs))
	var g errgroup.Group
	for i, in := range op.Inputs {
		g.Go(func() (err error) {
			out[i], err = r.eval(ctx, in.Op)
			return err
		})
	}
	return out, g.Wait()
}

func (r *run) do(ctx context.Context, s *state, ins []Result) ([]image.Layer, error) {
	s.step.Start()
	switch do := s.op.Do.(type) {
	case *Exec:
		return r.exec(ctx, s, do, ins)
	case *File:
		return r.file(ctx, do, ins)
	case *Remote:
		return r.remote(ctx, s)
	case *Merge:
		return r.merge(ctx, ins)
	case *Diff:
		return r.diff(ctx, ins)
	default:
		return nil, fmt.Errorf("operation %T is not known", do)
	}
}

// lookup asks the cache. A record of which a layer can no longer be had is none.
func (r *run) lookup(ctx context.Context, s *state, key digest.Digest) ([]image.Layer, error) {
	rec, err := r.Cache.Lookup(ctx, key)
	if err != nil || rec == nil {
		return nil, err
	}
	for _, l := range rec.Layers {
		if !image.Available(r.Store, l) {
			return nil, nil
		}
	}
	s.step.Cached()
	return append([]image.Layer{}, rec.Layers...), nil // never nil
}
