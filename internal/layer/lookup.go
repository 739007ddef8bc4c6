package layer

import (
	"io/fs"
	"path"
	"strings"

	"github.com/kiln-build/kiln/internal/tree"
)

// dirBlock reads block i of a directory.
func (r *Reader) dirBlock(nid uint64, in *diskInode, i int64, buf []byte) ([]byte, error) {
	off, err := r.span(nid, in)
	if err != nil {
		return nil, err
	}
	at := i << blockBits
	b := buf[:min(blockSize, int64(in.size)-at)]
	return b, readFull(r.f, b, off+at)
}

// find looks a name up in a directory: a binary search over its blocks, then in one.
func (r *Reader) find(nid uint64, dir *diskInode, name string) (uint64, error) {
	p := r.bufs.Get().(*[]byte)
	defer r.bufs.Put(p)
	n := (int64(dir.size) + blockSize - 1) >> blockBits
	lo, hi := int64(0), n // the block is in [lo, hi)
	for lo < hi {
		mid := (lo + hi) / 2
		b, err := r.dirBlock(nid, dir, mid, *p)
		if err != nil {
			return 0, err
		}
		d, err := parseDirents(b)
		if err != nil {
			return 0, err
		}
		child, before, after, err := d.find([]byte(name))
		switch {
		case err != nil && before:
			hi = mid
		case err != nil && after:
			lo = mid + 1
		default:
			return child, err
		}
	}
	return 0, fs.ErrNotExist
}

// place is where a path leads: an inode, or none.
type place struct {
	path string
	nid  uint64
	in   diskInode
	err  error // nil or fs.ErrNotExist
}

// walk finds the inode of a path.
func (r *Reader) walk(p string) (uint64, diskInode, error) {
	if tree.Clean(p) != p { // not fs.ValidPath: names need not be UTF-8
		return 0, diskInode{}, fs.ErrInvalid
	}
	if p == "." {
		in, err := r.inode(rootNid)
		return rootNid, in, err
	}
	dir, base := path.Split(p)
	dir = tree.Clean(dir)
	// One path after another is often in one directory.
	at := r.last.Load()
	if at == nil || at.path != dir {
		at = &place{path: dir}
		if at.nid, at.in, at.err = r.descend(dir); at.err != nil && at.err != fs.ErrNotExist {
			return 0, diskInode{}, at.err
		}
		r.last.Store(at)
	}
	if at.err != nil {
		return 0, diskInode{}, at.err
	}
	return r.step(at.nid, at.in, base)
}

// descend finds the inode of a path from the root.
func (r *Reader) descend(p string) (uint64, diskInode, error) {
	nid := uint64(rootNid)
	in, err := r.inode(nid)
	if p == "." {
		return nid, in, err
	}
	for p != "" && err == nil {
		var c string
		c, p, _ = strings.Cut(p, "/")
		nid, in, err = r.step(nid, in, c)
	}
	return nid, in, err
}

// step finds the entry of a directory. What is no directory has none.
func (r *Reader) step(nid uint64, in diskInode, name string) (uint64, diskInode, error) {
	if in.mode&tree.ModeType != tree.ModeDir {
		return 0, in, fs.ErrNotExist
	}
	next, err := r.find(nid, &in, name)
	if err != nil {
		return 0, in, err
	}
	in, err = r.child(nid, next)
	return next, in, err
}

// child is the inode that an entry of a directory names. A directory comes
// after the one that it is in, so that no walk of a damaged file is without end.
func (r *Reader) child(dir, nid uint64) (diskInode, error) {
	in, err := r.inode(nid)
	if err == nil && nid <= dir && in.mode&tree.ModeType == tree.ModeDir {
		err = damaged("directory %d contains %d", dir, nid)
	}
	return in, err
}
