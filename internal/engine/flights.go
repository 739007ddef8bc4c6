package engine

import (
	"context"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/cache"
)

// flights keeps the Solves of one build from doing the same thing twice, at once
// or one after the other. Who holds the lock of an operation asks for
// those of its inputs only, so nobody waits in a circle.
type flights struct {
	mu      sync.Mutex
	busy    map[digest.Digest]chan struct{} // closed when it is free again
	results map[digest.Digest][]cache.Record
}

func newFlights() *flights {
	return &flights{busy: map[digest.Digest]chan struct{}{}, results: map[digest.Digest][]cache.Record{}}
}

// lock waits until nobody else computes the operation with this key.
func (f *flights) lock(ctx context.Context, key digest.Digest) (unlock func(), err error) {
	for {
		f.mu.Lock()
		other, taken := f.busy[key]
		if !taken {
			mine := make(chan struct{})
			f.busy[key] = mine
			f.mu.Unlock()
			return func() { f.unlock(key, mine) }, nil
		}
		f.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (f *flights) unlock(key digest.Digest, mine chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.busy, key)
	close(mine)
}

// finished is what this build has made of the operation, nil if it has not.
func (f *flights) finished(key digest.Digest) []cache.Record {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.results[key]
}

func (f *flights) finish(key digest.Digest, recs []cache.Record) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.results[key] = recs
}
