package export

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"time"

	"github.com/kiln-build/kiln/internal/tree"
)

// WriteTar writes a root file system as one tar.
func WriteTar(ctx context.Context, t tree.Tree, w io.Writer) error {
	if err := writeTree(ctx, t, w); err != nil {
		return fmt.Errorf("write files as tar: %w", err)
	}
	return nil
}

// WriteDir writes a root file system below dir, which is made if missing. It
// never follows a link below dir, neither one that was there nor one that it
// made. Owners are set if this process may (root), else the files belong to
// its user, and the setuid and setgid bits are left away. Devices and FIFOs are
// left out and returned; extended attributes are left out.
func WriteDir(ctx context.Context, t tree.Tree, dir string) (skipped []string, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("write files: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("write files: %w", err)
	}
	defer root.Close()
	d := &dirWriter{t: t, root: root, owner: os.Geteuid() == 0, links: map[uint64]string{}}
	if err := tree.Walk(t, ".", func(p string, n tree.Node) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := d.write(p, n); err != nil {
			return fmt.Errorf("write %q: %w", path.Join(dir, p), err)
		}
		return nil
	}); err != nil {
		return nil, err
	}
	// Modes and times of directories last: writing into them needs the one and changes the other.
	for i := len(d.dirs) - 1; i >= 0; i-- {
		if err := d.finish(d.dirs[i].path, d.dirs[i].node); err != nil {
			return nil, fmt.Errorf("write %q: %w", path.Join(dir, d.dirs[i].path), err)
		}
	}
	return d.skipped, nil
}

type dirWriter struct {
	t       tree.Tree
	root    *os.Root
	owner   bool
	links   map[uint64]string
	skipped []string
	dirs    []dirDone
}

// dirDone is a directory whose metadata is to be set at the end.
type dirDone struct {
	path string
	node tree.Node
}

func (d *dirWriter) write(p string, n tree.Node) error {
	if n.IsDir() {
		return d.mkdir(p, n)
	}
	if err := d.root.RemoveAll(p); err != nil {
		return err
	}
	if n.IsRegular() && n.Nlink > 1 && n.Inode != 0 {
		if first, ok := d.links[n.Inode]; ok {
			return d.root.Link(first, p)
		}
		d.links[n.Inode] = p
	}
	switch n.Mode & tree.ModeType {
	case tree.ModeRegular:
		if err := d.copy(p); err != nil {
			return err
		}
	case tree.ModeSymlink:
		target, err := d.t.Readlink(p)
		if err != nil {
			return err
		}
		if err := d.root.Symlink(target, p); err != nil {
			return err
		}
		if d.owner {
			return d.root.Lchown(p, int(n.UID), int(n.GID))
		}
		return nil
	default: // devices, FIFOs: os.Root has no mknod
		d.skipped = append(d.skipped, p)
		return nil
	}
	return d.finish(p, n)
}

func (d *dirWriter) mkdir(p string, n tree.Node) error {
	if p == "." {
		return nil // the directory is the user's own
	}
	fi, err := d.root.Lstat(p)
	if err == nil && !fi.IsDir() {
		if err := d.root.Remove(p); err != nil {
			return err
		}
		err = fs.ErrNotExist
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = d.root.Mkdir(p, 0o700)
	case err == nil && fi.Mode()&0o700 != 0o700: // of an earlier export, maybe
		err = d.root.Chmod(p, 0o700)
	}
	if err != nil {
		return err
	}
	d.dirs = append(d.dirs, dirDone{p, n})
	return nil
}

func (d *dirWriter) copy(p string) error {
	r, err := d.t.Open(p)
	if err != nil {
		return err
	}
	defer r.Close()
	f, err := d.root.OpenFile(p, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}

func (d *dirWriter) finish(p string, n tree.Node) error {
	mode := fs.FileMode(n.Mode & 0o777)
	if d.owner {
		if err := d.root.Lchown(p, int(n.UID), int(n.GID)); err != nil {
			return err
		}
		for bit, m := range map[uint32]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid} {
			if n.Mode&bit != 0 {
				mode |= m
			}
		}
	}
	if n.Mode&0o1000 != 0 {
		mode |= fs.ModeSticky
	}
	if err := d.root.Chmod(p, mode); err != nil {
		return err
	}
	return d.root.Chtimes(p, time.Time{}, n.MTime)
}
