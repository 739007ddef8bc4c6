package fileop

import (
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/tree"
	"github.com/opencontainers/go-digest"
)

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

// ContentDigest implements tree.Digester as far as the trees below do.
func (c *Changes) ContentDigest(p string) (digest.Digest, error) {
	if i, _ := c.find(p); i != nil {
		return i.content.digest()
	}
	return content{src: c.base, path: p}.digest()
}

// Origin implements tree.Tracer as far as the trees below do.
func (c *Changes) Origin(p string) (tree.Origin, error) {
	if i, inBase := c.find(p); i != nil || !inBase {
		if i == nil {
			return tree.Origin{}, pathError("lstat", p, syscall.ENOENT)
		}
		return i.from, nil
	}
	return tree.OriginOf(c.base, p)
}
