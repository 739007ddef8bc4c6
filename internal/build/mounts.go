package build

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/cache/remote"
	"github.com/kiln-build/kiln/internal/cachemount"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/image"
)

// mounts takes cache mounts from caches where the store has none, and remembers which
// ones steps took. It is an engine.Mounts.
type mounts struct {
	b    *Build
	from []*remote.Cache

	mu   sync.Mutex
	used map[cachemount.Key]bool
}

// useMounts has the build look for cache mounts in caches, in this order.
func (b *Build) useMounts(specs []cache.Spec) error {
	for _, sp := range specs {
		c, err := b.caches.cache(sp)
		if err != nil {
			return err
		}
		b.mounts.from = append(b.mounts.from, c)
	}
	return nil
}

// mountKey is under what a cache has the layers of a cache mount.
func mountKey(k cachemount.Key) digest.Digest {
	h := cache.NewHasher("cachemount", 1)
	h.Strings([]string{k.ID, k.Base})
	h.Int(int64(k.Instance))
	return h.Key()
}

// Import implements engine.Mounts. A mount that cannot be had is a warning.
func (m *mounts) Import(ctx context.Context, k cachemount.Key) ([]image.Layer, error) {
	for _, c := range m.from {
		r, err := c.Lookup(ctx, mountKey(k))
		if err != nil {
			return nil, err
		}
		if r == nil || len(r.Layers) == 0 {
			continue
		}
		ls, err := m.b.bring(ctx, r.Layers, false)
		var lost *image.LostError
		if errors.As(err, &lost) && ctx.Err() == nil {
			m.b.Progress.Warn(fmt.Sprintf("cache mount %q is not imported: %v", k.ID, err))
			continue
		}
		return ls, err
	}
	return nil, nil
}

// Used implements engine.Mounts.
func (m *mounts) Used(k cachemount.Key) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used[k] = true
}

// checkMountsTo refuses what cache mounts cannot be written to.
func checkMountsTo(specs []cache.Spec) error {
	if len(specs) > 1 || len(specs) == 1 && specs[0].Type == cache.Inline {
		return diag.New(diag.ExitUsage, "cache mounts %s: they go to one cache, of type=registry or type=local", specs[len(specs)-1])
	}
	return nil
}

// exportMounts writes the cache mounts that steps took to a cache.
func (e *exporting) exportMounts(ctx context.Context) error {
	if len(e.MountsTo) == 0 {
		return nil
	}
	sp := e.MountsTo[0]
	c, err := e.caches.cache(sp)
	if err != nil {
		return err
	}
	if !e.writing.has(c) { // which says how
		c.Write(remote.Writing{Spec: sp, Compression: e.Compression})
	}
	e.mounts.mu.Lock()
	defer e.mounts.mu.Unlock()
	for k := range e.mounts.used {
		ls, err := cachemount.New(e.Store).Own(k)
		if err != nil {
			return err
		}
		if len(ls) == 0 {
			continue
		}
		own := append([]image.Layer{}, ls...)
		for i := range own {
			if !own[i].Built() { // made of several others
				own[i].Created = time.Now().UTC()
			}
		}
		if err := c.Save(ctx, mountKey(k), cache.Record{Layers: own}); err != nil {
			return err
		}
	}
	if e.writing.has(c) {
		return nil // it is written with the rest
	}
	return c.Flush(ctx)
}
