// Package remote keeps caches outside of the local store: in a registry, in a
// directory, in an image's own config. docs/design/cache.md specifies the format.
//
// A cache is one manifest under one name. Its config has the records, its layers are
// the blobs that the records' results consist of, so that whoever collects garbage
// where the cache lies keeps what it needs. Reading a cache is reading
// manifest and config; layers are fetched when a step needs their files.
//
// Nothing in a cache is believed but that its writer had the right to write it.
// What cannot be read is a warning and a cache without records.
package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/store"
)

// Storage is where one cache lies. Safe for concurrent use.
type Storage interface {
	// Resolve gets the manifest or index that the cache's name stands for now,
	// or fs.ErrNotExist.
	Resolve(ctx context.Context) ([]byte, ocispec.Descriptor, error)
	// Read gets a manifest or a small blob of it, verified, of at most maxDocument bytes.
	Read(ctx context.Context, d ocispec.Descriptor) ([]byte, error)
	// Put puts a layer's blob there, unless it is.
	Put(ctx context.Context, l image.Layer) error
	// Replace makes the cache's name stand for a new manifest. ok is false, and
	// nothing was changed, if it does not stand for old any more ("" is for nothing).
	// errLost is in the error's chain if a blob that the manifest names is not there.
	Replace(ctx context.Context, old digest.Digest, config []byte, manifest Manifest) (ok bool, err error)
	// Origin is where layers say that they come from (image.Layer).
	Origin() string
}

// Manifest is what a cache's name stands for: an image manifest, or an index of the same blobs.
type Manifest struct {
	Raw    []byte
	Type   string               // its media type
	Layers []ocispec.Descriptor // the blobs that it names, but for the config
}

// Descriptor describes the manifest.
func (m Manifest) Descriptor() ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: m.Type, Digest: digest.FromBytes(m.Raw), Size: int64(len(m.Raw))}
}

// errLost says that a blob is not where a manifest said it was.
var errLost = errors.New("a layer of the cache is gone")

// Bounds of what is read.
const (
	maxDocument = image.MaxConfig
	// loadTime is how long a build waits for a cache's records.
	loadTime = time.Minute
)

// Options are what a Cache works with.
type Options struct {
	Name     string // of the cache, for people
	Store    *store.Store
	Progress *progress.Recorder
	Now      func() time.Time // nil: time.Now
}

// Writing says how a cache is written.
type Writing struct {
	Spec cache.Spec // of --cache-to
	// Compression and Level of new layers, if Spec does not say: the image's.
	Compression layer.Compression
	Level       int // 0: the compression's default
	// Fail is told at once that a layer could not be written. May be nil.
	Fail func(error)
}

// Cache is one cache in a Storage. It implements cache.Index: what was saved
// is there for others after Flush.
type Cache struct {
	opt     Options
	writing Writing
	storage Storage
	fetcher image.Fetcher
	// exclusive: Replace keeps writers apart, so that nothing that was written is lost.
	exclusive bool

	loading sync.Mutex
	loaded  *contents // nil: not yet
	doubted bool      // something that it has turned out not to be there

	mu    sync.Mutex
	saved map[digest.Digest]cache.Record
	sends map[digest.Digest]*send
	wg    sync.WaitGroup
	slots chan struct{} // layers on their way
}

// parallelSends is how many layers are compressed and sent at once.
const parallelSends = 4

// New returns the cache in s. f fetches layers that the store lacks. Nothing is read or
// written yet.
func New(s Storage, f image.Fetcher, opt Options) *Cache {
	if opt.Now == nil {
		opt.Now = time.Now
	}
	return &Cache{
		opt: opt, storage: s, fetcher: f, slots: make(chan struct{}, parallelSends),
		saved: map[digest.Digest]cache.Record{}, sends: map[digest.Digest]*send{},
	}
}

var _ cache.Index = (*Cache)(nil)

// Write says how the cache is written, before anything is saved.
func (c *Cache) Write(w Writing) { c.writing = w }

// Lookup implements cache.Reader. The cache is read at the first call; that it
// cannot be read is a warning, once. The only error is ctx's.
func (c *Cache) Lookup(ctx context.Context, key digest.Digest) (*cache.Record, error) {
	if r, ok := c.own(key); ok {
		return r, nil
	}
	known, err := c.read(ctx)
	if err != nil {
		return nil, err
	}
	return known.lookup(key, c.storage.Origin()), nil
}

// own is a record that was saved here.
func (c *Cache) own(key digest.Digest) (*cache.Record, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r, ok := c.saved[key]
	r.Layers = append([]image.Layer{}, r.Layers...)
	return &r, ok
}

// read returns what the cache has, which is nothing if it cannot be read.
func (c *Cache) read(ctx context.Context) (*contents, error) {
	c.loading.Lock()
	defer c.loading.Unlock()
	if c.loaded != nil {
		return c.loaded, nil
	}
	step := c.opt.Progress.Step("importing cache from "+c.opt.Name, "")
	step.Start()
	limited, cancel := context.WithTimeoutCause(ctx, loadTime, fmt.Errorf("it took longer than %v", loadTime))
	defer cancel()
	got, err := load(limited, c.storage)
	if ctx.Err() != nil {
		step.Cancel()
		return nil, context.Cause(ctx)
	}
	step.Done(nil)
	if err != nil {
		c.opt.Progress.Warn(fmt.Sprintf("nothing is used of the cache %s: %v", c.opt.Name, brief(err)))
		got = &contents{}
	}
	c.loaded = got
	return got, nil
}

// brief is an error without what a user is to do about it if it were one that matters.
func brief(err error) error {
	var d *diag.Error
	if errors.Is(err, fs.ErrNotExist) {
		return errors.New("there is none yet")
	}
	if errors.As(err, &d) {
		return d.Err
	}
	return err
}

// Save implements cache.Index. The layers that a build made are sent from now
// on, in the background; those of images are named only.
func (c *Cache) Save(ctx context.Context, key digest.Digest, r cache.Record) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	r.Layers = append([]image.Layer{}, r.Layers...)
	c.saved[key] = r
	if r.Content != "" {
		c.saved[r.Content] = cache.Record{Layers: r.Layers}
	}
	for _, l := range r.Layers {
		if s := c.sends[l.DiffID]; l.Built() && (s == nil || s.failed()) {
			c.begin(ctx, l)
		}
	}
	return nil
}

// Doubt says that a layer could not be had. If it is this cache's, whatever is saved is
// looked at where the cache lies, and sent again if it is not there as it should be.
func (c *Cache) Doubt(l image.Layer) {
	c.loading.Lock()
	defer c.loading.Unlock()
	c.doubted = c.doubted || l.Origin == c.storage.Origin()
}

// Close waits for what is under way.
func (c *Cache) Close() error {
	c.wg.Wait()
	if s, ok := c.storage.(io.Closer); ok {
		return s.Close()
	}
	return nil
}
