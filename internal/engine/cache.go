package engine

import (
	"context"
	"errors"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/image"
)

// lookup asks the caches for all results that are wanted; nil is a miss. Records have no
// content key here: there is one for each result.
func (r *run) lookup(ctx context.Context, s *state, key digest.Digest) ([]cache.Record, error) {
	return lookupBy(ctx, s, key, r.lookupOne)
}

func lookupBy(ctx context.Context, s *state, key digest.Digest, one func(context.Context, digest.Digest) (*cache.Record, error)) ([]cache.Record, error) {
	recs := make([]cache.Record, s.op.results())
	for i := range recs {
		if !s.wanted[i] {
			continue
		}
		rec, err := one(ctx, resultKey(key, i))
		if rec == nil || err != nil {
			return nil, err
		}
		recs[i] = *rec
	}
	return recs, nil
}

// lookupOne asks the store's cache and then the others for a record of which every
// layer can be had. What another cache knows is kept in the store's.
func (r *run) lookupOne(ctx context.Context, key digest.Digest) (*cache.Record, error) {
	if rec, err := r.inStore(ctx, key); rec != nil || err != nil || r.From == nil {
		return rec, err
	}
	for _, c := range r.From() {
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

// inStore is lookupOne for the store's cache alone.
func (r *run) inStore(ctx context.Context, key digest.Digest) (*cache.Record, error) {
	rec, err := r.Cache.Lookup(ctx, key)
	if err != nil || !r.usable(rec) {
		return nil, err
	}
	return rec, nil
}

// finished is what this build has made of an operation; nil if it has not, or if a layer
// below that it took from a cache has turned out to be lost since.
func (r *run) finished(key digest.Digest) []cache.Record {
	recs := slices.Clone(r.flights.finished(key))
	for i := range recs {
		recs[i].Layers = slices.Clone(recs[i].Layers)
		if !r.usable(&recs[i]) {
			return nil
		}
	}
	return recs
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
		here := r.Store.HasLayer(l.DiffID)
		if !here && (!image.Available(r.Store, l) || r.Lost != nil && r.Lost(l)) {
			return false
		}
	}
	return true
}

// know remembers the layers of an image that the build starts from.
func (r *run) know(ls []image.Layer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range ls {
		r.images[l.DiffID] = l
	}
}

// save keeps the results that are wanted, under both keys.
func (r *run) save(ctx context.Context, s *state, key, content digest.Digest, recs []cache.Record) error {
	for i := range recs {
		if !s.wanted[i] {
			continue
		}
		recs[i].Content = resultKey(content, i)
		if err := r.Cache.Save(ctx, resultKey(key, i), recs[i]); err != nil {
			return err
		}
	}
	return nil
}

// found are results of records, of which it tells.
func (r *run) found(s *state, recs []cache.Record) []Result {
	if recs == nil {
		return nil
	}
	s.step.Cached() // unless it was done
	r.tell(s, recs)
	outs := make([]Result, len(recs))
	for i, rec := range recs {
		outs[i].Layers = rec.Layers
	}
	return outs
}

func (r *run) tell(s *state, recs []cache.Record) {
	s.told = true
	if r.watch.Record == nil {
		return
	}
	for i, rec := range recs {
		if s.wanted[i] {
			r.watch.Record(Recorded{Key: resultKey(s.key, i), Record: rec, InResult: s.inResult == i})
		}
	}
}

// tellRest tells of operations that were not needed, as far as the caches know them.
func (r *run) tellRest(ctx context.Context, ops []*Op) error {
	if r.watch.Record == nil {
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
		recs, err := r.lookup(ctx, s, s.key)
		if err != nil {
			return err
		}
		if recs != nil {
			r.tell(s, recs)
		}
	}
	return nil
}

// Rebuildable reports whether err is that a layer cannot be had which a build made: another
// Solve makes it again, if Config.Lost says so.
func Rebuildable(err error) bool {
	var lost *image.LostError
	return errors.As(err, &lost) && lost.Layer.Built()
}

// cancelSteps ends what a run that will be repeated has begun to show.
func (r *run) cancelSteps(ops []*Op) {
	for _, op := range ops {
		r.states[op].step.Cancel()
	}
}
