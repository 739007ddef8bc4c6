// Package build is the facade that everything which starts a build calls:
// Request in, Result out. It puts the parts together, the build context, the
// front end, the engine, the exports, and holds no other logic.
package build

import (
	"io"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/sandbox"
	"github.com/kiln-build/kiln/internal/store"
)

// Request says what is to be built and where the result goes.
type Request struct {
	Context    string    // a directory, a URL, or "-" for Stdin
	Dockerfile string    // path, "-" for Stdin; empty: Dockerfile in the context
	Stdin      io.Reader // read only if Context or Dockerfile is "-"

	Tags      []string // references; normalised by Run
	BuildArgs map[string]string
	Labels    map[string]string
	Target    string
	Platforms []ocispec.Platform
	// Contexts are --build-context: name → directory, docker-image://REF or oci-layout://PATH[:TAG][@DIGEST].
	Contexts map[string]string
	NoCache  bool
	Pull     bool // ask the registry though the local store has the image
	Network  string
	AddHosts []string
	Timeout  time.Duration // of the whole build; 0: none

	// CacheFrom are the caches that are asked, in this order, for what the store's
	// does not have; CacheTo is the one that is written, and type=inline beside it.
	CacheFrom, CacheTo []cache.Spec

	Outputs     []export.Spec // none: the local store
	Compression layer.Compression
}

// Env is what a build works with.
type Env struct {
	Store    *store.Store
	Registry *registry.Client
	Progress *progress.Recorder
	Sandbox  sandbox.Sandbox
	Stdout   io.Writer // for outputs with dest=-
	Environ  []string  // for fetching contexts: proxies, PATH for git
}

// Result is what was built.
type Result struct {
	// ID is the digest of the image's config, for one platform; Digest that
	// of the manifest, or of the index for several.
	ID     digest.Digest
	Digest digest.Digest
	// Descriptor of what Digest names.
	Descriptor ocispec.Descriptor
	// Tags it was given, and Pushed the references that a registry has now.
	Tags   []string
	Pushed []string
}
