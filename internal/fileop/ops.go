package fileop

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"syscall"
	"time"

	"github.com/kiln-build/kiln/internal/tree"
)

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
	at := 0
	for name := range strings.SplitSeq(p, "/") {
		at += len(name)
		k, err := c.kid(i, p[:at], name)
		if err != nil {
			return nil, err
		}
		if !k.node.IsDir() {
			return nil, pathError("lstat", p, syscall.ENOTDIR)
		}
		i, at = k, at+1
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
	k := &inode{node: n, lower: n.IsDir(), kept: !n.IsDir()}
	if !n.IsDir() {
		// One name of a hard-linked file is changed: it is a file of its own
		// from now on, as when overlayfs copies it up.
		k.node.Nlink, k.node.Inode = 1, 0
	}
	switch {
	case n.IsRegular():
		k.content = content{src: c.base, path: p}
	case n.IsSymlink():
		if k.target, err = c.base.Readlink(p); err != nil {
			return nil, err
		}
	}
	i.set(name, k)
	return k, nil
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

// mknod makes a device or pipe.
func (c *Changes) mknod(p string, m, major, minor uint32) error {
	if m&tree.ModeType == tree.ModeChar && major == 0 && minor == 0 {
		return pathError("mknod", p, errors.New("character device 0:0 means a deletion in an image layer, so that no image can have it"))
	}
	i, err := c.make("mknod", p, m)
	if err != nil {
		return fmt.Errorf("failed to create device: %w", err)
	}
	if m&tree.ModeType != tree.ModeFIFO {
		i.node.Major, i.node.Minor = major, minor
	}
	return nil
}

// mkdirAll makes p and the parents that are missing, and says which it made.
func (c *Changes) mkdirAll(p string, perm uint32, own *owner, t *time.Time) ([]string, error) {
	n, err := c.lstat(p)
	if err == nil {
		if n.IsDir() {
			return nil, nil
		}
		return nil, pathError("mkdir", p, syscall.ENOTDIR)
	}
	var created []string
	if p != "." {
		if created, err = c.mkdirAll(path.Dir(p), perm, own, t); err != nil {
			return nil, err
		}
	}
	i, err := c.make("mkdir", p, tree.ModeDir)
	if err != nil {
		return nil, err
	}
	i.chmod(perm)
	i.chown(own)
	i.utime(t)
	return append(created, p), nil
}

// fixParents sets the time of directories that were made again, now that they
// are full.
func (c *Changes) fixParents(dirs []string, t *time.Time) {
	if t == nil {
		return
	}
	for _, d := range dirs {
		if i, err := c.dir(d); err == nil {
			i.node.MTime = *t
		}
	}
}
