package build

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/platforms"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/source"
	"github.com/kiln-build/kiln/internal/source/git"
	"github.com/kiln-build/kiln/internal/source/local"
	"github.com/kiln-build/kiln/internal/store"
)

// contexts are the opened build contexts of a request.
type contexts struct {
	trees   source.Trees
	layouts openLayouts
	input   frontend.Input // without Contexts and Files
	closers closers
}

// openLayouts are layouts in directories of this machine.
type openLayouts map[string]*image.Layout

// OpenLayout implements Layouts.
func (ls openLayouts) OpenLayout(_ context.Context, name string) (Layout, error) {
	l := ls[name]
	if l == nil {
		return nil, fmt.Errorf("there is no OCI layout %q", name)
	}
	return l, nil
}

// openContexts opens all that a request names as contexts. What it returns is to be
// closed, after an error too.
func openContexts(ctx context.Context, env Env, req Request) (*contexts, error) {
	c := &contexts{layouts: openLayouts{}}
	c.trees = source.Trees{}
	c.input = frontend.Input{
		BuildArgs: req.BuildArgs, Labels: req.Labels, Target: req.Target, Attrs: req.Attrs,
		Platforms: req.Platforms, NoCache: req.NoCache, NoCacheFilter: req.NoCacheFilter, Network: req.Network, AddHosts: req.AddHosts,
		Ulimits: req.Ulimits, ShmSize: req.ShmSize,
		NamedContexts: map[string]string{}, Contexts: c.trees,
	}
	open := c.open
	if req.Locals != nil {
		open = c.locals
	}
	if err := open(ctx, env, req); err != nil {
		return c, err
	}
	for name, value := range req.Contexts {
		if err := c.named(ctx, env, req, name, value); err != nil {
			return c, fmt.Errorf("build context %q: %w", name, err)
		}
	}
	return c, nil
}

// open opens the context that a user named, and finds the Dockerfile.
func (c *contexts) open(ctx context.Context, env Env, req Request) error {
	scratch, cleanup, err := env.Store.TempDir("context")
	if err != nil {
		return err
	}
	c.closers = append(c.closers, func() error { cleanup(); return nil })
	keepGit, _ := strconv.ParseBool(req.BuildArgs["BUILDKIT_CONTEXT_KEEP_GIT_DIR"])
	src, err := source.Open(ctx, source.Options{
		Arg: req.Context, Dockerfile: req.Dockerfile, Stdin: req.Stdin, ScratchDir: scratch, StatCache: StatCache(env.Store),
		Env: env.Environ, KeepGitDir: keepGit, Limits: layer.DefaultLimits(),
	})
	if err != nil {
		return err
	}
	c.closers = append(c.closers, src.Close)
	c.trees[frontend.ContextName], c.trees[frontend.DockerfileName] = src.Tree, src.DockerfileTree
	c.input.Filename, c.input.NoIgnoreFile, c.input.ContextDate = src.DockerfileName, !src.Ignore, src.Date
	return nil
}

// locals opens the directories that the front end is to find by their names.
func (c *contexts) locals(_ context.Context, env Env, req Request) error {
	c.input.Filename = cmp.Or(req.Attrs["filename"], "Dockerfile")
	for name, dir := range req.Locals {
		if err := c.local(env, name, dir); err != nil {
			return diag.New(diag.ExitUsage, "local directory %q: %w", name, err)
		}
	}
	for name, dir := range req.Layouts {
		l, err := image.OpenLayout(dir)
		if err != nil {
			return diag.New(diag.ExitUsage, "OCI layout %q: %w", name, err)
		}
		c.layouts[name] = l
	}
	return nil
}

// local opens a directory as the tree of that name.
func (c *contexts) local(env Env, name, dir string) error {
	t, err := local.Open(dir, local.WithStatCache(StatCache(env.Store)))
	if err != nil {
		return err
	}
	c.closers = append(c.closers, t.Close)
	c.trees[name] = t
	return nil
}

// StatCache is where contexts keep the digests of files that have not changed.
func StatCache(st *store.Store) string { return filepath.Join(st.Root(), "stat") }

func (c *contexts) named(ctx context.Context, env Env, req Request, name, value string) error {
	kind, rest, ok := strings.Cut(value, "://")
	_, gitErr := git.Parse(value)
	if _, err := os.Stat(value); err == nil {
		ok, gitErr = false, git.ErrNotGit // what exists as a path is one, whatever it looks like
	}
	switch {
	case strings.HasPrefix(value, "target:"):
		return diag.New(diag.ExitUsage, "a target of another build (%s) cannot be a context here: that is for builds of several targets", value).
			WithHint("a stage of the same Dockerfile needs no context: COPY --from=STAGE")
	case gitErr == nil, ok && (kind == "http" || kind == "https"):
		c.input.NamedContexts[name] = value
	case !ok:
		id := "named-" + name
		if err := c.local(env, id, value); err != nil {
			return err
		}
		c.input.NamedContexts[name] = "local:" + id
	case kind == "docker-image":
		c.input.NamedContexts[name] = value
	case kind == "oci-layout":
		return c.layout(ctx, req, name, rest)
	default:
		return diag.New(diag.ExitUsage, "contexts of kind %s:// are not supported yet", kind).
			WithHint("a directory, a URL of a git repository or a file, docker-image://REF and oci-layout://PATH are")
	}
	return nil
}

func (c *contexts) layout(ctx context.Context, req Request, name, spec string) error {
	dir, ref := splitLayout(spec)
	l, err := image.OpenLayout(dir)
	if err != nil {
		return err
	}
	platform := platforms.DefaultSpec()
	if len(req.Platforms) > 0 {
		platform = req.Platforms[0]
	}
	img, err := l.Resolve(ctx, ref, platform)
	if err != nil {
		return err
	}
	id := fmt.Sprintf("layout%d", len(c.layouts))
	c.layouts[id] = l
	c.input.NamedContexts[name] = "oci-layout://" + id + "@" + img.Digest.String()
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
