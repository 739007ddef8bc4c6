package engine

import (
	"context"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/semaphore"

	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/tree"
)

// Key is the definition key of the graph's target.
func Key(ctx context.Context, c Config, g *Graph) (digest.Digest, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r := &run{
		Config: c, fail: cancel, slots: semaphore.NewWeighted(1), states: map[*Op]*state{},
		readers: map[digest.Digest]*layer.Reader{}, contexts: map[*Local]tree.Tree{},
	}
	defer r.close()
	r.prepare(g)
	return r.inputKey(ctx, g.Target)
}
