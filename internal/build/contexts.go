package build

import (
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
	scratch, cleanup, err := env.Store.TempDir("context")
	if err != nil {
		return c, err
	}
	c.closers = append(c.closers, func() error { cleanup(); return nil })
	keepGit, _ := strconv.ParseBool(req.BuildArgs["BUILDKIT_CONTEXT_KEEP_GIT_DIR"])
	src, err := source.Open(ctx, source.Options{
		Arg: req.Context, Dockerfile: req.Dockerfile, Stdin: req.Stdin, ScratchDir: scratch, StatCache: statCache(env),
		Env: env.Environ, KeepGitDir: keepGit, Limits: layer.DefaultLimits(),
	})
	if err != nil {
		return c, err
	}
	c.closers = append(c.closers, src.Close)
	c.trees = source.Trees{frontend.ContextName: src.Tree, frontend.DockerfileName: src.DockerfileTree}
	c.input = frontend.Input{
		Filename: src.DockerfileName, BuildArgs: req.BuildArgs, Labels: req.Labels, Target: req.Target,
		Platforms: req.Platforms, NoCache: req.NoCache, Network: req.Network, AddHosts: req.AddHosts,
		NamedContexts: map[string]string{}, NoIgnoreFile: !src.Ignore, Contexts: c.trees,
	}
	for name, value := range req.Contexts {
		if err := c.named(ctx, env, req, name, value); err != nil {
			return c, fmt.Errorf("build context %q: %w", name, err)
		}
	}
	return c, nil
}

// statCache is where contexts keep the digests of files that have not changed.
func statCache(env Env) string { return filepath.Join(env.Store.Root(), "stat") }

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
		t, err := local.Open(value, local.WithStatCache(statCache(env)))
		if err != nil {
			return err
		}
		c.closers = append(c.closers, t.Close)
		id := "named-" + name
		c.trees[id] = t
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
