package remote

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
)

// send is a layer on its way to where the cache lies.
type send struct {
	done  chan struct{}
	layer image.Layer // once done: with its blob
	err   error
}

// failed reports whether the layer has not arrived, and will not.
func (s *send) failed() bool {
	select {
	case <-s.done:
		return s.err != nil
	default:
		return false
	}
}

// begin sends a layer in the background. The caller holds c.mu.
func (c *Cache) begin(ctx context.Context, l image.Layer) {
	s := &send{done: make(chan struct{})}
	c.sends[l.DiffID] = s
	c.wg.Add(1)
	go func() {
		defer c.wg.Done()
		defer close(s.done)
		select {
		case c.slots <- struct{}{}:
		case <-ctx.Done():
			s.err = context.Cause(ctx)
			return
		}
		s.layer, s.err = c.send(ctx, l)
		<-c.slots
		var lost *image.LostError
		if s.err != nil && !errors.As(s.err, &lost) && c.writing.Fail != nil {
			c.writing.Fail(s.err)
		}
	}()
}

// send compresses a layer, unless it has been, and puts it where the cache lies.
func (c *Cache) send(ctx context.Context, l image.Layer) (image.Layer, error) {
	packed, err := c.pack(ctx, l)
	if err != nil {
		return l, err
	}
	if c.listed(packed.Blob.Digest) {
		return packed, nil
	}
	return packed, c.storage.Put(ctx, packed)
}

// pack gives a layer its blob: the image's, if it has the same compression. One from
// another cache keeps the blob it has there, unless the compression is insisted on.
func (c *Cache) pack(ctx context.Context, l image.Layer) (image.Layer, error) {
	comp, level := c.writing.Compression, c.writing.Level
	if sp := c.writing.Spec; sp.Compression != "" || sp.Level != 0 {
		comp, level = cmp.Or(sp.Compression, comp), sp.Level
	}
	if l.Origin == "" || l.Blob.Digest == "" {
		return image.PackNew(ctx, c.opt.Store, l, comp, level)
	}
	if !c.writing.Spec.Force || l.Blob.MediaType == layer.MediaType(comp) {
		return l, nil
	}
	if err := image.Fetch(ctx, c.opt.Store, l, c.fetcher); err != nil {
		return l, err
	}
	return image.PackNew(ctx, c.opt.Store, l, comp, level)
}

// listed reports whether the cache, as it was read, has the blob.
func (c *Cache) listed(d digest.Digest) bool {
	c.loading.Lock()
	defer c.loading.Unlock()
	if c.loaded == nil || c.loaded.kind != kindCache || c.doubted {
		return false
	}
	return slices.ContainsFunc(c.loaded.layers, func(l image.Layer) bool { return l.Blob.Digest == d })
}

// maxTries is how often a cache is read and written before too many others do so, too.
const maxTries = 20

// Flush writes what was saved into the cache, beside what others have written:
// it reads, merges, writes if nobody has written meanwhile, and looks whether it
// is still there a moment later, until it is.
func (c *Cache) Flush(ctx context.Context) error {
	step := c.opt.Progress.Step("exporting cache to "+c.opt.Name, "")
	step.Start()
	err := c.flush(ctx)
	if err != nil {
		err = fmt.Errorf("write cache %s: %w", c.opt.Name, err)
	}
	if c.writing.Spec.IgnoreError && err != nil && ctx.Err() == nil {
		c.opt.Progress.Warn(err.Error())
		step.Done(nil)
		return nil
	}
	step.Done(err)
	return err
}

func (c *Cache) flush(ctx context.Context) error {
	mine, err := c.fresh(ctx)
	if err != nil || len(mine) == 0 {
		return err
	}
	c.loading.Lock()
	known := c.loaded
	c.loading.Unlock()
	if known != nil && known.kind != kindCache {
		known = nil // it may have failed to load
	}
	replace := true
	for try := 1; ; try++ {
		began := time.Now()
		if known == nil {
			if known, err = c.reload(ctx); err != nil {
				return err
			}
		}
		next, changed := merge(known, mine, c.opt.Now(), c.writing.Spec.Bounds, replace)
		if !changed {
			return nil
		}
		ok, err := c.replace(ctx, known.manifest, next)
		switch {
		case errors.Is(err, errLost) && try > 1 && c.writing.Spec.Index:
			return &diag.Error{Err: err, Code: diag.ExitCode(err), Hint: "Not every registry takes an index of layers. image-manifest=true, the default, makes a manifest of the cache."}
		case errors.Is(err, errLost) && try < maxTries:
			// Of others' layers, or of those that were there at first.
			if err := c.putAll(ctx); err != nil {
				return err
			}
			if mine, err = c.fresh(ctx); err != nil {
				return err
			}
			known = &contents{manifest: known.manifest}
			continue
		case err != nil:
			return err
		case ok && c.exclusive:
			return nil
		case ok:
			replace = false
		}
		if try >= maxTries {
			return fmt.Errorf("others have written it %d times meanwhile", maxTries)
		}
		if known, err = nil, c.settle(ctx, time.Since(began)); err != nil {
			return err
		}
	}
}

// settle waits for somebody who read the cache before we wrote it, and writes now.
func (c *Cache) settle(ctx context.Context, took time.Duration) error {
	const least, most = 50 * time.Millisecond, 2 * time.Second
	d := min(max(2*took, least), most)
	d += rand.N(d/2 + 1) //nolint:gosec // chance, not secrecy
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// reload reads the cache to add to it. What is broken is written anew; what is no
// cache is not touched.
func (c *Cache) reload(ctx context.Context) (*contents, error) {
	got, err := load(ctx, c.storage)
	if err == nil && got.kind == kindCache {
		return got, nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		return &contents{}, nil
	}
	k := kindOther
	var bad *unusableError
	switch {
	case err == nil:
		k = got.kind
	case errors.As(err, &bad):
		k = bad.kind
	default:
		return nil, err
	}
	if k != kindCache && k != kindBuildKit {
		return nil, diag.New(diag.ExitUsage, "there is something else than a cache, which would be lost").
			WithHint("Give the cache a name of its own; type=inline puts records into the image itself.")
	}
	c.opt.Progress.Warn(fmt.Sprintf("the cache %s is written anew: %v", c.opt.Name, brief(err)))
	_, desc, err := c.storage.Resolve(ctx)
	if desc.Digest == "" {
		return nil, err
	}
	return &contents{manifest: desc.Digest}, nil
}

// replace writes the cache, smaller if it would be too large.
func (c *Cache) replace(ctx context.Context, old digest.Digest, next *contents) (ok bool, err error) {
	sp := c.writing.Spec
	for {
		manifest, config, err := next.encode(form{index: sp.Index, docker: sp.DockerTypes})
		if err != nil {
			return false, err
		}
		if len(config) <= maxDocument && len(manifest.Raw) <= image.MaxManifest {
			return c.storage.Replace(ctx, old, config, manifest)
		}
		if len(next.entries) < 2 {
			return false, fmt.Errorf("its records have %d bytes, and %d are allowed", len(config), maxDocument)
		}
		next.entries = next.entries[:len(next.entries)*4/5] // those used last are first
	}
}

// fresh waits for the layers and describes what was saved. Records with layers that
// could not be had, from another cache, are left out.
func (c *Cache) fresh(ctx context.Context) ([]fresh, error) {
	c.mu.Lock()
	saved := make(map[digest.Digest]cache.Record, len(c.saved))
	contentOf := map[digest.Digest]bool{}
	for k, r := range c.saved {
		saved[k] = r
		contentOf[r.Content] = r.Content != "" && r.Content != k || contentOf[r.Content]
	}
	c.mu.Unlock()
	var out []fresh
	for k, r := range saved {
		if contentOf[k] {
			continue // it goes with the record that names it
		}
		ls, err := c.sent(ctx, r.Layers)
		var lost *image.LostError
		if errors.As(err, &lost) {
			c.opt.Progress.Warn(fmt.Sprintf("the cache %s goes without a result whose layer cannot be had: %v", c.opt.Name, brief(err)))
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, fresh{k, r.Content, ls})
	}
	return out, nil
}

// sent are the layers as the cache has them.
func (c *Cache) sent(ctx context.Context, ls []image.Layer) ([]image.Layer, error) {
	out := make([]image.Layer, 0, len(ls))
	for _, l := range ls {
		if !l.Built() {
			out = append(out, image.Layer{DiffID: l.DiffID})
			continue
		}
		c.mu.Lock()
		s := c.sends[l.DiffID]
		c.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-s.done:
		}
		if s.err != nil {
			return nil, s.err
		}
		l.Blob, l.Origin = s.layer.Blob, ""
		out = append(out, l)
	}
	return out, nil
}

// putAll puts all layers again, which costs little for those that are there.
func (c *Cache) putAll(ctx context.Context) error {
	c.mu.Lock()
	all := make([]*send, 0, len(c.sends))
	for _, s := range c.sends {
		all = append(all, s)
	}
	c.mu.Unlock()
	for _, s := range all {
		if s.err != nil {
			continue
		}
		err := c.storage.Put(ctx, s.layer)
		var lost *image.LostError
		if errors.As(err, &lost) {
			s.err = err // it was there and nowhere else
		} else if err != nil {
			return err
		}
	}
	return nil
}
