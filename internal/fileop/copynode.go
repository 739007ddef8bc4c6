package fileop

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/kiln-build/kiln/internal/tree"
)

func (k *copier) onlyDirectory(dst string, n tree.Node, into bool) (created bool, err error) {
	old, err := k.c.lstat(dst)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := k.c.make("mkdir", dst, tree.ModeDir|n.Mode&tree.ModePerm); err != nil {
			return false, fmt.Errorf("failed to mkdir: %w", err)
		}
		return true, nil
	case err != nil:
		return false, err
	case !old.IsDir():
		return false, fmt.Errorf("cannot copy to non-directory: /%s", dst)
	case into:
		d, err := k.c.dir(dst)
		if err != nil {
			return false, err
		}
		d.chmod(n.Mode)
	}
	return false, nil
}

// file copies anything but a directory.
func (k *copier) file(from, dst string, n tree.Node) error {
	old, err := k.c.lstat(dst)
	switch {
	case err == nil && old.IsDir():
		return fmt.Errorf("cannot replace to directory /%s with file", dst)
	case err == nil:
		if err := k.c.remove(dst); err != nil {
			return err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("failed to lstat file target: %w", err)
	}
	switch n.Mode & tree.ModeType {
	case tree.ModeRegular:
		err = k.regular(from, dst, n)
	case tree.ModeSymlink:
		err = k.symlink(from, dst)
	case tree.ModeSocket:
		// A socket becomes an empty file, as with BuildKit.
		_, err = k.c.make("mknod", dst, tree.ModeRegular)
	case tree.ModeChar, tree.ModeBlock, tree.ModeFIFO:
		err = k.c.mknod(dst, n.Mode, n.Major, n.Minor)
	default:
		err = fmt.Errorf("failed to copy /%s: unknown file type %#o", from, n.Mode&tree.ModeType)
	}
	if err != nil {
		return err
	}
	if err := k.info(dst, n); err != nil {
		return err
	}
	i, err := k.c.change(dst)
	if err != nil {
		return err
	}
	i.from, err = tree.OriginOf(k.src, from)
	return err
}

func (k *copier) regular(from, dst string, n tree.Node) error {
	if n.Nlink > 1 && n.Inode != 0 {
		if first, ok := k.links[n.Inode]; ok {
			if err := k.c.link(first, dst); err != nil {
				return fmt.Errorf("failed to create hard link: %w", err)
			}
			return nil
		}
		k.links[n.Inode] = dst
	}
	i, err := k.c.make("open", dst, tree.ModeRegular|0o666)
	if err != nil {
		return fmt.Errorf("failed to copy files: %w", err)
	}
	i.node.Size, i.content = n.Size, content{src: k.src, path: from}
	return nil
}

func (k *copier) symlink(from, dst string) error {
	target, err := k.src.Readlink(from)
	if err != nil {
		return fmt.Errorf("failed to read link: %w", err)
	}
	i, err := k.c.make("symlink", dst, tree.ModeSymlink|0o777)
	if err != nil {
		return fmt.Errorf("failed to create symlink: %w", err)
	}
	i.target = target
	return nil
}

// info gives what is at dst the metadata of n, or that which was asked for.
func (k *copier) info(dst string, n tree.Node) error {
	i, err := k.c.change(dst)
	if err != nil {
		return err
	}
	o := k.own
	if o == nil {
		o = &owner{n.UID, n.GID}
	}
	i.chown(o)
	if !n.IsSymlink() {
		i.chmod(k.perm(n.Mode))
	}
	i.node.MTime = n.MTime
	i.utime(k.utime)
	i.addXattrs(n.Xattr)
	return nil
}

func (k *copier) perm(m uint32) uint32 {
	switch {
	case k.modeSet != nil:
		return fromFileMode(k.modeSet.Apply(toFileMode(m)))
	case k.mode != nil:
		return *k.mode
	}
	return m
}

func (k *copier) timestamp(dst string, n tree.Node) error {
	i, err := k.c.change(dst)
	if err != nil {
		return err
	}
	i.node.MTime = n.MTime
	i.utime(k.utime)
	return nil
}

func toFileMode(m uint32) os.FileMode {
	f := os.FileMode(m & 0o777)
	if m&tree.ModeType == tree.ModeDir {
		f |= os.ModeDir
	}
	if m&0o4000 != 0 {
		f |= os.ModeSetuid
	}
	if m&0o2000 != 0 {
		f |= os.ModeSetgid
	}
	if m&0o1000 != 0 {
		f |= os.ModeSticky
	}
	return f
}

func fromFileMode(f os.FileMode) uint32 {
	m := uint32(f.Perm())
	if f&os.ModeSetuid != 0 {
		m |= 0o4000
	}
	if f&os.ModeSetgid != 0 {
		m |= 0o2000
	}
	if f&os.ModeSticky != 0 {
		m |= 0o1000
	}
	return m
}
