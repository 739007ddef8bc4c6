package fileop

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/tree"
	"github.com/opencontainers/go-digest"
)

// ContentDigester is what a tree.Tree may implement to give the SHA-256 of a
// regular file's content without reading it. errors.ErrUnsupported means that it
// cannot for this one.
type ContentDigester interface {
	ContentDigest(path string) (digest.Digest, error)
}

// Options of Changes. The zero value can do all but unpack archives.
type Options struct {
	// Now is the modification time of what is created without one and of
	// directories in which something changes. Zero: the time of New.
	Now time.Time
	// Dir is a directory on disk for the content of unpacked archives; the file in it
	// is unlinked at once.
	Dir string
	// Limits on what archives may hold.
	Limits Limits
}

// Changes is a tree with changes on top of a base. It implements tree.Tree: the
// merged view. Methods that change it must not run at the same time as any other
// method; those that read are safe for concurrent use among themselves.
//
// After an action failed, the Changes have part of it: they are to be dropped.
type Changes struct {
	base   tree.Tree
	opt    Options
	root   *inode
	inodes uint64 // numbers given to hard-linked files so far
	spool  *spool
}

// inode is a file or directory that was made or changed.
type inode struct {
	// node.Nlink counts the names here; node.Inode is set with the second.
	node tree.Node
	// whiteout: not an inode at all; the name is gone from the base.
	whiteout bool
	target   string // symbolic link
	content  content
	// Directories: the names changed in it, and whether those of the base's
	// directory of the same path show through.
	kids  map[string]*inode
	lower bool
}

// content is where a regular file's bytes are.
type content struct {
	src  tree.Tree // with path; or
	path string
	kept bool // it is that of the base's file of the same path

	spool    *spool // with at and size; or
	at, size int64

	data []byte
}

func (c content) open() (io.ReadCloser, error) {
	switch {
	case c.src != nil:
		return c.src.Open(c.path)
	case c.spool != nil:
		return c.spool.open(c.at, c.size)
	}
	return io.NopCloser(bytes.NewReader(c.data)), nil
}

// digest is ContentDigester's.
func (c content) digest() (digest.Digest, error) {
	if c.src == nil && c.spool == nil {
		return digest.FromBytes(c.data), nil
	}
	if d, ok := c.src.(ContentDigester); ok {
		return d.ContentDigest(c.path)
	}
	return "", errors.ErrUnsupported
}

// own marks inode numbers that Changes gave; those of a base have it clear.
const own = 1 << 63

// New returns no changes yet on base; nil is an empty base.
func New(base tree.Tree, opt Options) *Changes {
	if base == nil {
		base = rootfs.New()
	}
	if opt.Now.IsZero() {
		opt.Now = time.Now()
	}
	c := &Changes{base: base, opt: opt, spool: &spool{users: 1}}
	if b, ok := base.(*Changes); ok {
		c.inodes = b.inodes
	}
	return c
}

// Clone returns a copy that can be changed on its own: an action's result can
// be the input of two others. Both are to be closed.
func (c *Changes) Clone() *Changes {
	n := *c
	n.spool.share()
	seen := map[*inode]*inode{}
	if c.root != nil {
		n.root = c.root.clone(seen)
	}
	return &n
}

func (i *inode) clone(seen map[*inode]*inode) *inode {
	if n, ok := seen[i]; ok {
		return n
	}
	n := *i
	if i.node.Nlink > 1 {
		seen[i] = &n
	}
	if i.kids != nil {
		n.kids = make(map[string]*inode, len(i.kids))
		for k, v := range i.kids {
			n.kids[k] = v.clone(seen)
		}
	}
	return &n
}

// Close frees the scratch file; to be called once. What came from archives cannot
// be read afterwards.
func (c *Changes) Close() error { return c.spool.release() }

func pathError(op, p string, err error) error {
	return &fs.PathError{Op: op, Path: path.Clean("/" + p), Err: err}
}

// find returns the inode of p, or nil if it is not changed and the base has it or
// not: inBase tells which to ask.
func (c *Changes) find(p string) (i *inode, inBase bool) {
	if c.root == nil {
		return nil, true
	}
	i = c.root
	if p == "." {
		return i, true
	}
	for rest := p; rest != ""; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		if i.kids[name] == nil {
			return nil, i.node.IsDir() && i.lower
		}
		if i = i.kids[name]; i.whiteout {
			return nil, false
		}
	}
	return i, false
}

// Lstat implements tree.Tree.
func (c *Changes) Lstat(p string) (tree.Node, error) {
	if tree.Clean(p) != p {
		return tree.Node{}, &fs.PathError{Op: "lstat", Path: p, Err: fs.ErrInvalid}
	}
	i, inBase := c.find(p)
	switch {
	case i != nil:
		return i.node, nil
	case inBase:
		return c.base.Lstat(p)
	}
	return tree.Node{}, pathError("lstat", p, syscall.ENOENT)
}

// ReadDir implements tree.Tree.
func (c *Changes) ReadDir(p string) ([]tree.Entry, error) {
	n, err := c.Lstat(p)
	if err != nil {
		return nil, err
	}
	if !n.IsDir() {
		return nil, pathError("readdir", p, syscall.ENOTDIR)
	}
	i, _ := c.find(p)
	if i == nil {
		return c.base.ReadDir(p)
	}
	var out []tree.Entry
	if i.lower {
		es, err := c.base.ReadDir(p)
		if err != nil {
			return nil, err
		}
		for _, e := range es {
			if i.kids[e.Name] == nil {
				out = append(out, e)
			}
		}
	}
	for name, k := range i.kids {
		if !k.whiteout {
			out = append(out, tree.Entry{Name: name, Node: k.node})
		}
	}
	slices.SortFunc(out, func(a, b tree.Entry) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// Readlink implements tree.Tree.
func (c *Changes) Readlink(p string) (string, error) {
	n, err := c.Lstat(p)
	if err != nil {
		return "", err
	}
	if !n.IsSymlink() {
		return "", pathError("readlink", p, syscall.EINVAL)
	}
	if i, _ := c.find(p); i != nil {
		return i.target, nil
	}
	return c.base.Readlink(p)
}

// Open implements tree.Tree.
func (c *Changes) Open(p string) (io.ReadCloser, error) {
	n, err := c.Lstat(p)
	if err != nil {
		return nil, err
	}
	if !n.IsRegular() {
		return nil, pathError("open", p, syscall.EINVAL)
	}
	if i, _ := c.find(p); i != nil {
		return i.content.open()
	}
	return c.base.Open(p)
}

// ContentDigest implements ContentDigester as far as the trees below do.
func (c *Changes) ContentDigest(p string) (digest.Digest, error) {
	if i, _ := c.find(p); i != nil {
		return i.content.digest()
	}
	return content{src: c.base, path: p}.digest()
}

// lstat is Lstat as a system call would do it: a path below something that is
// no directory is ENOTDIR.
func (c *Changes) lstat(p string) (tree.Node, error) {
	n, err := c.Lstat(p)
	if !errors.Is(err, fs.ErrNotExist) {
		return n, err
	}
	for d := p; d != "."; {
		d = path.Dir(d)
		up, uerr := c.Lstat(d)
		if uerr == nil && !up.IsDir() {
			return n, pathError("lstat", p, syscall.ENOTDIR)
		}
		if uerr == nil {
			break
		}
	}
	return n, pathError("lstat", p, syscall.ENOENT)
}

// dir returns the inode of the directory p, made from the base's if it was
// not changed before.
func (c *Changes) dir(p string) (*inode, error) {
	if c.root == nil {
		n, err := c.base.Lstat(".")
		if err != nil {
			return nil, fmt.Errorf("stat root: %w", err)
		}
		c.root = &inode{node: n, lower: true}
	}
	i := c.root
	if p == "." {
		return i, nil
	}
	at := ""
	for name := range strings.SplitSeq(p, "/") {
		at = path.Join(at, name)
		k, err := c.kid(i, at, name)
		if err != nil {
			return nil, err
		}
		if !k.node.IsDir() {
			return nil, pathError("lstat", p, syscall.ENOTDIR)
		}
		i = k
	}
	return i, nil
}

// kid returns the inode of name in the directory i, made from the base's.
func (c *Changes) kid(i *inode, p, name string) (*inode, error) {
	if k := i.kids[name]; k != nil {
		if k.whiteout {
			return nil, pathError("lstat", p, syscall.ENOENT)
		}
		return k, nil
	}
	if !i.lower {
		return nil, pathError("lstat", p, syscall.ENOENT)
	}
	n, err := c.base.Lstat(p)
	if err != nil {
		return nil, err
	}
	k := &inode{node: n, lower: n.IsDir()}
	if !n.IsDir() {
		// One name of a hard-linked file is changed: it is a file of its own
		// from now on, as when overlayfs copies it up.
		k.node.Nlink, k.node.Inode = 1, 0
	}
	switch {
	case n.IsRegular():
		k.content = content{src: c.base, path: p, kept: true}
	case n.IsSymlink():
		if k.target, err = c.base.Readlink(p); err != nil {
			return nil, err
		}
	}
	i.set(name, k)
	return k, nil
}

func (i *inode) set(name string, k *inode) {
	if i.kids == nil {
		i.kids = map[string]*inode{}
	}
	i.kids[name] = k
}

// change returns the inode of p to be changed.
func (c *Changes) change(p string) (*inode, error) {
	if p == "." {
		return c.dir(".")
	}
	d, err := c.dir(path.Dir(p))
	if err != nil {
		return nil, err
	}
	return c.kid(d, p, path.Base(p))
}

// Linux's limits on names and paths.
const (
	nameMax = 255
	pathMax = 4096
)

// add makes a name for k, which must not exist.
func (c *Changes) add(op, p string, k *inode) error {
	name := path.Base(p)
	if len(name) > nameMax || len(p) >= pathMax {
		return pathError(op, p, syscall.ENAMETOOLONG)
	}
	if strings.HasPrefix(name, ".wh.") {
		return pathError(op, p, errors.New(`a name that begins with ".wh." means a deletion in an image layer, so that no image can have such a file`))
	}
	if _, err := c.lstat(p); err == nil {
		return pathError(op, p, syscall.EEXIST)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	d, err := c.dir(path.Dir(p))
	if err != nil {
		return err
	}
	d.set(name, k)
	d.node.MTime = c.opt.Now
	return nil
}

// newInode is a new inode as the kernel makes it in the directory of p: owned by
// root, but with the group of a directory that has the setgid bit.
func (c *Changes) newInode(p string, mode uint32) (*inode, error) {
	k := &inode{node: tree.Node{Mode: mode, MTime: c.opt.Now, Nlink: 1}}
	up, err := c.lstat(path.Dir(p))
	if err != nil {
		return nil, err
	}
	if up.Mode&0o2000 != 0 {
		k.node.GID = up.GID
		if k.node.IsDir() {
			k.node.Mode |= 0o2000
		}
	}
	return k, nil
}

// make adds a new inode of a type that is in mode.
func (c *Changes) make(op, p string, mode uint32) (*inode, error) {
	if p == "." {
		return nil, pathError(op, p, syscall.EEXIST)
	}
	k, err := c.newInode(p, mode)
	if err != nil {
		return nil, err
	}
	return k, c.add(op, p, k)
}

// link makes another name for the file at old.
func (c *Changes) link(old, p string) error {
	if _, err := c.lstat(old); err != nil {
		return err
	}
	k, err := c.change(old)
	if err != nil {
		return err
	}
	if k.node.IsDir() {
		return pathError("link", p, syscall.EPERM)
	}
	if err := c.add("link", p, k); err != nil {
		return err
	}
	if k.node.Inode == 0 {
		c.inodes++
		k.node.Inode = own | c.inodes
	}
	k.node.Nlink = max(k.node.Nlink, 1) + 1
	return nil
}

// remove removes p and all below it; it need not exist.
func (c *Changes) remove(p string) error {
	if p == "." {
		return pathError("remove", p, syscall.EBUSY)
	}
	if _, err := c.lstat(p); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	d, err := c.dir(path.Dir(p))
	if err != nil {
		return err
	}
	name := path.Base(p)
	if k := d.kids[name]; k != nil {
		k.unlink()
	}
	delete(d.kids, name)
	if d.lower {
		if _, err := c.base.Lstat(p); err == nil {
			d.set(name, &inode{whiteout: true})
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	d.node.MTime = c.opt.Now
	return nil
}

// unlink takes one name from i, and those below from what is there.
func (i *inode) unlink() {
	if i.node.Nlink > 1 {
		i.node.Nlink--
	}
	for _, k := range i.kids {
		k.unlink()
	}
}

// chown gives i to o; as on Linux, a file loses its capabilities.
func (i *inode) chown(o *owner) {
	if o == nil {
		return
	}
	i.node.UID, i.node.GID = o.uid, o.gid
	const capability = "security.capability"
	if _, ok := i.node.Xattr[capability]; ok && i.node.IsRegular() {
		i.node.Xattr = maps.Clone(i.node.Xattr)
		delete(i.node.Xattr, capability)
	}
}

func (i *inode) chmod(perm uint32) {
	i.node.Mode = i.node.Mode&tree.ModeType | perm&tree.ModePerm
}

// utime sets the modification time if there is one.
func (i *inode) utime(t *time.Time) {
	if t != nil {
		i.node.MTime = *t
	}
}

// addXattrs adds those of x that belong into an image.
func (i *inode) addXattrs(x map[string]string) {
	kept := copiedXattrs(x)
	if len(kept) == 0 {
		return
	}
	if len(i.node.Xattr) > 0 {
		m := maps.Clone(i.node.Xattr)
		maps.Copy(m, kept)
		kept = m
	}
	i.node.Xattr = kept
}

// copiedXattrs are the extended attributes that a copy takes along: all, but
// overlayfs's own and the labels of the host's security modules.
func copiedXattrs(x map[string]string) map[string]string {
	var out map[string]string
	for k, v := range x {
		if strings.HasPrefix(k, "trusted.overlay.") ||
			strings.HasPrefix(k, "security.") && k != "security.capability" {
			continue
		}
		if out == nil {
			out = make(map[string]string, len(x))
		}
		out[k] = v
	}
	return out
}
