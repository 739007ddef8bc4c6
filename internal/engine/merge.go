package engine

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"path"
	"slices"
	"time"

	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/tree"
)

// merge stacks the inputs' layers. What comes back is never nil, which would be a miss.
func (r *run) merge(ctx context.Context, ins []Result) ([]image.Layer, error) {
	out := []image.Layer{}
	for _, in := range ins {
		ls, err := r.Layers(ctx, in)
		if err != nil {
			return nil, err
		}
		out = append(out, ls...)
	}
	return out, nil
}

// diff is what has to be laid over the first input to see the second: the
// second's own layers where it was built on the first, else one layer
// made by comparing them.
func (r *run) diff(ctx context.Context, ins []Result) ([]image.Layer, error) {
	if len(ins) != 2 {
		return nil, errors.New("a diff of other than two file systems")
	}
	lower, err := r.Layers(ctx, ins[0])
	if err != nil {
		return nil, err
	}
	upper, err := r.Layers(ctx, ins[1])
	if err != nil {
		return nil, err
	}
	same := func(a, b image.Layer) bool { return a.DiffID == b.DiffID }
	if n := len(lower); n <= len(upper) && slices.EqualFunc(lower, upper[:n], same) {
		return append([]image.Layer{}, upper[n:]...), nil
	}
	from, err := r.Tree(ctx, Result{Layers: lower})
	if err != nil {
		return nil, err
	}
	to, err := r.Tree(ctx, Result{Layers: upper})
	if err != nil {
		return nil, err
	}
	l, err := image.Commit(ctx, r.Store, image.CommitOptions{}, func(w io.Writer) error { return writeDiff(ctx, from, to, w) })
	if err != nil {
		return nil, err
	}
	l.Created = time.Now().UTC()
	return []image.Layer{l}, nil
}

// writeDiff writes the layer that turns one tree into another.
func writeDiff(ctx context.Context, from, to tree.Tree, w io.Writer) error {
	d := &differ{ctx: ctx, from: from, to: to, tw: layer.NewTarWriter(w)}
	if err := d.dir(".", nil); err != nil {
		return err
	}
	return d.tw.Close()
}

type differ struct {
	ctx      context.Context
	from, to tree.Tree
	tw       *layer.TarWriter
}

// dir compares a directory that both trees have. above writes it and what is
// above it, once, when there turns out to be a change below it.
func (d *differ) dir(p string, above func() error) error {
	if err := d.ctx.Err(); err != nil {
		return context.Cause(d.ctx)
	}
	was, err := byName(d.from, p)
	if err != nil {
		return err
	}
	is, err := byName(d.to, p)
	if err != nil {
		return err
	}
	names := slices.Concat(slices.Collect(maps.Keys(was)), slices.Collect(maps.Keys(is)))
	slices.Sort(names)
	for _, n := range slices.Compact(names) {
		if err := d.entry(path.Join(p, n), was[n], is[n], above); err != nil {
			return err
		}
	}
	return nil
}

// byName are the entries of a directory.
func byName(t tree.Tree, p string) (map[string]*tree.Node, error) {
	es, err := t.ReadDir(p)
	if err != nil {
		return nil, err
	}
	out := make(map[string]*tree.Node, len(es))
	for _, e := range es {
		out[e.Name] = &e.Node
	}
	return out, nil
}

// entry compares one path; was or is nil: it is not there.
func (d *differ) entry(p string, was, is *tree.Node, above func() error) error {
	write := func(n tree.Node) error {
		if above != nil {
			if err := above(); err != nil {
				return err
			}
		}
		return d.add(p, n)
	}
	switch {
	case is == nil:
		return write(tree.Node{Mode: tree.ModeChar}) // a whiteout
	case was == nil || was.Mode&tree.ModeType != is.Mode&tree.ModeType:
		return tree.Walk(d.to, p, func(q string, n tree.Node) error {
			if q == p {
				return write(n)
			}
			return d.add(q, n)
		})
	}
	same, err := d.same(p, was, is)
	if err != nil {
		return err
	}
	if !is.IsDir() {
		if same {
			return nil
		}
		return write(*is)
	}
	written := false
	self := func() error {
		if written {
			return nil
		}
		written = true
		return write(*is)
	}
	if !same {
		if err := self(); err != nil {
			return err
		}
	}
	return d.dir(p, self)
}

func (d *differ) add(p string, n tree.Node) error {
	target := ""
	if n.IsSymlink() {
		var err error
		if target, err = d.to.Readlink(p); err != nil {
			return err
		}
	}
	return d.tw.Add(p, n, target, func() (io.ReadCloser, error) { return d.to.Open(p) })
}

// same reports whether a path is the same in both. Files with the same
// metadata, and a time that is not just whole seconds, are not read: as BuildKit does it.
func (d *differ) same(p string, a, b *tree.Node) (bool, error) {
	if a.Mode != b.Mode || a.UID != b.UID || a.GID != b.GID || a.Major != b.Major || a.Minor != b.Minor || !maps.Equal(a.Xattr, b.Xattr) {
		return false, nil
	}
	switch {
	case a.IsSymlink():
		x, err := d.from.Readlink(p)
		if err != nil {
			return false, err
		}
		y, err := d.to.Readlink(p)
		return x == y, err
	case !a.MTime.Equal(b.MTime):
		return false, nil
	case !a.IsRegular():
		return true, nil
	case a.Size != b.Size:
		return false, nil
	case a.MTime.Nanosecond() != 0:
		return true, nil
	}
	return d.sameContent(p)
}

func (d *differ) sameContent(p string) (bool, error) {
	x, err := d.from.Open(p)
	if err != nil {
		return false, err
	}
	defer x.Close()
	y, err := d.to.Open(p)
	if err != nil {
		return false, err
	}
	defer y.Close()
	a, b := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, err := io.ReadFull(x, a)
		m, err2 := io.ReadFull(y, b)
		if !bytes.Equal(a[:n], b[:m]) {
			return false, nil
		}
		for _, e := range []error{err, err2} {
			if e != nil && e != io.EOF && e != io.ErrUnexpectedEOF {
				return false, e
			}
		}
		if err != nil || err2 != nil {
			return (err != nil) == (err2 != nil), nil
		}
	}
}
