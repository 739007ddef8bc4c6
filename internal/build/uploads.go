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
	j       *job
	pushes  func() ([]*export.Push, error)
	fail    context.CancelCauseFunc // ends the attempt: what cannot be sent need not be built
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

func newUploads(j *job, pushes func() ([]*export.Push, error), fail context.CancelCauseFunc) *uploads {
	return &uploads{j: j, pushes: pushes, fail: fail, packing: semaphore.NewWeighted(1)}
}

// begin starts what is new in layers; calls repeat and extend each other.
func (u *uploads) begin(ctx context.Context, layers []image.Layer) {
	if !u.j.needsImage() {
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
	ps, err := u.pushes()
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
	clamp := u.j.epoch != nil && l.Built() // what came with a base image stays as it is
	if l.Origin != "" && l.Blob.Digest != "" && !clamp {
		return l, nil
	}
	if err := u.packing.Acquire(ctx, 1); err != nil {
		return l, context.Cause(ctx)
	}
	defer u.packing.Release(1)
	if clamp {
		var err error
		if l, err = u.j.clamped(ctx, l, *u.j.epoch); err != nil {
			return l, err
		}
	}
	return image.Pack(ctx, u.j.Store, l, u.j.req.Compression, 0)
}

// openPushes opens one push for each repository that the image goes to, once.
func (j *job) openPushes(ctx context.Context) ([]*export.Push, error) {
	j.opening.Do(func() { j.pushes, j.openErr = j.openRepositories(ctx) })
	return j.pushes, j.openErr
}

func (j *job) openRepositories(ctx context.Context) ([]*export.Push, error) {
	var all []*export.Push
	byRepo := map[string]*export.Push{}
	for _, ref := range j.names(export.Spec.ToRegistry) {
		repo, err := registry.Repository(ref)
		if err != nil {
			return nil, err
		}
		if p := byRepo[repo]; p != nil {
			p.Refs = append(p.Refs, ref)
			continue
		}
		p, err := export.OpenPush(ctx, j.Registry, j.Store, j.images, ref, j.Progress)
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
