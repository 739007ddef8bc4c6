package frontend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
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
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/tree"
)

// client is the gateway that the front end talks to.
type client struct {
	in     Input
	images Images
	rec    *progress.Recorder
	step   *progress.Step // reading the Dockerfile
	opts   map[string]string
}

var _ gateway.Client = (*client)(nil)

// newClient begins the step that reading a Dockerfile is; the caller ends it.
func newClient(in Input, images Images, rec *progress.Recorder) *client {
	step := rec.Step("[internal] load build definition from "+in.Filename, "")
	step.Start()
	return &client{in: in, images: images, rec: rec, step: step, opts: attributes(in)}
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
		SessionID: "kiln", // must not be random: it is written into the graph
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
	res := gateway.NewResult()
	res.SetRef(&result{c: c, def: req.Definition})
	return res, nil
}

func (c *client) otherFrontend(ctx context.Context, req gateway.SolveRequest) (*gateway.Result, error) {
	src := req.FrontendOpt["source"]
	name, err := reference.ParseNormalizedNamed(src)
	if err != nil {
		return nil, fmt.Errorf("syntax %q: %w", src, err)
	}
	if !builtinFrontend.MatchString(reference.TagNameOnly(name).String()) {
		return nil, diag.New(diag.ExitDockerfile, "syntax %q is not supported: it would be a program, run from that image with the builder's rights; docker/dockerfile is built in", src).
			WithHint("If the Dockerfile needs nothing special, leave the line out, or build with --build-arg BUILDKIT_SYNTAX=docker/dockerfile:1.")
	}
	return builder.Build(ctx, c.with(req.FrontendOpt))
}

// ResolveImageConfig implements gateway.Client.
func (c *client) ResolveImageConfig(ctx context.Context, ref string, opt sourceresolver.Opt) (string, digest.Digest, []byte, error) {
	return sourceresolver.NewImageMetaResolver(c).ResolveImageConfig(ctx, ref, opt)
}

// ResolveSourceMetadata implements gateway.Client.
func (c *client) ResolveSourceMetadata(ctx context.Context, op *pb.SourceOp, opt sourceresolver.Opt) (*sourceresolver.MetaResponse, error) {
	kind, ref, _ := strings.Cut(op.Identifier, "://")
	var (
		img *image.Image
		err error
	)
	if kind == "local" { // asked for its time, with SOURCE_DATE_EPOCH=context
		c.step.Warn(progress.Finding{Text: "SOURCE_DATE_EPOCH=" + ref + ": the build context has no time of its own, so times stay as they are"})
		return &sourceresolver.MetaResponse{Op: op}, nil
	}
	step := c.rec.Step("[internal] load metadata for "+ref, "")
	step.Start()
	defer func() { step.Done(err) }()
	switch kind {
	case "docker-image":
		p := platforms.DefaultSpec()
		if opt.ImageOpt != nil && opt.ImageOpt.Platform != nil {
			p = *opt.ImageOpt.Platform
		}
		img, err = c.images.Resolve(ctx, ref, p)
	case "oci-layout":
		p := platforms.DefaultSpec()
		if opt.OCILayoutOpt != nil && opt.OCILayoutOpt.Platform != nil {
			p = *opt.OCILayoutOpt.Platform
		}
		var d digest.Digest
		if _, s, ok := strings.Cut(ref, "@"); ok {
			d = digest.Digest(s)
		}
		img, err = c.images.ResolveLayout(ctx, op.Attrs[pb.AttrOCILayoutStoreID], d, p)
	default:
		err = fmt.Errorf("sources of kind %q are not supported", kind)
	}
	if err != nil {
		return nil, err
	}
	return &sourceresolver.MetaResponse{
		Op:    op,
		Image: &sourceresolver.ResolveImageResponse{Digest: img.Digest, Config: img.RawConfig},
	}, nil
}

// Inputs implements gateway.Client.
func (c *client) Inputs(context.Context) (map[string]llb.State, error) { return nil, nil }

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

// local returns the tree of a definition that is one local source, and its name.
func (r *result) local() (tree.Tree, string, error) {
	for _, b := range r.def.GetDef() {
		var op pb.Op
		if err := op.Unmarshal(b); err != nil {
			return nil, "", fmt.Errorf("read the front end's graph: %w", err)
		}
		src := op.GetSource()
		if src == nil {
			continue
		}
		name, ok := strings.CutPrefix(src.Identifier, "local://")
		if !ok {
			return nil, "", fmt.Errorf("reading files of %q while the plan is made is not supported", src.Identifier)
		}
		t, ok := r.c.in.Trees[name]
		if !ok {
			return nil, "", fmt.Errorf("there is no build context %q", name)
		}
		return t, name, nil
	}
	return nil, "", errors.New("reading files of a build result while the plan is made is not supported")
}

// lookup finds a path in the context, following links inside it as BuildKit does.
func (r *result) lookup(name string) (tree.Tree, string, tree.Node, error) {
	t, context, err := r.local()
	if err != nil {
		return nil, "", tree.Node{}, err
	}
	if r.c.in.NoIgnoreFile && context == ContextName && tree.Clean(name) == ".dockerignore" {
		return nil, "", tree.Node{}, fs.ErrNotExist
	}
	p, err := rootfs.Resolve(t, tree.Clean(name), true)
	if err != nil {
		return nil, "", tree.Node{}, err
	}
	n, err := t.Lstat(p)
	return t, p, n, err
}

// maxFile bounds what is read of a Dockerfile or ignore file; the front end
// itself refuses more than 16 MiB.
const maxFile = 16<<20 + 1

// ReadFile implements gateway.Reference.
func (r *result) ReadFile(_ context.Context, req gateway.ReadRequest) ([]byte, error) {
	t, p, n, err := r.lookup(req.Filename)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", req.Filename, err)
	}
	if !n.IsRegular() {
		return nil, fmt.Errorf("open %s: not a regular file", req.Filename)
	}
	f, err := t.Open(p)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", req.Filename, err)
	}
	defer f.Close()
	off, length := int64(0), int64(maxFile)
	if rg := req.Range; rg != nil {
		off, length = int64(rg.Offset), min(int64(rg.Length), maxFile)
	}
	if _, err := io.CopyN(io.Discard, f, off); err != nil && err != io.EOF {
		return nil, fmt.Errorf("read %s: %w", req.Filename, err)
	}
	b, err := io.ReadAll(io.LimitReader(f, length))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", req.Filename, err)
	}
	return b, nil
}

// StatFile implements gateway.Reference.
func (r *result) StatFile(_ context.Context, req gateway.StatRequest) (*fstypes.Stat, error) {
	_, p, n, err := r.lookup(req.Path)
	if err != nil {
		return nil, err
	}
	return stat(path.Base(p), n), nil
}

// ReadDir implements gateway.Reference.
func (r *result) ReadDir(_ context.Context, req gateway.ReadDirRequest) ([]*fstypes.Stat, error) {
	t, p, _, err := r.lookup(req.Path)
	if err != nil {
		return nil, err
	}
	es, err := t.ReadDir(p)
	if err != nil {
		return nil, err
	}
	var out []*fstypes.Stat
	for _, e := range es {
		if req.IncludePattern != "" {
			if ok, err := path.Match(req.IncludePattern, e.Name); err != nil || !ok {
				continue
			}
		}
		out = append(out, stat(e.Name, e.Node))
	}
	return out, nil
}

func stat(name string, n tree.Node) *fstypes.Stat {
	m := fs.FileMode(n.Mode & 0o777)
	switch n.Mode & tree.ModeType {
	case tree.ModeDir:
		m |= fs.ModeDir
	case tree.ModeSymlink:
		m |= fs.ModeSymlink
	case tree.ModeRegular:
	default:
		m |= fs.ModeIrregular
	}
	return &fstypes.Stat{Path: name, Mode: uint32(m), Size: n.Size, ModTime: n.MTime.UnixNano()}
}
