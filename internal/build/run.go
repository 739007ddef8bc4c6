package build

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/platforms"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/cache/remote"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/engine"
	"github.com/kiln-build/kiln/internal/engine/llb"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/sandbox"
	"github.com/kiln-build/kiln/internal/source"
	"github.com/kiln-build/kiln/internal/source/local"
	"github.com/kiln-build/kiln/internal/tree"
)

// Run builds. It either does all that the request asks for, or returns an
// error and has given no tag to anything.
func Run(ctx context.Context, env Env, req Request) (*Result, error) {
	if req.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, req.Timeout,
			diag.New(diag.ExitTimeout, "the build took longer than --timeout %s", req.Timeout))
		defer cancel()
	}
	res, err := run(ctx, env, req)
	if err != nil {
		return nil, because(ctx, err)
	}
	return res, nil
}

func run(ctx context.Context, env Env, req Request) (*Result, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	j, err := newJob(ctx, env, req)
	if err != nil {
		cancel(nil)
		return nil, err
	}
	defer j.close()
	defer cancel(nil) // first: closing waits for what is under way
	if err := j.openCaches(ctx, cancel); err != nil {
		return nil, err
	}
	plan, err := j.plan(ctx)
	if err != nil {
		return nil, err
	}
	res, err := j.run(ctx, plan)
	if err != nil {
		return nil, because(ctx, err) // maybe a cache that could not be written
	}
	return res, nil
}

// because prefers the reason why a context ended to what that led to. A time
// that is over keeps the place in the Dockerfile where it was.
func because(ctx context.Context, err error) error {
	c := context.Cause(ctx)
	if c == nil {
		return err
	}
	var have *diag.Error
	if !errors.Is(c, context.Canceled) && errors.As(err, &have) && have.At != nil {
		return &diag.Error{Err: c, At: have.At, Code: diag.ExitCode(c)}
	}
	return c
}

// Plan makes the plan of a build and describes it, without building.
func Plan(ctx context.Context, env Env, req Request) (string, error) {
	j, err := newJob(ctx, env, req)
	if err != nil {
		return "", err
	}
	defer j.close()
	plan, err := j.plan(ctx)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for _, p := range plan.Platforms {
		g, err := llb.Decode(p.Definition)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, "platform %s/%s\n", p.Platform.OS, p.Platform.Architecture)
		g.Print(&b)
	}
	return b.String(), nil
}

// job is one build.
type job struct {
	Env
	req     Request
	outputs []output
	epoch   *time.Time
	images  *images
	caches  caches
	lost    lost
	input   frontend.Input
	opening sync.Once
	pushes  []*export.Push
	openErr error
	index   []byte // for several platforms
	closers []func() error
	release func()
}

func newJob(ctx context.Context, env Env, req Request) (_ *job, err error) {
	j := &job{Env: env, req: req}
	defer func() {
		if err != nil {
			j.close()
		}
	}()
	if j.outputs, err = outputs(req); err != nil {
		return nil, err
	}
	if j.epoch, err = epoch(req); err != nil {
		return nil, err
	}
	if j.release, err = env.Store.Use(ctx); err != nil {
		return nil, err
	}
	j.images = &images{store: env.Store, registry: env.Registry, pull: req.Pull, layouts: map[string]*image.Layout{}}
	if err := j.open(ctx); err != nil {
		return nil, err
	}
	return j, nil
}

func (j *job) close() {
	if err := j.caches.close(); err != nil {
		j.Progress.Warn("close cache: " + err.Error())
	}
	for _, c := range j.closers {
		if err := c(); err != nil {
			j.Progress.Warn("close: " + err.Error())
		}
	}
	if j.release != nil {
		j.release()
	}
}

// open opens the build contexts.
func (j *job) open(ctx context.Context) error {
	scratch, cleanup, err := j.Store.TempDir("context")
	if err != nil {
		return err
	}
	j.closers = append(j.closers, func() error { cleanup(); return nil })
	keepGit, _ := strconv.ParseBool(j.req.BuildArgs["BUILDKIT_CONTEXT_KEEP_GIT_DIR"])
	src, err := source.Open(ctx, source.Options{
		Arg: j.req.Context, Dockerfile: j.req.Dockerfile, Stdin: j.req.Stdin, ScratchDir: scratch, StatCache: j.statCache(),
		Env: j.Environ, KeepGitDir: keepGit, Limits: layer.DefaultLimits(),
	})
	if err != nil {
		return err
	}
	j.closers = append([]func() error{src.Close}, j.closers...)
	j.input = frontend.Input{
		Filename: src.DockerfileName, BuildArgs: j.req.BuildArgs, Labels: j.req.Labels, Target: j.req.Target,
		Platforms: j.req.Platforms, NoCache: j.req.NoCache, Network: j.req.Network, AddHosts: j.req.AddHosts,
		NamedContexts: map[string]string{}, NoIgnoreFile: !src.Ignore,
		Trees: map[string]tree.Tree{frontend.ContextName: src.Tree, frontend.DockerfileName: src.DockerfileTree},
	}
	for name, value := range j.req.Contexts {
		if err := j.openNamed(ctx, name, value); err != nil {
			return fmt.Errorf("build context %q: %w", name, err)
		}
	}
	return nil
}

// statCache is where contexts keep the digests of files that have not changed.
func (j *job) statCache() string { return filepath.Join(j.Store.Root(), "stat") }

func (j *job) openNamed(ctx context.Context, name, value string) error {
	kind, rest, ok := strings.Cut(value, "://")
	switch {
	case !ok:
		t, err := local.Open(value, local.WithStatCache(j.statCache()))
		if err != nil {
			return err
		}
		j.closers = append(j.closers, t.Close)
		id := "named-" + name
		j.input.Trees[id] = t
		j.input.NamedContexts[name] = "local:" + id
	case kind == "docker-image":
		j.input.NamedContexts[name] = value
	case kind == "oci-layout":
		return j.openLayout(ctx, name, rest)
	default:
		return diag.New(diag.ExitUsage, "contexts of kind %s:// are not supported yet", kind).
			WithHint("a directory, docker-image://REF and oci-layout://PATH are")
	}
	return nil
}

func (j *job) openLayout(ctx context.Context, name, spec string) error {
	dir, ref := splitLayout(spec)
	l, err := image.OpenLayout(dir)
	if err != nil {
		return err
	}
	platform := platforms.DefaultSpec()
	if len(j.req.Platforms) > 0 {
		platform = j.req.Platforms[0]
	}
	img, err := l.Resolve(ctx, ref, platform)
	if err != nil {
		return err
	}
	id := fmt.Sprintf("layout%d", len(j.images.layouts))
	j.images.layouts[id] = l
	j.input.NamedContexts[name] = "oci-layout://" + id + "@" + img.Digest.String()
	return nil
}

// splitLayout splits PATH[:TAG] or PATH@DIGEST; without either ref is empty.
func splitLayout(spec string) (dir, ref string) {
	if dir, ref, ok := strings.Cut(spec, "@"); ok {
		return dir, ref
	}
	if i := strings.LastIndexByte(spec, ':'); i > strings.LastIndexByte(spec, '/') {
		return spec[:i], spec[i+1:]
	}
	return spec, ""
}

func (j *job) plan(ctx context.Context) (*frontend.Plan, error) {
	step := j.Progress.Step("[internal] load build definition from "+j.input.Filename, "")
	step.Start()
	p, err := frontend.Load(ctx, j.input, j.images, j.Progress)
	step.Done(err)
	return p, err
}

func (j *job) run(ctx context.Context, plan *frontend.Plan) (*Result, error) {
	var built []*image.Image
	for _, p := range plan.Platforms {
		img, err := j.platform(ctx, p)
		if err != nil {
			return nil, err
		}
		built = append(built, img)
	}
	// Before there is any name for the result: a build that fails has given none.
	if err := j.caches.flush(ctx); err != nil {
		return nil, err
	}
	return j.export(ctx, built)
}

// epoch is the build arg SOURCE_DATE_EPOCH: the image says of nothing in it
// that it is younger.
func epoch(req Request) (*time.Time, error) {
	s := req.BuildArgs["SOURCE_DATE_EPOCH"]
	if s == "" {
		return nil, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return nil, diag.New(diag.ExitUsage, "build arg SOURCE_DATE_EPOCH=%q is not a number of seconds", s)
	}
	t := time.Unix(n, 0).UTC()
	return &t, nil
}

// platform builds one platform's image. Layers that a cache promised and that cannot
// be had are built in another attempt.
func (j *job) platform(ctx context.Context, p frontend.PlatformPlan) (*image.Image, error) {
	g, err := llb.Decode(p.Definition)
	if err != nil {
		return nil, err
	}
	for n := 1; ; n++ {
		img, err := j.attempt(ctx, p, g)
		if err == nil || !j.retry(ctx, err, n) {
			return img, err
		}
	}
}

// attempt builds one platform's image. Without need for more, it has layers alone.
func (j *job) attempt(whole context.Context, p frontend.PlatformPlan, g *engine.Graph) (*image.Image, error) {
	ctx, cancel := context.WithCancelCause(whole)
	up := newUploads(j, func() ([]*export.Push, error) { return j.openPushes(whole) }, cancel)
	defer up.wait()
	defer cancel(nil)
	var results results
	c := engine.Config{
		Store: j.Store, Cache: cache.NewLocal(j.Store), Images: j.images, Trees: j.input.Trees,
		From: j.caches.from, Lost: func(l image.Layer) bool { return j.lost.has(j.Store, l) },
		Sandbox:    func(context.Context) (sandbox.Sandbox, error) { return j.Sandbox, nil },
		ResolvConf: resolvConf(), Progress: j.Progress, OnLayers: func(ls []image.Layer) { up.begin(ctx, ls) },
	}
	if j.caches.written() {
		c.OnResult = func(r engine.Result) {
			j.caches.save(r)
			results.add(r)
		}
	}
	computed, err := engine.Solve(ctx, c, g)
	if err != nil {
		return nil, err
	}
	layers := computed
	if j.needsImage() {
		up.begin(ctx, layers)
		if layers, err = up.finish(); err != nil {
			return nil, err
		}
	}
	if layers, err = j.bring(ctx, layers); err != nil {
		return nil, err
	}
	if !j.needsImage() {
		return &image.Image{Layers: layers}, nil
	}
	return j.assemble(p, layers, computed, results.all)
}

// assemble makes an image of its layers. results go into its config if that was asked for.
func (j *job) assemble(p frontend.PlatformPlan, layers, computed []image.Layer, results []remote.InlineResult) (*image.Image, error) {
	opt := image.AssembleOptions{Config: p.Config, BaseConfig: p.BaseConfig, Epoch: j.epoch}
	for _, l := range layers {
		n := image.NewLayer{Layer: l}
		if l.Built() {
			n.Created = &l.Created
		}
		opt.Layers = append(opt.Layers, n)
	}
	if j.caches.inline {
		field, err := remote.EncodeInline(results, computed, layers, j.epoch)
		if err != nil {
			return nil, err
		}
		opt.Extra = map[string]json.RawMessage{remote.InlineField: field}
	}
	img, err := image.Assemble(opt)
	if err != nil {
		return nil, err
	}
	platform := p.Platform
	img.Manifest.Platform = &platform
	return img, nil
}

// resolvConf is the builder's own; without one, names cannot be resolved in
// RUN steps either.
func resolvConf() []byte {
	b, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		return nil
	}
	return b
}
