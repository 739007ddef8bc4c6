package export

import (
	"context"
	"io"
	"strconv"
	"time"

	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/kiln-build/kiln/internal/tree"
)

// Epoch is what an output says of SOURCE_DATE_EPOCH.
type Epoch struct {
	Own  bool       // what the output says counts, and not the build's
	Time *time.Time // nil: none
}

// Of is the epoch that counts, where the build's is build.
func (e Epoch) Of(build *time.Time) *time.Time {
	if e.Own {
		return e.Time
	}
	return build
}

func (e Epoch) seconds() string {
	if e.Time == nil {
		return ""
	}
	return strconv.FormatInt(e.Time.Unix(), 10)
}

// Clamp returns t with nothing in it younger than epoch (SOURCE_DATE_EPOCH). A
// nil epoch changes nothing.
func Clamp(t tree.Tree, epoch *time.Time) tree.Tree {
	if epoch == nil {
		return t
	}
	return clamped{t, *epoch}
}

type clamped struct {
	tree.Tree
	epoch time.Time
}

func (c clamped) clamp(n tree.Node) tree.Node {
	if n.MTime.After(c.epoch) {
		n.MTime = c.epoch
	}
	return n
}

// Lstat implements tree.Tree.
func (c clamped) Lstat(p string) (tree.Node, error) {
	n, err := c.Tree.Lstat(p)
	return c.clamp(n), err
}

// ReadDir implements tree.Tree.
func (c clamped) ReadDir(p string) ([]tree.Entry, error) {
	es, err := c.Tree.ReadDir(p)
	for i := range es {
		es[i].Node = c.clamp(es[i].Node)
	}
	return es, err
}

// ClampLayer returns the layer with nothing in it younger than epoch: l itself
// if that is so. It is done to finished layers, and not while they are made,
// because the epoch mostly is the time of the last commit: as a part of
// what the steps' results depend on it would leave the cache nothing.
func ClampLayer(ctx context.Context, st *store.Store, f image.Fetcher, l image.Layer, epoch time.Time) (image.Layer, error) {
	r, err := image.OpenLayer(ctx, st, l, f)
	if err != nil {
		return image.Layer{}, err
	}
	defer r.Close()
	young := false
	if err := tree.Walk(r, ".", func(p string, n tree.Node) error {
		young = young || p != "." && n.MTime.After(epoch)
		return ctx.Err()
	}); err != nil || !young {
		return l, err
	}
	out, err := image.Commit(ctx, st, image.CommitOptions{}, func(w io.Writer) error {
		return writeTree(ctx, Clamp(r, &epoch), w)
	})
	out.Created = l.Created
	return out, err
}

// writeTree writes a tree, merged or of one layer, as a canonical tar.
func writeTree(ctx context.Context, t tree.Tree, w io.Writer) error {
	tw := layer.NewTarWriter(w)
	err := tree.Walk(t, ".", func(p string, n tree.Node) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		target := ""
		if n.IsSymlink() {
			var err error
			if target, err = t.Readlink(p); err != nil {
				return err
			}
		}
		return tw.Add(p, n, target, func() (io.ReadCloser, error) { return t.Open(p) })
	})
	if err != nil {
		return err
	}
	return tw.Close()
}
