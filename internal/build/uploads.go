package build

import (
	"context"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
)

// uploads compresses the layers of one platform's result for a variant, and sends them
// to where they are to go, while later steps still run.
type uploads struct {
	e     *exporting
	v     *variant
	epoch *time.Time              // nothing in new layers is to be younger; nil: times stay
	fail  context.CancelCauseFunc // ends the attempt: what cannot be sent need not be built
	wg    sync.WaitGroup
	// pushes opens the repositories that the variant goes to, for all attempts.
	pushes func() ([]*export.Push, error)

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

// newUploads begins nothing yet. epoch is the plan's.
func newUploads(e *exporting, v *variant, epoch *time.Time, fail context.CancelCauseFunc) *uploads {
	u := &uploads{e: e, v: v, epoch: v.epoch.Of(epoch), fail: fail}
	if v.KeepTimes {
		u.epoch = nil
	}
	return u
}

// begin starts what is new in layers; calls repeat and extend each other.
func (u *uploads) begin(ctx context.Context, layers []image.Layer) {
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

// pack gives a layer its compressed blob. A base image's layer that some registry has
// keeps the blob it has there, unless the compression is insisted on; one that a cache has
// does if it is what would be made here.
func (u *uploads) pack(ctx context.Context, l image.Layer) (image.Layer, error) {
	there := l.Origin != "" && l.Blob.Digest != ""
	if !l.Built() && there && !u.v.Force {
		return l, nil
	}
	if err := u.e.packing.Acquire(ctx, 1); err != nil {
		return l, context.Cause(ctx)
	}
	defer u.e.packing.Release(1)
	if !l.Built() {
		if u.v.Force {
			return u.repack(ctx, l)
		}
		return image.Pack(ctx, u.e.Store, l, u.v.Compression, u.v.Level)
	}
	if u.epoch != nil {
		var err error
		l, err = u.e.clamped(ctx, l, *u.epoch, func() (image.Layer, error) {
			return export.ClampLayer(ctx, u.e.Store, u.e.images, l, *u.epoch)
		})
		if err != nil {
			return l, err
		}
		there = l.Origin != "" && l.Blob.Digest != ""
	}
	if there {
		if u.v.Level == 0 && l.Blob.MediaType == layer.MediaType(u.v.Compression) {
			return l, nil
		}
		if _, err := image.Unpack(ctx, u.e.Store, l, u.e.images, nil); err != nil {
			return l, err
		}
	}
	return image.PackNew(ctx, u.e.Store, l, u.v.Compression, u.v.Level)
}

// repack gives a base image's layer the compression that is wanted, for which
// the layer has to be here. Foreign layers stay as they are.
func (u *uploads) repack(ctx context.Context, l image.Layer) (image.Layer, error) {
	if image.IsForeign(l.Blob.MediaType) {
		return l, nil
	}
	if l.Blob.Digest != "" {
		if err := image.Fetch(ctx, u.e.Store, l, u.e.images); err != nil {
			return l, err
		}
	}
	return image.Repack(ctx, u.e.Store, l, u.v.Compression, u.v.Level)
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
