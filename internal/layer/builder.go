package layer

import (
	"errors"
	"fmt"
	"strings"

	"github.com/kiln-build/kiln/internal/tree"
)

// builder is the layer's tree while Convert reads its tar: all metadata, no content.
type builder struct {
	root *inode
	lim  Limits
	// made counts all names ever made, replaced ones too: it bounds memory.
	made    int
	names   int64 // bytes of names and targets ever made
	xattrs  map[string]*xattrSet
	xattrSz int64
	pending []pendingLink
	stack   []*inode
	plain   bool // names have no meaning but as names
}

// inode is one file. Names are in the directories that have it.
type inode struct {
	mtime  int64
	size   int64
	nid    uint64
	nsec   uint32
	uid    uint32
	gid    uint32
	nlink  uint32
	block  uint32 // first data block, or a device's number
	mode   uint16
	layout uint8
	flags  uint8
	xattrs *xattrSet
	dir    *directory // directories only
	target string     // of a symbolic link; of a pending hard link
}

const (
	flagImplied = 1 << iota // directory without an entry of its own
	flagOpaque
	flagPending // stands for a hard link whose target has not come yet
)

type directory struct {
	kids   map[string]*inode
	sorted []dirent // set by the image writer, which drops kids
	plen   uint16   // length of its path
}

type dirent struct {
	name string
	in   *inode
}

type pendingLink struct {
	entry string // as the tar has it
	dir   *inode
	name  string
	in    *inode
}

func newBuilder(lim Limits) *builder {
	b := &builder{lim: lim, xattrs: map[string]*xattrSet{}}
	b.root = &inode{mode: tree.ModeDir | 0o755, dir: &directory{}}
	return b
}

func (in *inode) isDir() bool { return in.mode&tree.ModeType == tree.ModeDir }

func (in *inode) isWhiteout() bool { return in.mode&tree.ModeType == tree.ModeChar && in.block == 0 }

// maxLinks is how many symbolic links a path may have on its way, as in Linux.
const maxLinks = 40

var (
	errNotDir  = errors.New("a parent is not a directory")
	errMissing = errors.New("no such entry in this layer")
)

// lookupDir resolves p within the layer. Symbolic links are followed as if the
// layer were a root file system of its own, as containerd does. With create,
// directories that are missing are made.
func (b *builder) lookupDir(p string, create bool) (*inode, error) {
	b.stack = append(b.stack[:0], b.root)
	for links := 0; p != ""; {
		var c string
		c, p, _ = strings.Cut(p, "/")
		cur := b.stack[len(b.stack)-1]
		switch c {
		case "", ".":
			continue
		case "..":
			b.stack = b.stack[:max(1, len(b.stack)-1)]
			continue
		}
		next := cur.dir.kids[c]
		if next != nil && next.mode&tree.ModeType == tree.ModeSymlink {
			if links++; links > maxLinks {
				return nil, errors.New("too many symbolic links")
			}
			if strings.HasPrefix(next.target, "/") {
				b.stack = b.stack[:1]
			}
			if p = next.target + "/" + p; len(p) > 4*maxPath {
				return nil, errors.New("path is too long")
			}
			continue
		}
		if next == nil || next.isWhiteout() {
			if !create {
				return nil, errMissing
			}
			if err := b.checkComponent(c); err != nil {
				return nil, err
			}
			d := &inode{mode: tree.ModeDir | 0o755, flags: flagImplied, dir: &directory{}}
			if err := b.put(cur, c, d); err != nil {
				return nil, err
			}
			next = d
		}
		if !next.isDir() {
			return nil, errNotDir
		}
		b.stack = append(b.stack, next)
	}
	return b.stack[len(b.stack)-1], nil
}

// put makes in the directory's entry of that name. What was there decides
// together with in what comes out: the last one wins, a directory is merged
// into a directory, and a whiteout hides lower layers only, in either order.
func (b *builder) put(dir *inode, name string, in *inode) error {
	d := dir.dir
	plen := int(d.plen) + 1 + len(name)
	if plen > maxPath {
		return fmt.Errorf("path is longer than %d bytes", maxPath)
	}
	if b.made++; b.made > b.lim.MaxEntries {
		return &LimitError{Name: "MaxEntries", What: "entries in the layer", Max: int64(b.lim.MaxEntries)}
	}
	if b.names += int64(len(name) + len(in.target)); b.names > b.lim.MaxNameBytes {
		return &LimitError{Name: "MaxNameBytes", What: "bytes of names and link targets", Max: b.lim.MaxNameBytes}
	}
	old := d.kids[name]
	switch {
	case old == nil:
	case in.isWhiteout():
		if old.isDir() {
			old.flags |= flagOpaque
		}
		return nil
	case in.isDir() && old.isDir():
		old.mtime, old.nsec, old.uid, old.gid, old.mode = in.mtime, in.nsec, in.uid, in.gid, in.mode
		old.flags = old.flags&^flagImplied | in.flags
		return b.mergeXattrs(old, in.xattrs)
	case in.isDir() && old.isWhiteout():
		in.flags |= flagOpaque
	}
	if in.dir != nil {
		in.dir.plen = uint16(plen)
	}
	if d.kids == nil {
		d.kids = map[string]*inode{}
	}
	d.kids[strings.Clone(name)] = in // name is part of a longer string
	return nil
}

// link makes name another name of what target is, now or, if there is no such
// thing yet, when all entries have been read. meta is the metadata of the
// link's own entry, which the file takes over, as when containerd applies it.
func (b *builder) link(entry string, dir *inode, name, target string, meta *inode) error {
	tdir, tname, in, err := b.lookupTarget(target)
	if err != nil && !errors.Is(err, errMissing) && !errors.Is(err, errNotDir) {
		return err
	}
	if err != nil || in.flags&flagPending != 0 {
		in = &inode{flags: flagPending, target: target}
		b.names += int64(len(entry))
		b.pending = append(b.pending, pendingLink{entry, dir, name, in})
		return b.put(dir, name, in)
	}
	if tdir == dir && tname == name {
		return errors.New("hard link to itself")
	}
	if err := linkable(in); err != nil {
		return err
	}
	if err := b.mergeXattrs(in, meta.xattrs); err != nil {
		return err
	}
	in.mtime, in.nsec, in.uid, in.gid = meta.mtime, meta.nsec, meta.uid, meta.gid
	in.mode = in.mode&tree.ModeType | meta.mode&tree.ModePerm
	return b.put(dir, name, in)
}

func linkable(in *inode) error {
	if in.isDir() {
		return errors.New("hard link to a directory")
	}
	if in.isWhiteout() {
		return errMissing
	}
	return nil
}

// lookupTarget finds what a hard link names; a symbolic link at its end is not followed.
func (b *builder) lookupTarget(target string) (dir *inode, base string, in *inode, err error) {
	parent, base, kind, err := b.parseName(target)
	if err != nil {
		return nil, "", nil, err
	}
	if kind != kindNode {
		return nil, "", nil, errMissing
	}
	dir, err = b.lookupDir(parent, false)
	if err != nil {
		return nil, "", nil, err
	}
	in = dir.dir.kids[base]
	if in == nil || in.isWhiteout() {
		return nil, "", nil, errMissing
	}
	return dir, base, in, nil
}

// resolvePending gives the hard links that came before their target to what it is now.
func (b *builder) resolvePending() error {
	for i := range b.pending {
		if err := b.resolveChain(&b.pending[i]); err != nil {
			return err
		}
	}
	b.pending = nil
	return nil
}

// resolveChain resolves one pending link, through other pending links.
func (b *builder) resolveChain(l *pendingLink) error {
	if l.dir.dir.kids[l.name] != l.in {
		return nil // replaced by a later entry
	}
	in, err := l.in, error(nil)
	for steps := 0; in.flags&flagPending != 0; steps++ {
		if steps > maxLinks {
			err = errors.New("too many hard links that lead to each other")
		} else {
			_, _, in, err = b.lookupTarget(in.target)
		}
		if err == nil && in.flags&flagPending == 0 {
			err = linkable(in)
		}
		if err != nil {
			return fmt.Errorf("entry %q: hard link to %q: %w", l.entry, l.in.target, err)
		}
	}
	l.dir.dir.kids[l.name] = in
	return nil
}

// internXattrs returns the one set that has these attributes.
func (b *builder) internXattrs(m map[string]string) (*xattrSet, error) {
	if len(m) == 0 {
		return nil, nil
	}
	enc := encodeXattrs(m)
	if s := b.xattrs[enc]; s != nil {
		return s, nil
	}
	if len(enc) > maxXattrs {
		return nil, fmt.Errorf("extended attributes have %d bytes, more than %d", len(enc), maxXattrs)
	}
	if b.xattrSz += int64(len(enc)); b.xattrSz > b.lim.MaxXattrBytes {
		return nil, &LimitError{Name: "MaxXattrBytes", What: "bytes of extended attributes", Max: b.lim.MaxXattrBytes}
	}
	s := &xattrSet{enc: enc}
	b.xattrs[enc] = s
	return s, nil
}

func (b *builder) mergeXattrs(in *inode, add *xattrSet) error {
	if add == nil || in.xattrs == add {
		return nil
	}
	if in.xattrs == nil {
		in.xattrs = add
		return nil
	}
	m := in.xattrs.decode()
	for k, v := range add.decode() {
		m[k] = v
	}
	s, err := b.internXattrs(m)
	in.xattrs = s
	return err
}
