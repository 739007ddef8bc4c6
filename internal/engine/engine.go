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
	"runtime"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/sandbox"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/kiln-build/kiln/internal/tree"
)

// Images resolves and fetches the images that a build starts from.
type Images interface {
	Resolve(ctx context.Context, ref string, p ocispec.Platform) (*image.Image, error)
	ResolveLayout(ctx context.Context, store string, d digest.Digest, p ocispec.Platform) (*image.Image, error)
	image.Fetcher
}

// Config is what the engine works with. What may be left out says so.
type Config struct {
	Store  *store.Store
	Cache  cache.Index // of the store
	Images Images
	// Sandbox is asked for when the first RUN step is to run, and once.
	Sandbox func(ctx context.Context) (sandbox.Sandbox, error)
	// Trees are the local contexts by name.
	Trees map[string]tree.Tree
	// ResolvConf is shown to RUN steps as /etc/resolv.conf.
	ResolvConf []byte

	// From are asked, in this order, for records that Cache does not have. May be empty.
	From []cache.Reader
	// Lost says of layers that are not in the store that they cannot be fetched either,
	// though a record says so. May be nil.
	Lost func(image.Layer) bool
	// OnResult is told of the result of every operation that has one, also of those
	// that were not needed because of another's. May be nil.
	OnResult func(Result)

	Progress *progress.Recorder
	// Parallel bounds the RUN steps that run at the same time; 0: as many as there are CPUs, two at least.
	Parallel int
	// OnLayers is told, while the build goes on, of layers that the result
	// will have, from the bottom: each call repeats and extends the one before. May be nil.
	OnLayers func([]image.Layer)
}

// Result is what an operation gave, in this build or an earlier one.
type Result struct {
	Key digest.Digest // by definition
	cache.Record
	InResult bool // its layers are the bottom of the target's
}

// Solve computes the graph's target and returns the layers of its file system.
// Every layer is in the store, or can be fetched from its origin.
func Solve(ctx context.Context, c Config, g *Graph) ([]image.Layer, error) {
	if g.Target.Op == nil {
		return nil, nil
	}
	n := c.Parallel
	if n == 0 {
		n = max(2, runtime.NumCPU())
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r := &run{
		Config: c, fail: cancel, slots: semaphore.NewWeighted(int64(n)), states: map[*Op]*state{},
		readers: map[digest.Digest]*layer.Reader{}, contexts: map[*Local]tree.Tree{}, sessions: map[*Op]*session{},
		sandboxOnce: sync.OnceValues(func() (sandbox.Sandbox, error) { return c.Sandbox(ctx) }),
	}
	defer r.close()
	r.prepare(g)
	out, err := r.eval(ctx, g.Target.Op)
	if err == nil && out.context != nil {
		err = errors.New("the result of the build is a build context, and not a root file system")
	}
	if rebuildable(context.Cause(ctx)) {
		r.cancelSteps(g.Ops)
	}
	if cause := context.Cause(ctx); cause != nil {
		if errors.Is(err, cause) && diag.ExitCode(cause) == diag.ExitTimeout {
			return nil, err // the cause, and the step that took so long
		}
		return nil, cause // the first failure, or why the build was ended
	}
	if err != nil {
		return nil, err
	}
	for _, op := range g.Ops {
		r.states[op].step.Cached() // whatever was not needed
	}
	if err := r.tellRest(ctx, g.Ops); err != nil {
		return nil, err
	}
	return out.layers, nil
}

// prepare makes the states of all operations.
func (r *run) prepare(g *Graph) {
	for _, op := range g.Ops {
		s := &state{op: op, consumers: map[*Op]bool{}, forced: op.IgnoreCache}
		r.states[op] = s
		for _, in := range op.Inputs {
			if in.Op != nil {
				r.states[in.Op].consumers[op] = true
				s.forced = s.forced || r.states[in.Op].forced
			}
		}
		s.step = r.Progress.Step(op.Name, op.Stage)
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
	Config
	fail        context.CancelCauseFunc // ends everything that the run does
	slots       *semaphore.Weighted
	states      map[*Op]*state
	sandboxOnce func() (sandbox.Sandbox, error)
	background  sync.WaitGroup

	mu       sync.Mutex
	contexts map[*Local]tree.Tree
	readers  map[digest.Digest]*layer.Reader
	sessions map[*Op]*session
	images   map[digest.Digest]image.Layer // layers of all images that were resolved
	bound    map[bound]image.Layer         // parts of build contexts that were mounted
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

	ran      bool // its own work has begun, and failed
	evalOnce sync.Once
	out      snapshot
	told     bool // of its result
	err      error
}

// snapshot is the result of an operation: the layers of a root file system,
// the bottom first, or a build context.
type snapshot struct {
	layers  []image.Layer
	context tree.Tree // nil unless it is a context
}

func (r *run) close() {
	r.mu.Lock()
	for _, s := range r.sessions {
		r.closeSession(s)
	}
	r.sessions = nil
	r.mu.Unlock()
	r.background.Wait()
	for _, l := range r.readers {
		l.Close()
	}
}

// eval computes an operation, once.
func (r *run) eval(ctx context.Context, op *Op) (snapshot, error) {
	if op == nil {
		return snapshot{}, nil
	}
	s := r.states[op]
	s.evalOnce.Do(func() {
		s.out, s.err = r.compute(ctx, s)
		if s.err != nil {
			s.err = r.failed(ctx, s, s.err)
			return
		}
		if s.inResult && r.OnLayers != nil {
			r.OnLayers(s.out.layers)
		}
	})
	return s.out, s.err
}

// failed ends the run because of what happened in s, unless it is ending
// already. Only the first failure is shown: the rest follows from it.
func (r *run) failed(ctx context.Context, s *state, err error) error {
	err = r.at(ctx, s.op, err)
	if rebuildable(err) {
		s.step.Cancel() // the caller knows what to do
		r.fail(err)
		return err
	}
	// Of what --timeout ended, too: what it printed last may say why it took so long.
	if ctx.Err() == nil || s.ran && diag.ExitCode(err) == diag.ExitTimeout {
		s.step.Start()
		s.step.Done(err)
	}
	r.fail(err)
	return err
}

func (r *run) compute(ctx context.Context, s *state) (snapshot, error) {
	switch do := s.op.Do.(type) {
	case *Local:
		t, err := r.local(do)
		if err != nil {
			return snapshot{}, err
		}
		s.step.Start()
		s.step.Done(nil)
		return snapshot{context: t}, nil
	case *Image, *Layout:
		return r.image(ctx, s)
	}
	rec, err := r.result(ctx, s)
	if err != nil {
		return snapshot{}, err
	}
	r.tell(s, *rec)
	return snapshot{layers: rec.Layers}, nil
}

// result is what the operation gives: from the cache by its definition, from the
// cache by the content of its computed inputs, or by doing it.
func (r *run) result(ctx context.Context, s *state) (*cache.Record, error) {
	key, err := r.keyOf(ctx, s.op)
	if err != nil {
		return nil, err
	}
	if !s.forced {
		if hit, err := r.lookup(ctx, key); hit != nil || err != nil {
			s.step.Cached()
			return hit, err
		}
	}
	ins, err := r.inputs(ctx, s.op)
	if err != nil {
		return nil, err
	}
	content, err := r.contentKey(ctx, s.op, ins)
	if err != nil {
		return nil, err
	}
	var hit *cache.Record
	if !s.op.IgnoreCache {
		if hit, err = r.lookup(ctx, content); err != nil {
			return nil, err
		}
	}
	did := hit == nil
	if did {
		ls, err := r.do(ctx, s, ins)
		if err != nil {
			s.ran = true
			return nil, err
		}
		hit = &cache.Record{Layers: ls}
	}
	hit.Content = content
	if err := r.Cache.Save(ctx, key, *hit); err != nil {
		return nil, err
	}
	if did {
		s.step.Done(nil)
	}
	s.step.Cached() // unless it was done
	return hit, nil
}

// inputs computes all inputs of op at the same time. What one begins may
// outlive this (a sandbox's session), so they share the run's context.
func (r *run) inputs(ctx context.Context, op *Op) ([]snapshot, error) {
	out := make([]snapshot, len(op.Inputs))
	var g errgroup.Group
	for i, in := range op.Inputs {
		g.Go(func() (err error) {
			out[i], err = r.eval(ctx, in.Op)
			return err
		})
	}
	return out, g.Wait()
}

func (r *run) do(ctx context.Context, s *state, ins []snapshot) ([]image.Layer, error) {
	s.step.Start()
	switch do := s.op.Do.(type) {
	case *Exec:
		return r.exec(ctx, s, do, ins)
	case *File:
		return r.file(ctx, do, ins)
	case *Merge:
		ls := []image.Layer{} // not nil, which would be a miss
		for _, in := range ins {
			ls = append(ls, in.layers...)
		}
		return ls, nil
	default:
		return nil, fmt.Errorf("operation %T is not known", do)
	}
}
