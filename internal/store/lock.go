package store

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// flock is flock(2). The lock belongs to the open file, so that it also keeps
// goroutines apart, and it ends with the process, however that ends.
func flock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// localLock is the queue for one name within this process.
type localLock struct {
	turn  chan struct{} // holds one token when free
	users int
}

// Lock waits until nobody else, in this process or another, has the lock of
// that name, and takes it. It is released by unlock or by the end of the
// process. The only error is ctx's or the disk's.
func (s *Store) Lock(ctx context.Context, name string) (unlock func(), err error) {
	leave, err := s.enqueue(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("wait for lock %q: %w", clip(name), err)
	}
	path := s.lockPath(name)
	// Waiting for another process is by asking again: a blocked flock(2)
	// could not be interrupted.
	for wait := time.Millisecond; ; wait = min(wait*2, 50*time.Millisecond) {
		f, err := tryLock(path)
		if err == nil {
			return s.unlocker(f, path, leave), nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, errTaken) {
			leave()
			return nil, s.writing("lock", err)
		}
		select {
		case <-ctx.Done():
			leave()
			return nil, fmt.Errorf("wait for lock %q: %w", clip(name), context.Cause(ctx))
		case <-time.After(wait):
		}
	}
}

// TryLock is Lock for those who have something else to do if somebody has the lock: ok is false then.
func (s *Store) TryLock(name string) (unlock func(), ok bool, err error) {
	leave, ok := s.tryEnqueue(name)
	if !ok {
		return nil, false, nil
	}
	path := s.lockPath(name)
	f, err := tryLock(path)
	switch {
	case err == nil:
		return s.unlocker(f, path, leave), true, nil
	case errors.Is(err, unix.EWOULDBLOCK), errors.Is(err, errTaken):
		leave()
		return nil, false, nil
	}
	leave()
	return nil, false, s.writing("lock", err)
}

func (s *Store) lockPath(name string) string {
	h := sha256.Sum256([]byte(name))
	return s.path(dirLocks, hex.EncodeToString(h[:]))
}

// unlocker is what releases a lock that is held.
func (s *Store) unlocker(f *os.File, path string, leave func()) func() {
	return func() {
		// Whoever waits for the file that goes here finds it
		// unlinked, and makes a new one.
		os.Remove(path)
		f.Close()
		leave()
	}
}

func tryLock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	err = flock(f, unix.LOCK_EX|unix.LOCK_NB)
	if err == nil && !linked(f) {
		err = errTaken
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// join makes this goroutine one of those that want a lock.
func (s *Store) join(name string) *localLock {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.local[name]
	if l == nil {
		l = &localLock{turn: make(chan struct{}, 1)}
		l.turn <- struct{}{}
		s.local[name] = l
	}
	l.users++
	return l
}

func (s *Store) part(name string, l *localLock) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.users--; l.users == 0 {
		delete(s.local, name)
	}
}

// enqueue waits for this goroutine's turn among those of the process.
func (s *Store) enqueue(ctx context.Context, name string) (leave func(), err error) {
	l := s.join(name)
	select {
	case <-ctx.Done():
		s.part(name, l)
		return nil, context.Cause(ctx)
	case <-l.turn:
		return func() { l.turn <- struct{}{}; s.part(name, l) }, nil
	}
}

// tryEnqueue takes the turn if nobody of this process has it.
func (s *Store) tryEnqueue(name string) (leave func(), ok bool) {
	l := s.join(name)
	select {
	case <-l.turn:
		return func() { l.turn <- struct{}{}; s.part(name, l) }, true
	default:
		s.part(name, l)
		return nil, false
	}
}

// Use says that from now until release this process may rely on everything
// it finds in the store or puts there: a Prune, by whatever process, spares
// what was found or put since. It does not wait for anything.
func (s *Store) Use(ctx context.Context) (release func(), err error) {
	for {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		path := s.path(dirUses, rand.Text())
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return nil, s.writing("use", err)
		}
		err = lockNew(f)
		if errors.Is(err, errTaken) {
			f.Close()
			continue
		}
		now := time.Now()
		if err == nil {
			err = os.Chtimes(path, now, now)
		}
		if err != nil {
			os.Remove(path)
			f.Close()
			return nil, s.writing("use", err)
		}
		s.mu.Lock()
		if now.After(s.since) {
			s.since = now
		}
		s.mu.Unlock()
		return func() {
			s.awaitSyncs(500 * time.Millisecond)
			os.Remove(path)
			f.Close()
		}, nil
	}
}

// oldestUse is when the oldest living Use began; zero if there is none.
// What dead processes left of theirs is removed.
func (s *Store) oldestUse() (time.Time, error) {
	es, err := os.ReadDir(s.path(dirUses))
	if err != nil {
		return time.Time{}, err
	}
	var oldest time.Time
	for _, e := range es {
		fi, err := e.Info()
		if err != nil {
			continue // released
		}
		if sweepOne(s.path(dirUses, e.Name()), false) == nil {
			continue
		}
		if oldest.IsZero() || fi.ModTime().Before(oldest) {
			oldest = fi.ModTime()
		}
	}
	return oldest, nil
}

// The gate keeps "is there, and now marked as used" and "was not used, and
// now removed" apart: touch passes it with others, Prune alone.
func (s *Store) gate(how int) (open func(), err error) {
	f, err := os.OpenFile(s.path(dirLocks, "gate"), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err := flock(f, how); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

func (s *Store) makeGate() error {
	f, err := os.OpenFile(s.path(dirLocks, "gate"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

// touch finds the regular file at path and marks it as used now.
func (s *Store) touch(path string) (os.FileInfo, error) {
	fi, err := lstatRegular(path)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	s.mu.Lock()
	since := s.since
	s.mu.Unlock()
	if m := fi.ModTime(); !m.Before(since) && !m.After(now) && now.Sub(m) < time.Hour {
		return fi, nil
	}
	open, err := s.gate(unix.LOCK_SH)
	if err != nil {
		return nil, err
	}
	defer open()
	if fi, err = lstatRegular(path); err != nil {
		return nil, err
	}
	return fi, os.Chtimes(path, now, now)
}

func lstatRegular(path string) (os.FileInfo, error) {
	fi, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%q is not a regular file", path)
	}
	return fi, nil
}
