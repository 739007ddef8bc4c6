package cachemount

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"

	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/tree"
)

// maxDepth is how many layers a mount has at most besides what it began with.
const maxDepth = 10

// compact merges the topmost layers of a stack into one if those below are no larger, or the
// stack is deep. So what was written over is not kept for long, a stack is not much larger than what is
// seen of it, and each byte is written again a few times in all. It returns nil if there is nothing to do.
func (s *Store) compact(ctx context.Context, ls []image.Layer, began int) ([]image.Layer, error) {
	opened, err := s.open(ls)
	if err != nil {
		return nil, err
	}
	defer closeAll(opened)
	n := len(ls) - 1
	for sum := size(opened[n]); n > began && (size(opened[n-1]) <= sum || n-began >= maxDepth); n-- {
		sum += size(opened[n-1])
	}
	if n == len(ls)-1 {
		return nil, nil
	}
	w := squasher{ctx: ctx, below: merged(opened[:n])}
	for _, l := range opened[n:] {
		w.layers = append([]tree.Tree{l}, w.layers...)
	}
	l, err := image.Commit(ctx, s.st, image.CommitOptions{}, w.write)
	if err != nil {
		return nil, err
	}
	return append(slices.Clip(ls[:n]), l), nil
}

// rebase makes of a layer on top of base one that says the same without hiding what
// it does not know of: where it replaced a directory it hides just the names that base has.
func (s *Store) rebase(ctx context.Context, l image.Layer, base []image.Layer) (image.Layer, error) {
	opened, err := s.open(append(slices.Clip(base), l))
	if err != nil {
		return image.Layer{}, err
	}
	defer closeAll(opened)
	n := len(base)
	w := squasher{ctx: ctx, below: merged(opened[:n]), layers: []tree.Tree{opened[n]}, byName: true}
	return image.Commit(ctx, s.st, image.CommitOptions{}, w.write)
}

func (s *Store) open(ls []image.Layer) ([]*layer.Reader, error) {
	var out []*layer.Reader
	for _, l := range ls {
		r, err := layer.Open(s.st.LayerPath(l.DiffID))
		if err != nil {
			closeAll(out)
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

// size is what it costs to write a layer again.
func size(r *layer.Reader) int64 { return r.Info().TarSize }

func closeAll(rs []*layer.Reader) {
	for _, r := range rs {
		r.Close()
	}
}

func merged(rs []*layer.Reader) tree.Tree {
	ts := make([]tree.Tree, len(rs))
	for i, r := range rs {
		ts[i] = r
	}
	return rootfs.New(ts...)
}

// squasher writes raw layers as the one layer that changes what is below as they do
// together. What they hide is in it only if there is something to hide.
type squasher struct {
	ctx    context.Context //nolint:containedctx // lives as long as one write
	layers []tree.Tree     // the top first
	below  tree.Tree       // all below them, merged
	// byName: instead of making a directory opaque, hide its names one by one.
	byName bool
	tar    *layer.TarWriter
}

func (w *squasher) write(out io.Writer) error {
	w.tar = layer.NewTarWriter(out)
	all := make([]int, len(w.layers))
	for i := range all {
		all[i] = i
	}
	if err := w.dir(place{path: ".", stack: all, onTop: true}); err != nil {
		return err
	}
	return w.tar.Close()
}

// place is a directory to be written.
type place struct {
	path  string
	stack []int // the layers that make it up, the top first
	onTop bool  // there is a directory below at the same path
	hides bool  // what is below is hidden
}

// found is the topmost entry of a name.
type found struct {
	layer int
	node  tree.Node
}

func (w *squasher) dir(d place) error {
	if w.ctx.Err() != nil {
		return context.Cause(w.ctx)
	}
	names, err := w.names(d)
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if err := w.entry(d, path.Join(d.path, name), names[name]); err != nil {
			return err
		}
	}
	return nil
}

// names are those that the layers have in a directory; and those below that are
// to be hidden one by one, as whiteouts.
func (w *squasher) names(d place) (map[string]found, error) {
	names := map[string]found{}
	for _, i := range d.stack {
		es, err := w.layers[i].ReadDir(d.path)
		if err != nil {
			return nil, err
		}
		for _, e := range es {
			if _, ok := names[e.Name]; !ok {
				names[e.Name] = found{i, e.Node}
			}
		}
	}
	if !d.onTop || !d.hides || !w.byName {
		return names, nil
	}
	es, err := w.below.ReadDir(d.path)
	if err != nil {
		return nil, err
	}
	for _, e := range es {
		if _, ok := names[e.Name]; !ok {
			names[e.Name] = found{node: tree.Node{Mode: tree.ModeChar}}
		}
	}
	return names, nil
}

func (w *squasher) entry(d place, p string, f found) error {
	var was tree.Node // below; the zero Node if nothing that would be seen there
	if d.onTop && (!d.hides || w.byName) {
		n, err := w.below.Lstat(p)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		was = n
	}
	switch n := f.node; {
	case n.IsWhiteout():
		if was.Mode == 0 {
			return nil
		}
		return w.tar.Add(p, n, "", nil)
	case n.IsDir():
		return w.subdir(d, p, f, was)
	default:
		return w.file(p, f)
	}
}

func (w *squasher) file(p string, f found) (err error) {
	l := w.layers[f.layer]
	if f.node.Nlink > 1 { // a number for each file of each layer
		f.node.Inode = f.node.Inode*uint64(len(w.layers)) + uint64(f.layer)
	}
	var target string
	if f.node.IsSymlink() {
		if target, err = l.Readlink(p); err != nil {
			return err
		}
	}
	return w.tar.Add(p, f.node, target, func() (io.ReadCloser, error) { return l.Open(p) })
}

// subdir writes a directory, with what is in it.
func (w *squasher) subdir(d place, p string, f found, was tree.Node) error {
	sub := place{path: p, onTop: was.IsDir(), hides: d.hides}
	n, known := f.node, false
	for _, i := range d.stack[slices.Index(d.stack, f.layer):] {
		m, err := w.layers[i].Lstat(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if !m.IsDir() {
			sub.hides = true
			break
		}
		sub.stack = append(sub.stack, i)
		if !known && m.Xattr[layer.XattrImplied] != "y" {
			n, known = m, true
		}
		if m.IsOpaque() {
			sub.hides = true
			break
		}
	}
	if !known && sub.onTop {
		n = was
	}
	n.Xattr = maps.Clone(n.Xattr)
	delete(n.Xattr, tree.XattrOpaque)
	if sub.onTop && sub.hides && !w.byName {
		if n.Xattr == nil {
			n.Xattr = map[string]string{}
		}
		n.Xattr[tree.XattrOpaque] = "y"
	}
	if err := w.tar.Add(p, n, "", nil); err != nil {
		return fmt.Errorf("merge layers: %w", err)
	}
	return w.dir(sub)
}
