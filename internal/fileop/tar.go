package fileop

import (
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
// base, with the directories that lead to it. A directory of which just the time is
// another is no change, as with BuildKit's overlay differ. A file that was replaced by
// itself is none either: by the same file of the same layer, as in COPY / / of an
// image onto its own base. By another that is equal it is, unlike with BuildKit: whether
// its time is equal, too, depends on when the base was made, and what a COPY makes must
// not depend on whether its base came from a cache.
func (c *Changes) WriteTar(ctx context.Context, w io.Writer) error {
	tw := layer.NewTarWriter(w)
	if c.root != nil {
		d := differ{c: c, skip: map[*inode]bool{}, linked: map[*inode]*linked{}}
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
	if !n.MTime.Equal(i.node.MTime) || max(n.Nlink, 1) != max(i.node.Nlink, 1) {
		return false, nil
	}
	if i.kept {
		return true, nil
	}
	o, err := tree.OriginOf(d.c.base, p)
	return err == nil && o != tree.Origin{} && o == i.from, err
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
