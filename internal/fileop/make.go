package fileop

import (
	"context"
	"errors"
	"io/fs"
	"path"
	"syscall"

	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/tree"
)

// Mkdir makes a directory; one that exists is left as it is.
func (c *Changes) Mkdir(_ context.Context, a MkdirAction) error {
	p, err := rootfs.ResolveNew(c, a.Path, true)
	if err != nil {
		return err
	}
	own, err := resolveOwner(a.Owner)
	if err != nil {
		return err
	}
	if a.MakeParents {
		_, err := c.mkdirAll(p, a.Mode&0o777, own, a.Timestamp)
		return err
	}
	i, err := c.make("mkdir", p, tree.ModeDir|a.Mode&0o777)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	i.chown(own)
	i.utime(a.Timestamp)
	return nil
}

// Mkfile makes a file, in place of what is there unless that is a directory.
func (c *Changes) Mkfile(_ context.Context, a MkfileAction) error {
	p, err := rootfs.ResolveNew(c, path.Join("/", a.Path), true)
	if err != nil {
		return err
	}
	if p == "." {
		return pathError("mkfile", p, syscall.EISDIR)
	}
	own, err := resolveOwner(a.Owner)
	if err != nil {
		return err
	}
	switch old, err := c.lstat(p); {
	case err == nil && old.IsDir():
		return pathError("rename", p, syscall.EEXIST)
	case err == nil:
		if err := c.remove(p); err != nil {
			return err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	i, err := c.make("open", p, tree.ModeRegular|a.Mode&0o777)
	if err != nil {
		return err
	}
	i.node.Size, i.content = int64(len(a.Data)), content{data: a.Data}
	i.chown(own)
	i.utime(a.Timestamp)
	return nil
}

// Symlink makes a symbolic link; it is an error if something is there.
func (c *Changes) Symlink(_ context.Context, a SymlinkAction) error {
	p, err := rootfs.ResolveNew(c, path.Join("/", a.Newpath), true)
	if err != nil {
		return err
	}
	own, err := resolveOwner(a.Owner)
	if err != nil {
		return err
	}
	if a.Oldpath == "" {
		return pathError("symlink", p, syscall.ENOENT)
	}
	i, err := c.make("symlink", p, tree.ModeSymlink|0o777)
	if err != nil {
		return err
	}
	i.target = a.Oldpath
	i.chown(own)
	i.utime(a.Timestamp)
	return nil
}
