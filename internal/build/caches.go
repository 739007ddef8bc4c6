package build

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/cache/remote"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/engine"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/store"
)

// caches are those that a build reads and writes beside the store's.
type caches struct {
	from   []cache.Reader
	to     *remote.Cache // nil: none
	mode   cache.Mode    // of to
	inline bool          // records go into the image, too
	open   map[string]*remote.Cache
	// save gives a result to the cache that is written. What it begins goes on until the
	// build ends, and not just an attempt.
	save func(engine.Result)
}

// openCaches opens the caches of a request. No request is sent yet.
func (j *job) openCaches(ctx context.Context, fail func(error)) error {
	j.caches.open = map[string]*remote.Cache{}
	j.caches.save = func(r engine.Result) {
		if c := j.caches; c.to != nil && (c.mode == cache.Max || r.InResult) {
			_ = c.to.Save(ctx, r.Key, r.Record) // it never fails; Flush does
		}
	}
	for _, sp := range j.req.CacheTo {
		switch {
		case sp.Type == cache.Inline:
			j.caches.inline = true
			continue
		case j.caches.to != nil:
			return diag.New(diag.ExitUsage, "caches %s and %s: a build writes one cache", j.req.CacheTo[0], sp).
				WithHint("It reads from as many as --cache-from names; type=inline may be written beside another one.")
		}
		if sp.IgnoreError {
			fail = nil
		}
		c, err := j.openCache(sp, fail)
		if err != nil {
			return err
		}
		j.caches.to, j.caches.mode = c, sp.Mode
	}
	for _, sp := range j.req.CacheFrom {
		c, err := j.openCache(sp, nil)
		if err != nil {
			return err
		}
		j.caches.from = append(j.caches.from, c)
	}
	return nil
}

// openCache opens one cache, once: what is read from and written to is read once.
func (j *job) openCache(sp cache.Spec, fail func(error)) (c *remote.Cache, err error) {
	opt := remote.Options{Spec: sp, Store: j.Store, Progress: j.Progress, Compression: j.req.Compression, Fail: fail}
	name := string(sp.Type) + " " + sp.Ref + sp.Dir + " " + sp.Tag + " " + string(sp.Digest)
	if c := j.caches.open[name]; c != nil {
		return c, nil
	}
	switch sp.Type {
	case cache.Registry:
		c, err = remote.OpenRegistry(j.Registry, j.images, sp.Ref, opt)
	case cache.Directory:
		c, err = remote.OpenDirectory(j.images, sp, opt)
	default:
		err = diag.New(diag.ExitUsage, "cache %s: there is no such type to read from", sp)
	}
	if err == nil {
		j.caches.open[name] = c
	}
	return c, err
}

func (c *caches) close() error {
	var errs []error
	for _, o := range c.open {
		errs = append(errs, o.Close())
	}
	return errors.Join(errs...)
}

// written reports whether any cache is written.
func (c *caches) written() bool { return c.to != nil || c.inline }

// results are those of the operations whose layers the image has.
type results struct {
	mu  sync.Mutex
	all []remote.InlineResult
}

func (r *results) add(o engine.Result) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if o.InResult {
		r.all = append(r.all, remote.InlineResult{Key: o.Key, Record: o.Record})
	}
}

// flush writes what was saved.
func (c *caches) flush(ctx context.Context) error {
	if c.to == nil {
		return nil
	}
	return c.to.Flush(ctx)
}

// clamped is a layer without anything younger than epoch: l itself if that is
// so. What is made is remembered, also in the caches: the image of a build that finds all
// its steps there must not need their files either.
func (j *job) clamped(ctx context.Context, l image.Layer, epoch time.Time) (image.Layer, error) {
	if !l.Newest.IsZero() && !l.Newest.After(epoch) {
		return l, nil
	}
	h := cache.NewHasher("clamp", 1)
	h.Int(epoch.Unix())
	h.String(l.DiffID.String())
	key := h.Key()
	local := cache.NewLocal(j.Store)
	for _, c := range append([]cache.Reader{local}, j.caches.from...) {
		r, err := c.Lookup(ctx, key)
		if err != nil {
			return l, err
		}
		if r == nil || len(r.Layers) != 1 || !j.available(r.Layers[0]) {
			continue
		}
		r.Layers[0].Created = l.Created
		return r.Layers[0], j.keepClamped(ctx, local, key, *r)
	}
	out, err := export.ClampLayer(ctx, j.Store, j.images, l, epoch)
	if err != nil {
		return l, err
	}
	return out, j.keepClamped(ctx, local, key, cache.Record{Layers: []image.Layer{out}})
}

func (j *job) keepClamped(ctx context.Context, local *cache.Local, key digest.Digest, r cache.Record) error {
	if err := local.Save(ctx, key, r); err != nil {
		return err
	}
	j.caches.save(engine.Result{Key: key, Record: r, InResult: true})
	return nil
}

// available reports whether a layer that a cache names can be had.
func (j *job) available(l image.Layer) bool {
	if j.Store.HasLayer(l.DiffID) {
		return true
	}
	return l.Blob.Digest != "" && !j.lost.has(j.Store, l) && (l.Origin != "" || hasBlob(j.Store, l))
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

// maxAttempts is how often a build begins anew because of layers that cannot be had.
const maxAttempts = 4

// note takes in why an attempt failed, and reports whether another one is worth it.
func (o *lost) note(err error, attempt int) (image.Layer, bool) {
	var e *image.LostError
	if !errors.As(err, &e) || !e.Layer.Built() || attempt >= maxAttempts {
		return image.Layer{}, false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.layers == nil {
		o.layers, o.origins = map[digest.Digest]bool{}, map[string]bool{}
	}
	o.layers[e.Layer.DiffID] = true
	if e.Layer.Origin != "" {
		o.origins[e.Layer.Origin] = true
	}
	o.all = attempt >= maxAttempts-1
	return e.Layer, true
}

// retry says that the build begins anew, if that can help.
func (j *job) retry(ctx context.Context, err error, attempt int) bool {
	if ctx.Err() != nil {
		return false
	}
	l, ok := j.lost.note(err, attempt)
	if ok {
		from := "the store"
		if l.Origin != "" {
			from = strings.TrimPrefix(l.Origin, remote.DirectoryOrigin)
		}
		for _, c := range j.caches.open {
			c.Distrust(l)
		}
		var e *image.LostError
		_ = errors.As(err, &e)
		j.Progress.Warn(fmt.Sprintf("what the cache has of %s is not used: layer %s: %v", from, l.DiffID, e.Err))
	}
	return ok
}

// bring gets the layers that a build made into the store, if the result goes
// anywhere but to registries: who keeps an image must not depend on a cache.
func (j *job) bring(ctx context.Context, layers []image.Layer) ([]image.Layer, error) {
	if !slices.ContainsFunc(j.outputs, func(o output) bool { return o.ToStore() || !o.ToRegistry() }) {
		return layers, nil
	}
	var missing []image.Layer
	for _, l := range layers {
		if l.Built() && !j.here(l) {
			missing = append(missing, l)
		}
	}
	if len(missing) > 0 {
		step := j.Progress.Step("importing layers from the cache", "")
		step.Start()
		if err := j.bringAll(ctx, missing, step); err != nil {
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

// here reports whether the store has all forms of a layer that the result needs.
func (j *job) here(l image.Layer) bool {
	return j.Store.HasLayer(l.DiffID) && (!j.needsImage() || hasBlob(j.Store, l))
}

func (j *job) bringAll(ctx context.Context, layers []image.Layer, step *progress.Step) error {
	_, err := image.UnpackAll(ctx, j.Store, layers, j.images, func(n int, current int64) {
		step.Transfer(shortDigest(layers[n].Blob.Digest), current, layers[n].Blob.Size)
	})
	if err != nil || !j.needsImage() {
		return err
	}
	for _, l := range layers {
		if err := image.Fetch(ctx, j.Store, l, j.images); err != nil {
			return err
		}
	}
	return nil
}

func shortDigest(d digest.Digest) string {
	return d.Algorithm().String() + ":" + d.Encoded()[:min(12, len(d.Encoded()))]
}
