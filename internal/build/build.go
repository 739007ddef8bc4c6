package build

import (
	"context"
	"errors"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/cache"
	remotecache "github.com/kiln-build/kiln/internal/cache/remote"
	"github.com/kiln-build/kiln/internal/cachemount"
	"github.com/kiln-build/kiln/internal/engine"
	"github.com/kiln-build/kiln/internal/engine/llb"
	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/source"
	"github.com/kiln-build/kiln/internal/source/remote"
	"github.com/kiln-build/kiln/internal/tree"
)

// Inputs are what one build may read, besides the store and registries.
type Inputs struct {
	Contexts source.Contexts
	Layouts  Layouts // nil: there are none
	Pull     bool    // ask the registry though the local store has the image
	// Secrets and SSH are what a user passed for this build; nil: nothing.
	Secrets remote.Secrets
	SSH     remote.SSH
	// Directories are where caches of type=local lie; nil: on this machine.
	Directories Directories
	// CacheFrom are the caches that are asked, in this order, for what the store's does not have.
	CacheFrom []cache.Spec
	// Uploads answers requests for remote.UploadHost; nil: there is no such host.
	Uploads http.RoundTripper
	// MountsFrom are the caches where cache mounts are looked for that the store does not have.
	MountsFrom []cache.Spec
}

// Layouts opens the OCI layouts that a build may start from.
type Layouts interface {
	// OpenLayout opens the layout that the graph calls name. It is good until the build ends.
	OpenLayout(ctx context.Context, name string) (Layout, error)
}

// Layout is an OCI layout, read-only.
type Layout interface {
	// Resolve is image.Layout's.
	Resolve(ctx context.Context, tagOrDigest string, p ocispec.Platform) (*image.Image, error)
	image.Fetcher
}

// Directories opens caches in directories that are not this machine's.
type Directories interface {
	// OpenDirectory returns the cache that sp names; nothing is read yet. f fetches layers that it is given.
	OpenDirectory(sp cache.Spec, f image.Fetcher) (Directory, error)
}

// Directory is where such a cache lies. It fetches the layers that have its Origin.
type Directory interface {
	remotecache.Storage
	image.Fetcher
}

// Build is one build while it lasts: what is resolved, fetched or computed in it is
// there for all that is asked of it, at the same time or later. It must be closed.
// Safe for concurrent use.
type Build struct {
	Env
	images  *images
	remotes remote.Env
	caches  *caches
	lost    *lost
	mounts  *mounts
	solver  *engine.Solver
	closers closers
}

// Open begins a build.
func Open(ctx context.Context, env Env, in Inputs) (*Build, error) {
	b := &Build{
		Env: env, images: &images{store: env.Store, registry: env.Registry, pull: in.Pull, layouts: in.Layouts},
	}
	release, err := env.Store.Use(ctx)
	if err != nil {
		return nil, err
	}
	b.closers = append(b.closers, func() error { release(); return nil })
	dir, cleanup, err := env.Store.TempDir("fetch")
	if err != nil {
		return nil, errors.Join(err, b.Close())
	}
	b.closers = append(b.closers, func() error { cleanup(); return nil })
	b.caches = &caches{env: env, images: b.images, theirs: in.Directories, open: map[string]*remotecache.Cache{}, now: sync.OnceValue(time.Now)}
	b.lost = &lost{}
	b.mounts = &mounts{b: b, used: map[cachemount.Key]bool{}}
	b.remotes = remote.Env{
		Dir: dir, Environ: b.Environ, Secrets: in.Secrets, SSH: in.SSH, Uploads: in.Uploads, Memory: b.Store, Pins: &remote.Pins{},
		Limits: layer.DefaultLimits(),
	}
	b.solver = engine.New(engine.Config{
		Store: b.Store, Cache: cache.NewLocal(b.Store), Images: b.images, Contexts: in.Contexts, Sandbox: b.Sandbox,
		Secrets: in.Secrets, SSH: in.SSH,
		From: b.caches.readers, Lost: func(l image.Layer) bool { return b.lost.has(b.Store, l) },
		Mounts: b.mounts, Remotes: b.remotes, ResolvConf: resolvConf(), Progress: b.Progress, Parallel: b.Parallel,
	})
	b.closers = append(b.closers, b.solver.Close, b.caches.close)
	if err := errors.Join(b.UseCaches(in.CacheFrom...), b.useMounts(in.MountsFrom)); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return b, nil
}

// Close ends the build. Nothing that it gave can be read any more.
func (b *Build) Close() error { return b.closers.close() }

// Frontend runs the Dockerfile front end. Nothing is computed but what it reads of definitions.
func (b *Build) Frontend(ctx context.Context, in frontend.Input) (*frontend.Result, error) {
	in.Files = b
	return frontend.Solve(ctx, in, b, b.Progress)
}

// Resolve resolves a reference to an image; nothing is pulled but its metadata.
// With ResolveLayout and Describe it makes Build a frontend.Sources.
func (b *Build) Resolve(ctx context.Context, ref string, p ocispec.Platform) (*image.Image, error) {
	return b.images.Resolve(ctx, ref, p)
}

// ResolveLayout resolves an image of the OCI layout that the graph calls name.
func (b *Build) ResolveLayout(ctx context.Context, name string, d digest.Digest, p ocispec.Platform) (*image.Image, error) {
	return b.images.ResolveLayout(ctx, name, d, p)
}

// Describe resolves a source that has to be fetched, for all of the build.
func (b *Build) Describe(ctx context.Context, id string, attrs map[string]string, ask remote.Ask) (md remote.Metadata, err error) {
	src, err := llb.RemoteSource(id, attrs)
	if err != nil {
		return md, err
	}
	v, err := src.Resolve(ctx, &b.remotes, nil)
	if err != nil {
		return md, err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	return v.Metadata(ctx, ask)
}

// Evaluate computes a definition and fetches nothing of its result.
func (b *Build) Evaluate(ctx context.Context, def *frontend.Definition) error {
	return b.again(ctx, func() error {
		_, err := b.solve(ctx, def, engine.Watch{})
		return err
	})
}

// Tree computes a definition and opens its files. It makes Build a frontend.Files.
func (b *Build) Tree(ctx context.Context, def *frontend.Definition) (tree.Tree, error) {
	var t tree.Tree
	err := b.again(ctx, func() error {
		res, err := b.solve(ctx, def, engine.Watch{})
		if err == nil {
			t, err = b.solver.Tree(ctx, res)
		}
		return err
	})
	return t, err
}

func (b *Build) solve(ctx context.Context, def *frontend.Definition, w engine.Watch) (engine.Result, error) {
	g, err := llb.Decode(def)
	if err != nil {
		return engine.Result{}, err
	}
	return b.solver.Solve(ctx, g, w)
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

// closers are closed in the reverse of the order in which they were added.
type closers []func() error

func (cs closers) close() error {
	var errs []error
	for i := len(cs) - 1; i >= 0; i-- {
		errs = append(errs, cs[i]())
	}
	return errors.Join(errs...)
}
