package store

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/internal/diag"
)

// DefaultLimit is what BuildKit allows itself of a disk: 80 percent, but no more than
// 100 GB, and 20 percent are to be free; 10 percent, but no more than 10 GB, it may have in any case.
func (s *Store) DefaultLimit() (Limit, error) {
	size, _, err := s.disk()
	if err != nil {
		return Limit{}, err
	}
	return Limit{
		MaxUsed: min(size/100*80, 100e9), MinFree: size / 100 * 20, Reserved: min(size/100*10, 10e9),
	}, nil
}

// ParseLimit reads a limit: empty is DefaultLimit's, "none" is none, else it is how large
// the store may be, as a size ("20GB") or as a part of its disk ("60%").
func (s *Store) ParseLimit(text string) (Limit, error) {
	switch text {
	case "":
		return s.DefaultLimit()
	case "none":
		return Limit{}, nil
	}
	n, err := s.ParseSize(text)
	return Limit{MaxUsed: n}, err
}

// ParseSize reads a size ("20GB") or a part of the store's disk ("60%"), and returns it in bytes.
func (s *Store) ParseSize(text string) (int64, error) {
	bad := diag.New(diag.ExitUsage, "store limit %q: it is not a size such as 20GB, a part of the disk such as 60%%, or none", clip(text))
	if part, ok := strings.CutSuffix(text, "%"); ok {
		n, err := strconv.Atoi(part)
		if err != nil || n < 1 || n > 100 {
			return 0, bad
		}
		size, _, err := s.disk()
		return size / 100 * int64(n), err
	}
	n, err := units.FromHumanSize(text)
	if err != nil || n < 1 {
		return 0, bad
	}
	return n, nil
}

// disk is the size of the store's disk, and what this user may still fill of it.
func (s *Store) disk() (size, free int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.root, &st); err != nil {
		return 0, 0, fmt.Errorf("measure the store's disk: %w", err)
	}
	return int64(st.Blocks) * st.Bsize, int64(st.Bavail) * st.Bsize, nil //nolint:unconvert // differs by architecture
}

func (s *Store) free() (int64, error) {
	_, free, err := s.disk()
	return free, err
}

// collectEvery is how often a store is measured to see whether it has grown too large.
const collectEvery = time.Minute

// Collect removes what was used longest ago, until the store keeps to a limit. It is
// for after every build: it costs nothing while the disk is empty enough, does
// nothing if another process is at it, and looks at most once a minute.
func (s *Store) Collect(ctx context.Context, l Limit) (PruneReport, error) {
	if l.IsZero() {
		return PruneReport{}, nil
	}
	size, free, err := s.disk()
	if err != nil {
		return PruneReport{}, err
	}
	// Nobody has more of a disk than is used of it.
	used, says := size-free, l.MaxUsed > 0 || l.MinFree > 0
	if used <= l.Reserved || says && (l.MaxUsed == 0 || used <= l.MaxUsed) && free >= l.MinFree {
		return PruneReport{}, nil
	}
	unlock, ok, err := s.TryLock(pruneLock)
	if err != nil || !ok {
		return PruneReport{}, err
	}
	defer unlock()
	if !s.measureNow() {
		return PruneReport{}, nil
	}
	return s.prune(ctx, PruneOptions{Limit: l})
}

// measureNow reports whether the last time that it said so is long enough ago.
func (s *Store) measureNow() bool {
	p := s.path(dirLocks, "collected")
	if fi, err := os.Lstat(p); err == nil && time.Since(fi.ModTime()) < collectEvery && time.Since(fi.ModTime()) >= 0 {
		return false
	}
	f, err := os.OpenFile(p, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return false
	}
	defer f.Close()
	now := time.Now()
	return os.Chtimes(p, now, now) == nil
}
