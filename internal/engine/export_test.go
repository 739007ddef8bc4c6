package engine

import (
	"context"
	"time"

	"github.com/opencontainers/go-digest"
)

// Key is the definition key of the graph's target.
func Key(ctx context.Context, c Config, g *Graph) (digest.Digest, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s := New(c)
	defer s.Close()
	r := &run{Solver: s, fail: cancel, states: map[*Op]*state{}}
	defer r.close()
	r.prepare(g)
	return r.inputKey(ctx, g.Target)
}

// SetPatience is how long steps share a cache mount before that is told.
func (s *Solver) SetPatience(d time.Duration) { s.patience = d }
