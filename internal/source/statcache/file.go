package statcache

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
)

const (
	fileName = "stat-cache"
	lockName = "stat-cache.lock"
)

// load returns the records of the cache in dir, nil if there are none to trust.
func load(dir string) []byte {
	f, err := os.OpenFile(filepath.Join(dir, fileName), os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() || fi.Size() > int64(maxFileSize) {
		return nil
	}
	b := make([]byte, fi.Size())
	if _, err := io.ReadFull(f, b); err != nil {
		return nil
	}
	return parse(b)
}

// Flush writes what was put since the cache was opened, merged into what other
// builds have written meanwhile. It does nothing if there is nothing new. The
// cache stays usable, whatever Flush returns.
func (c *Cache) Flush() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.fresh) == 0 {
		return nil
	}
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return fmt.Errorf("make stat cache: %w", err)
	}
	unlock := lock(filepath.Join(c.dir, lockName))
	defer unlock()
	table := merge(load(c.dir), c.fresh, maxRecords)
	if err := replace(c.dir, table); err != nil {
		return fmt.Errorf("write stat cache: %w", err)
	}
	c.table = table
	clear(c.fresh)
	return nil
}

func replace(dir string, table []byte) error {
	f, err := os.CreateTemp(dir, fileName+".*.tmp")
	if err != nil {
		return err
	}
	_, err = f.Write(header(table))
	if err == nil {
		_, err = f.Write(table)
	}
	// No fsync: a file torn by a crash fails its checksum, and is only a cache.
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, fileName))
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

// lock takes the lock that keeps two builds from losing each other's entries.
// Where there are no locks (some network file systems) entries may be lost, and
// nothing else: the file is replaced atomically anyway.
func lock(name string) (unlock func()) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return func() {}
	}
	for {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
		if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	return func() { _ = f.Close() }
}
