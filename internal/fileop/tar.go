package fileop

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"

	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/tree"
)

// WriteTar writes the changes as a canonical layer tar: what differs from the
// base, with the directories that lead to it. A file that was replaced by an
// equal one (metadata, time and content) is no change, and neither is a
// directory of which just the time is another, as with BuildKit's overlay differ.
func (c *Changes) WriteTar(ctx context.Context, w io.Writer) error {
	tw := layer.NewTarWriter(w)
	if c.root != nil {
		d := differ{c: c, skip: map[*inode]bool{}, linked: map[*inode]*linked{}, buf: make([]byte, 128<<10)}
		if err := d.links(".", c.root); err != nil {
			return err
		}
		if _, err := d.differs(ctx, ".", c.root); err != nil {
			return err
		}
		if err := d.write(ctx, tw, ".", c.root); err != nil {
			return err
		}
	}
	return tw.Close()
}

// differ finds out which inodes need not be written.
type differ struct {
	c    *Changes
	skip map[*inode]bool
	// linked has for a file with several names whether all are as in the base.
	linked map[*inode]*linked
	buf    []byte
}

type linked struct {
	same  bool
	inode uint64 // the base's
}

// links looks at all files with several names: such a file is a change, under
// each of its names, if any of them is.
func (d *differ) links(p string, i *inode) error {
	for name, k := range i.kids {
		if err := d.links(path.Join(p, name), k); err != nil {
			return err
		}
	}
	if i.node.Nlink <= 1 || i.node.IsDir() {
		return nil
	}
	l := d.linked[i]
	if l != nil && !l.same {
		return nil
	}
	same, err := d.same(p, i)
	if err != nil {
		return err
	}
	n, err := d.c.base.Lstat(p)
	if errors.Is(err, fs.ErrNotExist) {
		n, err = tree.Node{}, nil
	}
	if l == nil {
		l = &linked{same: true, inode: n.Inode}
		d.linked[i] = l
	}
	l.same = same && n.Inode == l.inode
	return err
}

// differs says whether i, or something below it, is a change; if not, it is
// marked to be skipped.
func (d *differ) differs(ctx context.Context, p string, i *inode) (bool, error) {
	if err := ctx.Err(); err != nil {
		return false, context.Cause(ctx)
	}
	if i.whiteout {
		return true, nil
	}
	some := false
	for name, k := range i.kids {
		s, err := d.differs(ctx, path.Join(p, name), k)
		if err != nil {
			return false, err
		}
		some = some || s
	}
	if l := d.linked[i]; l != nil {
		some = !l.same
	} else if !some {
		same, err := d.same(p, i)
		if err != nil {
			return false, err
		}
		some = !same
	}
	if !some {
		d.skip[i] = true
	}
	return some, nil
}

// same says whether the base has an equal of i at p.
func (d *differ) same(p string, i *inode) (bool, error) {
	n, err := d.c.base.Lstat(p)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if n.Mode != i.node.Mode || n.UID != i.node.UID || n.GID != i.node.GID ||
		n.Major != i.node.Major || n.Minor != i.node.Minor || !maps.Equal(n.Xattr, i.node.Xattr) {
		return false, nil
	}
	if n.IsDir() {
		return i.lower, nil
	}
	if n.Size != i.node.Size || !n.MTime.Equal(i.node.MTime) || max(n.Nlink, 1) != max(i.node.Nlink, 1) {
		return false, nil
	}
	switch {
	case n.IsSymlink():
		target, err := d.c.base.Readlink(p)
		return err == nil && target == i.target, err
	case n.IsRegular() && n.Size > 0:
		return d.sameContent(p, i)
	}
	return true, nil
}

func (d *differ) sameContent(p string, i *inode) (bool, error) {
	if i.content.kept {
		return true, nil
	}
	if x, err := (content{src: d.c.base, path: p}).digest(); err == nil {
		if y, err := i.content.digest(); err == nil {
			return x == y, nil
		}
	}
	a, err := d.c.base.Open(p)
	if err != nil {
		return false, err
	}
	defer a.Close()
	b, err := i.content.open()
	if err != nil {
		return false, err
	}
	defer b.Close()
	half := len(d.buf) / 2
	return sameBytes(a, b, d.buf[:half], d.buf[half:])
}

func sameBytes(a, b io.Reader, abuf, bbuf []byte) (bool, error) {
	for {
		n, aerr := io.ReadFull(a, abuf)
		m, berr := io.ReadFull(b, bbuf)
		if !bytes.Equal(abuf[:n], bbuf[:m]) {
			return false, nil
		}
		aend := aerr == io.EOF || aerr == io.ErrUnexpectedEOF
		bend := berr == io.EOF || berr == io.ErrUnexpectedEOF
		switch {
		case aend && bend:
			return true, nil
		case aend || bend:
			return false, nil
		case aerr != nil:
			return false, aerr
		case berr != nil:
			return false, berr
		}
	}
}

func (d *differ) write(ctx context.Context, tw *layer.TarWriter, p string, i *inode) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	if d.skip[i] {
		return nil
	}
	n := i.node
	if i.whiteout {
		n = tree.Node{Mode: tree.ModeChar}
	} else if n.IsDir() && !i.lower && p != "." {
		replaced, err := d.hides(p)
		if err != nil {
			return err
		}
		if replaced {
			n.Xattr = maps.Clone(n.Xattr)
			if n.Xattr == nil {
				n.Xattr = map[string]string{}
			}
			n.Xattr[tree.XattrOpaque] = "y"
		}
	}
	if err := tw.Add(p, n, i.target, i.content.open); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(i.kids)) {
		if err := d.write(ctx, tw, path.Join(p, name), i.kids[name]); err != nil {
			return err
		}
	}
	return nil
}

// hides says whether the base has a directory at p, which a new one there must
// not be merged with.
func (d *differ) hides(p string) (bool, error) {
	n, err := d.c.base.Lstat(p)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return n.IsDir(), err
}
