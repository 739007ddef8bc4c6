package registry

import (
	"context"
	"fmt"
	"sync"

	"github.com/opencontainers/go-digest"
)

// placed remembers which repository of a registry was given a blob, so that the
// next one takes it from there: an image and its cache have the same layers.
// Of several who want to send one blob to a registry, one does.
type placed struct {
	mu    sync.Mutex
	repos map[place]string // path of a repository that has it
	turns map[place]*turn
}

// place is a blob in a registry.
type place struct {
	host   string
	digest digest.Digest
}

// turn is the queue for one place.
type turn struct {
	free  chan struct{} // holds one token when nobody has the turn
	users int
}

// maxPlaced bounds the memory of a process that lives long. What is forgotten is sent twice.
const maxPlaced = 20_000

func newPlaced() *placed { return &placed{repos: map[place]string{}, turns: map[place]*turn{}} }

// claim waits until nobody else sends the blob to the registry.
func (p *placed) claim(ctx context.Context, at place) (release func(), err error) {
	p.mu.Lock()
	t := p.turns[at]
	if t == nil {
		t = &turn{free: make(chan struct{}, 1)}
		t.free <- struct{}{}
		p.turns[at] = t
	}
	t.users++
	p.mu.Unlock()
	leave := func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if t.users--; t.users == 0 {
			delete(p.turns, at)
		}
	}
	select {
	case <-ctx.Done():
		leave()
		return nil, fmt.Errorf("wait for another upload of blob %s: %w", at.digest, context.Cause(ctx))
	case <-t.free:
		return func() { t.free <- struct{}{}; leave() }, nil
	}
}

// repo is the path of a repository that has the blob; empty if none is known.
func (p *placed) repo(at place) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.repos[at]
}

// note remembers that the repository at path has the blob.
func (p *placed) note(at place, path string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.repos) >= maxPlaced {
		clear(p.repos)
	}
	p.repos[at] = path
}
