package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/cache/remote"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/engine"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/store"
)

// caches are those that a build reads and writes beside the store's.
type caches struct {
	env    Env
	images *images
	theirs Directories // nil: directories are this machine's

	// now is the time of the build's records: the same in all caches that it writes, so that those with the
	// same contents are the same.
	now func() time.Time

	mu   sync.Mutex
	from []cache.Reader
	open map[string]*remote.Cache // what is read from and written to is read once
}

// UseCaches has the build ask caches, in this order and after those that it asks
// already, for what the store's does not have. Nothing is read yet.
func (b *Build) UseCaches(specs ...cache.Spec) error {
	for _, sp := range specs {
		c, err := b.caches.cache(sp)
		if err != nil {
			return err
		}
		b.caches.mu.Lock()
		if !slices.Contains(b.caches.from, cache.Reader(c)) {
			b.caches.from = append(b.caches.from, c)
		}
		b.caches.mu.Unlock()
	}
	return nil
}

// readers are the caches to ask.
func (c *caches) readers() []cache.Reader {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clip(c.from)
}

// cache opens a cache, once.
func (c *caches) cache(sp cache.Spec) (opened *remote.Cache, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	name := string(sp.Type) + " " + sp.Ref + sp.Dir + " " + sp.Tag + " " + string(sp.Digest)
	if c := c.open[name]; c != nil {
		return c, nil
	}
	opt := remote.Options{Store: c.env.Store, Progress: c.env.Progress, Now: c.now}
	switch sp.Type {
	case cache.Registry:
		opened, err = remote.OpenRegistry(c.env.Registry, c.images, sp.Ref, opt)
	case cache.Directory:
		opened, err = c.directory(sp, opt)
	default:
		err = diag.New(diag.ExitUsage, "cache %s: there is no such type to read from", sp)
	}
	if err == nil {
		c.open[name] = opened
	}
	return opened, err
}

func (c *caches) directory(sp cache.Spec, opt remote.Options) (*remote.Cache, error) {
	if c.theirs == nil {
		return remote.OpenDirectory(c.images, sp, opt)
	}
	stored := image.FetcherFunc(func(ctx context.Context, l image.Layer) (io.ReadCloser, error) {
		r, err := c.env.Store.OpenBlob(l.Blob.Digest)
		if errors.Is(err, fs.ErrNotExist) {
			return c.images.Fetch(ctx, l)
		}
		return r, err
	})
	d, err := c.theirs.OpenDirectory(sp, stored)
	if err != nil {
		return nil, err
	}
	c.images.addOrigin(d)
	opt.Name = sp.Dir
	return remote.New(d, c.images, opt), nil
}

// doubt tells the caches that a layer could not be had.
func (c *caches) doubt(l image.Layer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, o := range c.open {
		o.Doubt(l)
	}
}

func (c *caches) close() error {
	var errs []error
	for _, o := range c.open {
		errs = append(errs, o.Close())
	}
	return errors.Join(errs...)
}

// writing are the caches that an export writes.
type writing struct {
	to     []target
	inline bool // records go into the image, too
	// keep gives a record to the cache. What that begins goes on until the export ends,
	// and not just an attempt.
	keep func(engine.Recorded)
}

// target is a cache that is written.
type target struct {
	*remote.Cache
	mode cache.Mode
}

// write opens the caches that are to be written. fail is told of what goes wrong
// meanwhile, unless that is said not to matter.
func (b *Build) write(ctx context.Context, x Export, vs []*variant, fail func(error)) (writing, error) {
	var w writing
	how := remote.Writing{Compression: x.Compression, Fail: fail}
	if len(vs) > 0 {
		how.Compression, how.Level = vs[0].Compression, vs[0].Level
	}
	for _, sp := range x.CacheTo {
		if sp.Type == cache.Inline {
			w.inline = true
			continue
		}
		c, err := b.caches.cache(sp)
		if err != nil {
			return w, err
		}
		if w.has(c) {
			return w, diag.New(diag.ExitUsage, "cache %s: it is to be written twice", sp)
		}
		one := how
		one.Spec = sp
		if sp.IgnoreError {
			one.Fail = nil
		}
		c.Write(one)
		w.to = append(w.to, target{c, sp.Mode})
	}
	w.keep = func(r engine.Recorded) {
		for _, t := range w.to {
			if t.mode == cache.Max || r.InResult {
				_ = t.Save(ctx, r.Key, r.Record) // it never fails; Flush does
			}
		}
	}
	return w, nil
}

// has reports whether a cache is among those that are written.
func (w *writing) has(c *remote.Cache) bool {
	return slices.ContainsFunc(w.to, func(t target) bool { return t.Cache == c })
}

// any reports whether a cache is written.
func (w *writing) any() bool { return len(w.to) > 0 || w.inline }

// flush writes what was kept, into one cache after the other: what takes time, the layers, is there by now.
func (w *writing) flush(ctx context.Context) error {
	for _, t := range w.to {
		if err := t.Flush(ctx); err != nil {
			return err
		}
	}
	return nil
}

// results are the records of those operations whose layers the image has.
type results struct {
	mu  sync.Mutex
	all []remote.InlineResult
}

func (r *results) add(o engine.Recorded) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if o.InResult {
		r.all = append(r.all, remote.InlineResult{Key: o.Key, Record: o.Record})
	}
}

// clampKey is the key of a layer without anything younger than epoch.
func clampKey(l image.Layer, epoch time.Time) digest.Digest {
	h := cache.NewHasher("clamp", 1)
	h.Int(epoch.Unix())
	h.String(l.DiffID.String())
	return h.Key()
}

// clamped is a layer without anything younger than epoch, as make makes it: l itself if
// that is so. What is made is remembered, also in the caches: the image of a build that finds all
// its steps there must not need their files either.
func (e *exporting) clamped(ctx context.Context, l image.Layer, epoch time.Time, make func() (image.Layer, error)) (image.Layer, error) {
	if !l.Newest.IsZero() && !l.Newest.After(epoch) {
		return l, nil
	}
	key := clampKey(l, epoch)
	local := cache.NewLocal(e.Store)
	for _, c := range append([]cache.Reader{local}, e.caches.readers()...) {
		r, err := c.Lookup(ctx, key)
		if err != nil {
			return l, err
		}
		if r == nil || len(r.Layers) != 1 || !e.available(r.Layers[0]) {
			continue
		}
		r.Layers[0].Created = l.Created
		return r.Layers[0], e.keepClamped(ctx, local, key, *r)
	}
	out, err := make()
	if err != nil {
		return l, err
	}
	return out, e.keepClamped(ctx, local, key, cache.Record{Layers: []image.Layer{out}})
}

func (e *exporting) keepClamped(ctx context.Context, local *cache.Local, key digest.Digest, r cache.Record) error {
	if err := local.Save(ctx, key, r); err != nil {
		return err
	}
	e.writing.keep(engine.Recorded{Key: key, Record: r, InResult: true})
	return nil
}

// available reports whether a layer that a cache names can be had.
func (b *Build) available(l image.Layer) bool {
	return b.Store.HasLayer(l.DiffID) || image.Available(b.Store, l) && !b.lost.has(b.Store, l)
}

func hasBlob(st *store.Store, l image.Layer) bool {
	_, err := st.StatBlob(l.Blob.Digest)
	return err == nil
}

// lost is what could not be had though a record said so. What a build made, a
// build can make again: a cache that fails is a miss, if a late one.
type lost struct {
	mu      sync.Mutex
	layers  map[digest.Digest]bool
	origins map[string]bool
	all     bool // nothing is fetched any more that a build made
	times   int
}

// has reports whether a layer must not be counted on that the store does not have.
func (o *lost) has(st *store.Store, l image.Layer) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !l.Built() {
		return false
	}
	return o.layers[l.DiffID] || (o.all || o.origins[l.Origin]) && !hasBlob(st, l)
}

// maxLosses is how often a build begins anew because of layers that cannot be had.
const maxLosses = 4

// note takes in that a layer cannot be had; false if that was too often.
func (o *lost) note(l image.Layer) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.layers == nil {
		o.layers, o.origins = map[digest.Digest]bool{}, map[string]bool{}
	}
	o.layers[l.DiffID] = true
	if l.Origin != "" {
		o.origins[l.Origin] = true
	}
	o.times++
	o.all = o.times >= maxLosses-1
	return o.times <= maxLosses
}

// again calls f until it fails for another reason than that a layer cannot be had which a cache
// promised. Each time fewer are counted on.
func (b *Build) again(ctx context.Context, f func() error) error {
	for {
		err := f()
		var e *image.LostError
		if !engine.Rebuildable(err) || !errors.As(err, &e) || ctx.Err() != nil || !b.lost.note(e.Layer) {
			return err
		}
		b.caches.doubt(e.Layer)
		from := "the store"
		if e.Layer.Origin != "" {
			from = strings.TrimPrefix(e.Layer.Origin, remote.DirectoryOrigin)
		}
		b.Progress.Warn(fmt.Sprintf("what the cache has of %s is not used: layer %s: %v", from, e.Layer.DiffID, e.Err))
	}
}

// bring gets the layers that a build made into the store, with their blobs if the result
// needs them: who keeps an image must not depend on a cache.
func (b *Build) bring(ctx context.Context, layers []image.Layer, blobs bool) ([]image.Layer, error) {
	var missing []image.Layer
	for _, l := range layers {
		if l.Built() && (!b.Store.HasLayer(l.DiffID) || blobs && !hasBlob(b.Store, l)) {
			missing = append(missing, l)
		}
	}
	if len(missing) > 0 {
		step := b.Progress.Step("importing layers from the cache", "")
		step.Start()
		if err := b.bringAll(ctx, missing, blobs, step); err != nil {
			step.Cancel()
			return nil, err
		}
		step.Done(nil)
	}
	out := slices.Clone(layers)
	for i, l := range out {
		if l.Built() {
			out[i].Origin = ""
		}
	}
	return out, nil
}

func (b *Build) bringAll(ctx context.Context, layers []image.Layer, blobs bool, step *progress.Step) error {
	_, err := image.UnpackAll(ctx, b.Store, layers, b.images, func(n int, current int64) {
		d := layers[n].Blob.Digest
		step.Transfer(d.Algorithm().String()+":"+d.Encoded()[:12], current, layers[n].Blob.Size)
	})
	if err != nil || !blobs {
		return err
	}
	for _, l := range layers {
		if err := image.Fetch(ctx, b.Store, l, b.images); err != nil {
			return err
		}
	}
	return nil
}
