package buildkitd

import (
	"context"
	"errors"
	"sync"

	gatewayapi "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/identity"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/tree"
)

// maxRefs bounds the results that one build may have at the same time.
const maxRefs = 10_000

// bridge is a build whose front end runs at the client.
type bridge struct {
	ctx      context.Context //nolint:containedctx // the build's, which requests end with
	cancel   context.CancelCauseFunc
	inputs   map[string]*frontend.Definition
	ready    chan struct{} // closed once run is there
	run      *running
	requests sync.WaitGroup // under way
	returned chan answer

	mu     sync.Mutex
	refs   map[string]*ref
	over   bool // there is an answer
	closed bool
}

// ref is a result that the client knows by an id.
type ref struct {
	def *frontend.Definition // nil: an empty file system

	mu   sync.Mutex
	tree tree.Tree // opened when it was first read
}

// answer is what the client's front end has come to.
type answer struct {
	res *frontend.Result
	err error
}

// newBridge returns a bridge for a build with that context. It must be closed.
func newBridge(ctx context.Context, inputs map[string]*frontend.Definition) *bridge {
	ctx, cancel := context.WithCancelCause(ctx)
	return &bridge{
		ctx: ctx, cancel: cancel, inputs: inputs, ready: make(chan struct{}), refs: map[string]*ref{}, returned: make(chan answer, 1),
	}
}

// close ends all requests with the build's error, and waits for them: what they read is about to be closed.
func (b *bridge) close(err error) {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.cancel(err)
	b.requests.Wait()
}

// enter begins a request. The context that it returns ends with the
// build, too; leave ends the request.
func (b *bridge) enter(ctx context.Context) (_ context.Context, leave func(), err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, nil, status.Error(codes.Unavailable, "the build has ended")
	}
	b.requests.Add(1)
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(b.ctx, func() { cancel(context.Cause(b.ctx)) })
	return ctx, func() {
		stop()
		cancel(nil)
		b.requests.Done()
	}, nil
}

// serve answers the client's requests with run, until there is a result.
func (b *bridge) serve(ctx context.Context, run *running) (*frontend.Result, error) {
	b.run = run
	close(b.ready)
	select {
	case o := <-b.returned:
		return o.res, o.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// wait waits until requests can be answered.
func (b *bridge) wait(ctx context.Context) error {
	select {
	case <-b.ready:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// register makes a definition known to the client.
func (b *bridge) register(def *frontend.Definition) (*gatewayapi.Ref, error) {
	if def == nil {
		return &gatewayapi.Ref{}, nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.refs) >= maxRefs {
		return nil, status.Errorf(codes.ResourceExhausted, "the build has more than %d results", maxRefs)
	}
	id := identity.NewID()
	b.refs[id] = &ref{def: def}
	return &gatewayapi.Ref{Id: id, Def: def}, nil
}

func (b *bridge) find(id string) (*ref, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	r := b.refs[id]
	if r == nil {
		return nil, status.Errorf(codes.NotFound, "no such ref: %.100q", id)
	}
	return r, nil
}

// definition is that of a result; an empty id is an empty file system.
func (b *bridge) definition(id string) (*frontend.Definition, error) {
	if id == "" {
		return nil, nil
	}
	r, err := b.find(id)
	if err != nil {
		return nil, err
	}
	return r.def, nil
}

// tree computes a result and opens it, once.
func (b *bridge) tree(ctx context.Context, id string) (tree.Tree, error) {
	if id == "" {
		return nil, status.Error(codes.InvalidArgument, "empty ref")
	}
	r, err := b.find(id)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.tree == nil {
		if r.tree, err = b.run.build.Tree(ctx, r.def); err != nil {
			return nil, located(err, r.def)
		}
	}
	return r.tree, nil
}

// result is what the client returns, with definitions in place of ids.
func (b *bridge) result(in *gatewayapi.Result) (*frontend.Result, error) {
	if in == nil {
		return nil, status.Error(codes.InvalidArgument, "result is required")
	}
	if len(in.Attestations) > 0 {
		return nil, status.Error(codes.Unimplemented, "attestations in results are not supported")
	}
	out := &frontend.Result{Metadata: in.Metadata}
	ids := map[string]string{}
	var err error
	switch r := in.Result.(type) {
	case *gatewayapi.Result_RefDeprecated:
		out.Ref, err = b.definition(r.RefDeprecated)
		return out, err
	case *gatewayapi.Result_Ref:
		out.Ref, err = b.definition(r.Ref.GetId())
		return out, err
	case *gatewayapi.Result_RefsDeprecated:
		ids = r.RefsDeprecated.GetRefs()
	case *gatewayapi.Result_Refs:
		for k, ref := range r.Refs.GetRefs() {
			ids[k] = ref.GetId()
		}
	default:
		return out, nil
	}
	out.Refs = map[string]*frontend.Definition{}
	for k, id := range ids {
		if out.Refs[k], err = b.definition(id); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// finish ends the front end's part, once.
func (b *bridge) finish(res *frontend.Result, err error) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.over {
		return status.Error(codes.FailedPrecondition, "gateway result is already set")
	}
	if res == nil && err == nil {
		err = errors.New("the client's front end failed without an error")
	}
	b.over = true
	b.returned <- answer{res, err}
	return nil
}
