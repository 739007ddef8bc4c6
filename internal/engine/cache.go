package engine

import (
	"context"
	"errors"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/image"
)

// lookup asks the store's cache and then the others for a record of which every
// layer can be had. What another cache knows is kept in the store's.
func (r *run) lookup(ctx context.Context, key digest.Digest) (*cache.Record, error) {
	rec, err := r.Cache.Lookup(ctx, key)
	if err != nil {
		return nil, err
	}
	if r.usable(rec) {
		return rec, nil
	}
	for _, c := range r.From {
		rec, err := c.Lookup(ctx, key)
		if err != nil {
			return nil, err
		}
		if r.usable(rec) {
			return rec, r.Cache.Save(ctx, key, *rec)
		}
	}
	return nil, nil
}

// usable reports whether all layers of a record can be had. Those of images that
// this build starts from are taken as these images have them: in their
// registry, in their compression.
func (r *run) usable(rec *cache.Record) bool {
	if rec == nil {
		return false
	}
	r.mu.Lock()
	for i, l := range rec.Layers {
		if known, ok := r.images[l.DiffID]; ok && !l.Built() {
			rec.Layers[i] = known
		}
	}
	r.mu.Unlock()
	for _, l := range rec.Layers {
		if !r.available(l) {
			return false
		}
	}
	return true
}

func (r *run) available(l image.Layer) bool {
	if r.Store.HasLayer(l.DiffID) {
		return true
	}
	if l.Blob.Digest == "" || r.Lost != nil && r.Lost(l) {
		return false
	}
	_, err := r.Store.StatBlob(l.Blob.Digest)
	return err == nil || l.Origin != ""
}

// know remembers the layers of an image that the build starts from.
func (r *run) know(ls []image.Layer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.images == nil {
		r.images = map[digest.Digest]image.Layer{}
	}
	for _, l := range ls {
		r.images[l.DiffID] = l
	}
}

// rebuildable reports whether err is that a layer cannot be had which a build made.
func rebuildable(err error) bool {
	var lost *image.LostError
	return errors.As(err, &lost) && lost.Layer.Built()
}

// cancelSteps ends what a run that will be repeated has begun to show.
func (r *run) cancelSteps(ops []*Op) {
	for _, op := range ops {
		r.states[op].step.Cancel()
	}
}

func (r *run) tell(s *state, rec cache.Record) {
	s.told = true
	if r.OnResult != nil {
		r.OnResult(Result{Key: s.key, Record: rec, InResult: s.inResult})
	}
}

// tellRest tells of operations that were not needed, as far as the caches know them.
func (r *run) tellRest(ctx context.Context, ops []*Op) error {
	if r.OnResult == nil {
		return nil
	}
	for _, op := range ops {
		s := r.states[op]
		switch op.Do.(type) {
		case *Local, *Image, *Layout:
			continue
		}
		if s.key == "" || s.told || s.forced {
			continue
		}
		rec, err := r.lookup(ctx, s.key)
		if err != nil {
			return err
		}
		if rec != nil {
			r.tell(s, *rec)
		}
	}
	return nil
}
