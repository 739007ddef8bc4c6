package frontend

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"regexp"
	"strings"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/moby/buildkit/frontend/dockerfile/builder"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	fstypes "github.com/tonistiigi/fsutil/types"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/source"
	"github.com/kiln-build/kiln/internal/tree"
)

// client is the gateway that the front end talks to.
type client struct {
	in      Input
	sources Sources
	rec     *progress.Recorder
	step    *progress.Step // reading the Dockerfile
	opts    map[string]string
}

var _ gateway.Client = (*client)(nil)

// newClient begins the step that reading a Dockerfile is; the caller ends it, at the latest.
func newClient(in Input, sources Sources, rec *progress.Recorder) *client {
	step := rec.Step("[internal] load build definition from "+cmp.Or(in.Filename, in.Attrs["filename"], "Dockerfile"), "")
	step.Start()
	return &client{in: in, sources: sources, rec: rec, step: step, opts: attributes(in)}
}

// with is the client with further options.
func (c *client) with(opts map[string]string) *client {
	n := *c
	n.opts = maps.Clone(c.opts)
	maps.Copy(n.opts, opts)
	return &n
}

// BuildOpts implements gateway.Client.
func (c *client) BuildOpts() gateway.BuildOpts {
	return gateway.BuildOpts{
		Opts:      c.opts,
		SessionID: cmp.Or(c.in.SessionID, "kiln"),
		Workers:   []gateway.WorkerInfo{{ID: "kiln", Platforms: []ocispec.Platform{platforms.DefaultSpec()}}},
		Product:   "kiln",
		LLBCaps:   pb.Caps.CapSet(pb.Caps.All()),
		Caps:      gwpb.Caps.CapSet(gwpb.Caps.All()),
	}
}

// builtinFrontend matches the images whose front end is the one linked in.
var builtinFrontend = regexp.MustCompile(`^docker\.io/docker/dockerfile(-upstream)?[:@]`)

// Solve implements gateway.Client. A definition is not evaluated: it becomes a
// reference, of which local sources can be read.
func (c *client) Solve(ctx context.Context, req gateway.SolveRequest) (*gateway.Result, error) {
	if req.Frontend == "gateway.v0" {
		return c.otherFrontend(ctx, req)
	}
	if req.Frontend != "" {
		return nil, fmt.Errorf("front end %q is not supported", req.Frontend)
	}
	if len(req.SourcePolicies) > 0 {
		return nil, errors.New("source policies of a front end that is linked in are not supported")
	}
	def, err := c.in.Policy.Apply(ctx, req.Definition)
	if err != nil {
		return nil, err
	}
	res := gateway.NewResult()
	res.SetRef(&result{c: c, def: def})
	return res, nil
}

func (c *client) otherFrontend(ctx context.Context, req gateway.SolveRequest) (*gateway.Result, error) {
	if err := Builtin(req.FrontendOpt["source"]); err != nil {
		return nil, err
	}
	return builder.Build(ctx, c.with(req.FrontendOpt))
}

// Builtin returns an error unless source, the image that a front end comes from, is the one whose
// front end is linked in.
func Builtin(source string) error {
	name, err := reference.ParseNormalizedNamed(source)
	if err != nil {
		return fmt.Errorf("syntax %q: %w", source, err)
	}
	if !builtinFrontend.MatchString(reference.TagNameOnly(name).String()) {
		return diag.New(diag.ExitDockerfile, "syntax %q is not supported: it would be a program, run from that image with the builder's rights; docker/dockerfile is built in", source).
			WithHint("If the Dockerfile needs nothing special, leave the line out, or build with --build-arg BUILDKIT_SYNTAX=docker/dockerfile:1.")
	}
	return nil
}

// ResolveImageConfig implements gateway.Client.
func (c *client) ResolveImageConfig(ctx context.Context, ref string, opt sourceresolver.Opt) (string, digest.Digest, []byte, error) {
	return sourceresolver.NewImageMetaResolver(c).ResolveImageConfig(ctx, ref, opt)
}

// ResolveSourceMetadata implements gateway.Client.
func (c *client) ResolveSourceMetadata(ctx context.Context, op *pb.SourceOp, opt sourceresolver.Opt) (*sourceresolver.MetaResponse, error) {
	op, err := c.in.Policy.Source(ctx, op, PlatformOf(opt))
	if err != nil {
		return nil, fmt.Errorf("could not resolve image due to policy: %w", err)
	}
	if name, ok := strings.CutPrefix(op.Identifier, "local://"); ok {
		return c.localMetadata(op, name), nil
	}
	return ResolveSource(ctx, c.sources, c.rec, op, opt)
}

// localMetadata is what is known of a local context. The front end asks for its time,
// with SOURCE_DATE_EPOCH=context; it takes that of an HTTP response for one.
func (c *client) localMetadata(op *pb.SourceOp, name string) *sourceresolver.MetaResponse {
	res := &sourceresolver.MetaResponse{Op: op}
	if date := c.in.ContextDate; name == ContextName && !date.IsZero() {
		res.HTTP = &sourceresolver.ResolveHTTPResponse{LastModified: &date}
	} else {
		c.step.Warn(progress.Finding{Text: "SOURCE_DATE_EPOCH=" + name + ": that context has no time of its own, so times stay as they are"})
	}
	return res
}

// Inputs implements gateway.Client.
func (c *client) Inputs(context.Context) (map[string]llb.State, error) {
	if len(c.in.Inputs) == 0 {
		return nil, nil
	}
	states := map[string]llb.State{}
	for name, def := range c.in.Inputs {
		op, err := llb.NewDefinitionOp(def)
		if err != nil {
			return nil, fmt.Errorf("input %q: %w", name, err)
		}
		states[name] = llb.NewState(op)
	}
	return states, nil
}

// NewContainer implements gateway.Client.
func (c *client) NewContainer(context.Context, gateway.NewContainerRequest) (gateway.Container, error) {
	return nil, errors.New("containers of the front end are not supported")
}

// Warn implements gateway.Client.
func (c *client) Warn(_ context.Context, _ digest.Digest, msg string, o gateway.WarnOpts) error {
	f := progress.Finding{Text: msg, URL: o.URL, At: place(o.SourceInfo, o.Range)}
	for _, d := range o.Detail {
		f.Detail = append(f.Detail, string(d))
	}
	c.step.Warn(f)
	return nil
}

// result is a definition that was not evaluated.
type result struct {
	c   *client
	def *pb.Definition
}

var _ gateway.Reference = (*result)(nil)

// ToState implements gateway.Reference.
func (r *result) ToState() (llb.State, error) {
	op, err := llb.NewDefinitionOp(r.def)
	if err != nil {
		return llb.State{}, err
	}
	return llb.NewState(op), nil
}

// Evaluate implements gateway.Reference.
func (r *result) Evaluate(context.Context) error { return nil }

// tree is the file system that the definition stands for. Its name is empty
// unless it is a local context's, which needs no engine to be read.
func (r *result) tree(ctx context.Context) (_ tree.Tree, name string, err error) {
	if sel, ok, err := r.local(); ok || err != nil {
		if err != nil {
			return nil, "", err
		}
		t, err := r.c.in.Contexts.OpenContext(ctx, sel)
		return t, sel.Name, err
	}
	if r.c.in.Files == nil {
		return nil, "", errors.New("reading files of a build result while the plan is made is not supported")
	}
	t, err := r.c.in.Files.Tree(ctx, r.def)
	return t, "", err
}

// local reports whether the definition is one local source, and which.
func (r *result) local() (sel source.Selection, ok bool, err error) {
	defs := r.def.GetDef()
	if len(defs) != 2 { // the source, and which output is wanted
		return sel, false, nil
	}
	var op pb.Op
	if err := op.Unmarshal(defs[0]); err != nil {
		return sel, false, fmt.Errorf("read the front end's graph: %w", err)
	}
	name, ok := strings.CutPrefix(op.GetSource().GetIdentifier(), "local://")
	if !ok {
		return sel, false, nil
	}
	sel, err = source.LocalSelection(name, op.GetSource().GetAttrs())
	return sel, true, err
}

// open is the file system without what the front end is not to see.
func (r *result) open(ctx context.Context) (tree.Tree, error) {
	t, local, err := r.tree(ctx)
	if err == nil && r.c.in.NoIgnoreFile && local == ContextName {
		t = noIgnoreFile{t}
	}
	return t, err
}

// noIgnoreFile is a context of which nothing is ignored.
type noIgnoreFile struct{ tree.Tree }

// Lstat implements tree.Tree.
func (t noIgnoreFile) Lstat(p string) (tree.Node, error) {
	if p == ".dockerignore" {
		return tree.Node{}, fs.ErrNotExist
	}
	return t.Tree.Lstat(p)
}

// ReadFile implements gateway.Reference.
func (r *result) ReadFile(ctx context.Context, req gateway.ReadRequest) ([]byte, error) {
	t, err := r.open(ctx)
	if err != nil {
		return nil, err
	}
	b, err := ReadFile(t, req)
	if err == nil && !strings.HasSuffix(req.Filename, ".dockerignore") {
		r.c.step.Done(nil) // the Dockerfile is here: what becomes of it has steps of its own
	}
	return b, err
}

// StatFile implements gateway.Reference.
func (r *result) StatFile(ctx context.Context, req gateway.StatRequest) (*fstypes.Stat, error) {
	t, err := r.open(ctx)
	if err != nil {
		return nil, err
	}
	return StatFile(t, req)
}

// ReadDir implements gateway.Reference.
func (r *result) ReadDir(ctx context.Context, req gateway.ReadDirRequest) ([]*fstypes.Stat, error) {
	t, err := r.open(ctx)
	if err != nil {
		return nil, err
	}
	return ReadDir(ctx, t, req)
}
