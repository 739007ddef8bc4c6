package engine

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/cachemount"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/sandbox"
	"github.com/kiln-build/kiln/internal/source"
	"github.com/kiln-build/kiln/internal/source/remote"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/kiln-build/kiln/internal/tree"
)

// Images resolves and fetches the images that a build starts from.
type Images interface {
	Resolve(ctx context.Context, ref string, p ocispec.Platform) (*image.Image, error)
	ResolveLayout(ctx context.Context, store string, d digest.Digest, p ocispec.Platform) (*image.Image, error)
	image.Fetcher
}

// Config is what the engine works with. The first six fields are needed.
type Config struct {
	Store    *store.Store
	Cache    cache.Index // the store's
	Images   Images
	Sandbox  sandbox.Sandbox
	Contexts source.Contexts

	// From are asked, in this order, for records that Cache does not have. May be nil.
	From func() []cache.Reader
	// Lost says of layers that are not in the store that they cannot be fetched either,
	// though a record says so. May be nil.
	Lost func(image.Layer) bool

	// Mounts brings cache mounts from elsewhere. May be nil.
	Mounts Mounts

	// Secrets and SSH serve steps and sources that ask for them; nil: there are none.
	Secrets remote.Secrets
	SSH     remote.SSH
	// Remotes is what URLs and git repositories are fetched with, besides Secrets and SSH.
	Remotes remote.Env
	// ResolvConf is shown to RUN steps as /etc/resolv.conf.
	ResolvConf []byte
	Progress   *progress.Recorder
	// Parallel bounds the RUN steps that run at the same time; 0: as many as there are CPUs, two at least.
	Parallel int
}

// Mounts brings cache mounts from elsewhere, and takes them there. Safe for concurrent use.
type Mounts interface {
	// Import returns the layers of a mount that the store does not have, on top of what
	// it begins with. They are in the store. Nil: there is none.
	Import(ctx context.Context, k cachemount.Key) ([]image.Layer, error)
	// Used is told of a mount that a step takes.
	Used(k cachemount.Key)
}

// Solver computes the graphs of one build. What one Solve has opened or done is there
// for the others, which may run at the same time. It must be closed.
type Solver struct {
	Config
	slots   *semaphore.Weighted
	flights *flights

	mu       sync.Mutex
	contexts map[string]*opened // by selection
	readers  map[digest.Digest]*layer.Reader
	bound    map[bound]image.Layer         // parts of build contexts that became layers
	images   map[digest.Digest]image.Layer // layers of the images that were resolved
	emptied  map[emptied]bool              // cache mounts
	sharers  map[cachemount.Key]*sharers
	patience time.Duration // how long steps share a cache mount before that is told
}

// New returns a Solver.
func New(c Config) *Solver {
	if c.Parallel == 0 {
		c.Parallel = max(2, runtime.NumCPU())
	}
	c.Remotes.Secrets, c.Remotes.SSH = c.Secrets, c.SSH
	return &Solver{
		Config: c, slots: semaphore.NewWeighted(int64(c.Parallel)), flights: newFlights(),
		contexts: map[string]*opened{}, readers: map[digest.Digest]*layer.Reader{}, bound: map[bound]image.Layer{},
		images: map[digest.Digest]image.Layer{}, emptied: map[emptied]bool{},
		sharers: map[cachemount.Key]*sharers{}, patience: time.Minute,
	}
}

// Close gives back what the Solver has opened. Nothing that it returned can be read any more.
func (s *Solver) Close() error {
	var errs []error
	for _, l := range s.readers {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// Result is the result of an operation: a root file system, or a build context.
type Result struct {
	// Layers of a root file system, the bottom first. Every one is in the store, or can be fetched from its origin.
	Layers  []image.Layer
	context tree.Tree // nil unless it is a context
	local   *Local    // whose context it is
}

// Watch is told of what a Solve comes to, while it goes on. Either may be nil.
type Watch struct {
	// Layers are those that the result will have, from the bottom: each call repeats
	// and extends the one before.
	Layers func([]image.Layer)
	// Record is the record of a result that somebody wants, of any operation; also of those
	// that were not needed because of another's. It may come more than once.
	Record func(Recorded)
}

// Recorded is what an operation gave, in this build or an earlier one.
type Recorded struct {
	Key digest.Digest // by definition
	cache.Record
	InResult bool // its layers are the bottom of the target's
}

// Layers are the layers of a result: a build context becomes one.
func (s *Solver) Layers(ctx context.Context, res Result) ([]image.Layer, error) {
	if res.context == nil {
		return res.Layers, nil
	}
	l, err := s.contextLayer(ctx, res, everything())
	if err != nil {
		return nil, err
	}
	return []image.Layer{l}, nil
}
