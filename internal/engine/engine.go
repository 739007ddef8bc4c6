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
	"net"
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

// Secrets knows the values of secrets.
type Secrets interface {
	// Secret returns the value, at most MaxSecret bytes, or an error that is fs.ErrNotExist
	// if there is none of that id.
	Secret(ctx context.Context, id string) ([]byte, error)
}

// MaxSecret bounds the value of a secret, as BuildKit does.
const MaxSecret = 500 << 10

// SSH knows SSH agents.
type SSH interface {
	// DialAgent connects to the agent of an id ("default" if a step names none), or returns
	// an error that is fs.ErrNotExist if there is none. Connections should have CloseWrite.
	DialAgent(ctx context.Context, id string) (net.Conn, error)
}

// Config is what the engine works with. All fields but the last five are needed.
type Config struct {
	Store  *store.Store
	Cache  cache.Index
	Images Images
	// Sandbox is asked for when the first RUN step is to run, and once.
	Sandbox func(ctx context.Context) (sandbox.Sandbox, error)
	// Trees are the local contexts by name.
	Trees map[string]tree.Tree
	// ResolvConf is shown to RUN steps as /etc/resolv.conf.
	ResolvConf []byte

	Progress *progress.Recorder
	// Parallel bounds the RUN steps that run at the same time; 0: as many as there are CPUs, two at least.
	Parallel int
	// OnLayers is told, while the build goes on, of layers that the result
	// will have, from the bottom: each call repeats and extends the one before.
	OnLayers func([]image.Layer)
	// Secrets and SSH serve steps that ask for them; nil: there are none.
	Secrets Secrets
	SSH     SSH
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
	out, err := r.eval(ctx, g.Target)
	if err == nil {
		out, err = r.inLayers(ctx, g.Target.Op, out)
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
	return out.layers, nil
}

// prepare makes the states of all operations.
func (r *run) prepare(g *Graph) {
	for _, op := range g.Ops {
		s := &state{op: op, consumers: map[*Op]bool{}, forced: op.IgnoreCache, wanted: map[int]bool{}, inResult: none}
		r.states[op] = s
		for _, in := range op.Inputs {
			if in.Op != nil {
				r.states[in.Op].consumers[op] = true
				r.states[in.Op].wanted[in.Index] = true
				s.forced = s.forced || r.states[in.Op].forced
			}
		}
		s.step = r.Progress.Step(op.Name, op.Stage)
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
	bound    map[bound]image.Layer // parts of build contexts that were mounted
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

	ran      bool // its own work has begun, and failed
	evalOnce sync.Once
	outs     []snapshot
	err      error
}

// snapshot is a result of an operation: the layers of a root file system,
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

// eval computes an operation, once, and gives one of its results.
func (r *run) eval(ctx context.Context, in Input) (snapshot, error) {
	if in.Op == nil {
		return snapshot{}, nil
	}
	s := r.states[in.Op]
	s.evalOnce.Do(func() {
		s.outs, s.err = r.compute(ctx, s)
		if s.err != nil {
			s.err = r.failed(ctx, s, s.err)
			return
		}
		if s.inResult != none && r.OnLayers != nil {
			r.OnLayers(s.outs[s.inResult].layers)
		}
	})
	if s.err != nil {
		return snapshot{}, s.err
	}
	return s.outs[in.Index], nil
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

// compute gives all results of an operation.
func (r *run) compute(ctx context.Context, s *state) ([]snapshot, error) {
	switch do := s.op.Do.(type) {
	case *Local:
		t, err := r.local(do)
		if err != nil {
			return nil, err
		}
		s.step.Start()
		s.step.Done(nil)
		return []snapshot{{context: t}}, nil
	case *Image, *Layout:
		out, err := r.image(ctx, s)
		return []snapshot{out}, err
	}
	key, err := r.keyOf(ctx, s.op)
	if err != nil {
		return nil, err
	}
	if !s.forced {
		if hit, err := r.lookup(ctx, s, key); hit != nil || err != nil {
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
	var hit []snapshot
	if !s.op.IgnoreCache {
		if hit, err = r.lookup(ctx, s, content); err != nil {
			return nil, err
		}
	}
	if hit == nil {
		if hit, err = r.do(ctx, s, ins); err != nil {
			s.ran = true
			return nil, err
		}
		for i := range hit {
			s.wanted[i] = true // perhaps by the next build
		}
		if err := r.save(ctx, s, content, hit); err != nil {
			return nil, err
		}
		s.step.Done(nil)
	}
	return hit, r.save(ctx, s, key, hit)
}

// inputs computes all inputs of op at the same time. What one begins may
// outlive this (a sandbox's session), so they share the run's context.
func (r *run) inputs(ctx context.Context, op *Op) ([]snapshot, error) {
	out := make([]snapshot, len(op.Inputs))
	var g errgroup.Group
	for i, in := range op.Inputs {
		g.Go(func() (err error) {
			out[i], err = r.eval(ctx, in)
			return err
		})
	}
	return out, g.Wait()
}

func (r *run) do(ctx context.Context, s *state, ins []snapshot) ([]snapshot, error) {
	s.step.Start()
	switch do := s.op.Do.(type) {
	case *Exec:
		return r.exec(ctx, s, do, ins)
	case *File:
		ls, err := r.file(ctx, do, ins)
		return []snapshot{{layers: ls}}, err
	case *Merge:
		var ls []image.Layer
		for _, in := range ins {
			ls = append(ls, in.layers...)
		}
		return []snapshot{{layers: ls}}, nil
	default:
		return nil, fmt.Errorf("operation %T is not known", do)
	}
}

// lookup asks the cache for all results that are wanted; nil is a miss. A record of which
// a layer can no longer be had is none.
func (r *run) lookup(ctx context.Context, s *state, key digest.Digest) ([]snapshot, error) {
	outs := make([]snapshot, s.op.results())
	for i := range outs {
		if !s.wanted[i] {
			continue
		}
		rec, err := r.Cache.Lookup(ctx, resultKey(key, i))
		if err != nil || rec == nil {
			return nil, err
		}
		for _, l := range rec.Layers {
			if !image.Available(r.Store, l) {
				return nil, nil
			}
		}
		outs[i].layers = rec.Layers
	}
	s.step.Cached()
	return outs, nil
}

// save records the results that are wanted under a key.
func (r *run) save(ctx context.Context, s *state, key digest.Digest, outs []snapshot) error {
	for i, out := range outs {
		if s.wanted[i] {
			if err := r.Cache.Save(ctx, resultKey(key, i), cache.Record{Layers: out.layers}); err != nil {
				return err
			}
		}
	}
	return nil
}
