package fileop

import (
	"context"
	"time"

	"github.com/kiln-build/kiln/internal/tree"
)

// Limits bound what an archive may hold. Zero values stand for defaults.
type Limits struct {
	Entries int   // names; default 4 million
	Bytes   int64 // content; default 1 TiB
}

func (c *Changes) unpack(ctx context.Context, src tree.Tree, s, dest string, own *owner, t *time.Time) (bool, error) {
	return false, nil
}
