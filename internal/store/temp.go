package store

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// errTaken says that a sweeper of another process was faster than the lock.
var errTaken = errors.New("swept away")

// tmpFile is a file in tmp/, locked while it is open.
type tmpFile struct {
	*os.File
	done bool
}

// tempFile makes a locked file in tmp/.
func (s *Store) tempFile(kind string) (*tmpFile, error) {
	for {
		f, err := os.OpenFile(s.path(dirTmp, kind+"-"+rand.Text()), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return nil, err
		}
		err = lockNew(f)
		if err == nil {
			return &tmpFile{File: f}, nil
		}
		f.Close()
		if !errors.Is(err, errTaken) {
			os.Remove(f.Name())
			return nil, err
		}
	}
}

// lockNew locks a file that was just made. Between the two a sweeper may have
// taken it for a leftover: then it is gone, and another one is needed.
func lockNew(f *os.File) error {
	if err := flock(f, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return errTaken
		}
		return err
	}
	if !linked(f) {
		return errTaken
	}
	return nil
}

// linked reports whether f is still what its name leads to.
func linked(f *os.File) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Lstat(f.Name())
	return err == nil && os.SameFile(a, b)
}

// commit gives the file its name, for good. It must not be written to any more.
func (f *tmpFile) commit(path string) error {
	if err := f.Chmod(0o400); err != nil {
		return err
	}
	err := os.Rename(f.Name(), path)
	if errors.Is(err, fs.ErrNotExist) {
		// The first of its kind: or Prune has just removed an empty folder.
		if err = os.MkdirAll(filepath.Dir(path), 0o700); err == nil {
			err = os.Rename(f.Name(), path)
		}
	}
	if err != nil {
		return err
	}
	f.done = true
	return nil
}

// discard drops the file unless it was committed, and the lock.
func (f *tmpFile) discard() {
	if !f.done {
		os.Remove(f.Name())
		f.done = true
	}
	f.Close()
}

// TempDir makes a directory on the store's disk for scratch files. cleanup
// removes it with everything in it; if the process dies before, a later Open
// does. name is for whoever looks at the disk.
func (s *Store) TempDir(name string) (dir string, cleanup func(), err error) {
	label := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' {
			return r
		}
		return '-'
	}, strings.ToLower(name))
	label = label[:min(len(label), 40)]
	for {
		top := s.path(dirTmp, "dir-"+label+"-"+rand.Text())
		f, err := lockedDir(top)
		if errors.Is(err, errTaken) {
			continue
		}
		if err != nil {
			return "", nil, s.writing("temporary directory", err)
		}
		dir := filepath.Join(top, "d")
		if err := os.Mkdir(dir, 0o700); err != nil {
			f.Close()
			return "", nil, s.writing("temporary directory", err)
		}
		return dir, func() {
			removeTree(top) // what cannot be removed now may be by a later sweep
			f.Close()
		}, nil
	}
}

// lockedDir makes a directory with a locked file in it.
func lockedDir(top string) (*os.File, error) {
	if err := os.Mkdir(top, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(top, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errTaken
	}
	if err != nil {
		return nil, err
	}
	if err := lockNew(f); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// sweepTemp removes what no living process holds. Failing to is no error:
// a later sweep will try again.
func (s *Store) sweepTemp() (n int, bytes int64) {
	es, err := os.ReadDir(s.path(dirTmp))
	if err != nil {
		return 0, 0
	}
	for _, e := range es {
		p := s.path(dirTmp, e.Name())
		size := treeSize(p)
		if err := sweepOne(p, e.IsDir()); err == nil {
			n, bytes = n+1, bytes+size
		}
	}
	return n, bytes
}

func sweepOne(p string, isDir bool) error {
	lock, flags := p, os.O_RDWR // which is what NFS needs to lock
	if isDir {
		lock, flags = filepath.Join(p, "lock"), os.O_RDWR|os.O_CREATE
	}
	const safe = unix.O_NOFOLLOW | unix.O_NONBLOCK
	f, err := os.OpenFile(lock, flags|safe, 0o600)
	if errors.Is(err, fs.ErrPermission) && !isDir {
		f, err = os.OpenFile(lock, os.O_RDONLY|safe, 0)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := flock(f, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return err
	}
	return removeTree(p)
}

// removeTree is os.RemoveAll also for directories without permissions, as
// hostile archives and build steps may leave them.
func removeTree(p string) error {
	err := os.RemoveAll(p)
	if err == nil {
		return nil
	}
	_ = filepath.WalkDir(p, func(q string, d fs.DirEntry, err error) error {
		if d != nil && d.IsDir() {
			_ = os.Chmod(q, 0o700)
		}
		return nil
	})
	if err = os.RemoveAll(p); err != nil {
		return fmt.Errorf("remove %q: %w", p, err)
	}
	return nil
}

// treeSize is what a file, or all files of a directory, take on disk.
func treeSize(p string) (bytes int64) {
	_ = filepath.WalkDir(p, func(q string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if fi, err := d.Info(); err == nil {
			bytes += allocated(fi)
		}
		return nil
	})
	return bytes
}
