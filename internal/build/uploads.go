package build

import (
	"context"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/semaphore"

	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/registry"
)

// uploads compresses the result's layers, and sends them to where they are to
// go, while later steps still run.
type uploads struct {
	e       *exporting
	fail    context.CancelCauseFunc // ends the build: what cannot be sent need not be built
	wg      sync.WaitGroup
	packing *semaphore.Weighted // compression uses all CPUs: one layer at a time

	mu     sync.Mutex
	layers []*upload
}

// upload is one layer on its way.
type upload struct {
	diffID digest.Digest
	done   chan struct{}
	layer  image.Layer // once done: with its blob
	err    error
}

func newUploads(e *exporting, fail context.CancelCauseFunc) *uploads {
	return &uploads{e: e, fail: fail, packing: semaphore.NewWeighted(1)}
}

// begin starts what is new in layers; calls repeat and extend each other.
func (u *uploads) begin(ctx context.Context, layers []image.Layer) {
	if !u.e.needsImage() {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	for i, l := range layers {
		if i < len(u.layers) {
			if u.layers[i].diffID == l.DiffID {
				continue
			}
			u.layers = u.layers[:i] // cannot be, but must not push a wrong layer
		}
		p := &upload{diffID: l.DiffID, done: make(chan struct{})}
		u.layers = append(u.layers, p)
		u.wg.Add(1)
		go func() {
			defer u.wg.Done()
			defer close(p.done)
			if p.layer, p.err = u.send(ctx, l); p.err != nil {
				u.fail(p.err)
			}
		}()
	}
}

func (u *uploads) send(ctx context.Context, l image.Layer) (image.Layer, error) {
	packed, err := u.pack(ctx, l)
	if err != nil {
		return l, err
	}
	l = packed
	ps, err := u.e.openPushes(ctx)
	if err != nil {
		return l, err
	}
	for _, p := range ps {
		if err := p.Layer(ctx, l); err != nil {
			return l, err
		}
	}
	return l, nil
}

// pack gives a layer its compressed blob. A layer that some registry has
// keeps the blob it has there.
func (u *uploads) pack(ctx context.Context, l image.Layer) (image.Layer, error) {
	if l.Origin != "" && l.Blob.Digest != "" {
		return l, nil
	}
	if err := u.packing.Acquire(ctx, 1); err != nil {
		return l, context.Cause(ctx)
	}
	defer u.packing.Release(1)
	// What a build made has a time of its own; what came with a base image stays as it is.
	if epoch := u.e.Epoch; epoch != nil && !l.Created.IsZero() {
		var err error
		if l, err = export.ClampLayer(ctx, u.e.Store, u.e.images, l, *epoch); err != nil {
			return l, err
		}
	}
	return image.Pack(ctx, u.e.Store, l, u.e.Compression, 0)
}

// openPushes opens one push for each repository that the image goes to, once.
func (e *exporting) openPushes(ctx context.Context) ([]*export.Push, error) {
	e.opening.Do(func() { e.pushes, e.openErr = e.openRepositories(ctx) })
	return e.pushes, e.openErr
}

func (e *exporting) openRepositories(ctx context.Context) ([]*export.Push, error) {
	var all []*export.Push
	byRepo := map[string]*export.Push{}
	for _, ref := range e.names(export.Spec.ToRegistry) {
		repo, err := registry.Repository(ref)
		if err != nil {
			return nil, err
		}
		if p := byRepo[repo]; p != nil {
			p.Refs = append(p.Refs, ref)
			continue
		}
		p, err := export.OpenPush(ctx, e.Registry, e.Store, e.images, ref, e.Progress)
		if err != nil {
			return nil, err
		}
		byRepo[repo] = p
		all = append(all, p)
	}
	return all, nil
}

// finish waits for all layers and returns them with their blobs.
func (u *uploads) finish() ([]image.Layer, error) {
	var out []image.Layer
	for _, p := range u.layers {
		<-p.done
		if p.err != nil {
			return nil, p.err
		}
		out = append(out, p.layer)
	}
	return out, nil
}

// wait waits for what is under way, successful or not.
func (u *uploads) wait() { u.wg.Wait() }
