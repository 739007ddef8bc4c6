package store

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// A blob is verified whenever it is read, a record too, so that neither needs
// to be forced to the disk: what a power failure tore is found missing. A
// layer file is mapped into memory and read here and there; verifying it would
// cost more than making it. So a layer is committed without waiting for the
// disk, with a marker beside it that names the boot of the machine; it is
// written out in the background, and the marker goes. A marker of an earlier
// boot means that the machine went down in between: that layer is removed.

const dirUnsynced = "unsynced"

func (s *Store) markerPath(d digest.Digest) string {
	return s.path(dirUnsynced, string(d.Algorithm())+"-"+d.Encoded())
}

// bootID names this boot of the machine; empty if that cannot be known.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil || len(b) > 128 {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// commitUnsynced commits a layer file and has it written out.
func (s *Store) commitUnsynced(f *tmpFile, d digest.Digest) error {
	boot := bootID()
	if boot == "" {
		if err := f.Sync(); err != nil {
			return err
		}
		return f.commit(s.LayerPath(d))
	}
	m, err := s.tempFile("marker")
	if err != nil {
		return err
	}
	defer m.discard()
	if _, err := m.WriteString(boot); err != nil {
		return err
	}
	open, err := s.gate(unix.LOCK_SH)
	if err != nil {
		return err
	}
	defer open()
	// The marker first: file systems keep the order of renames.
	if err := m.commit(s.markerPath(d)); err != nil {
		return err
	}
	if err := f.commit(s.LayerPath(d)); err != nil {
		return err
	}
	s.startSync(d)
	return nil
}

// startSync writes a layer out in the background and removes its marker.
func (s *Store) startSync(d digest.Digest) {
	s.syncing.Add(1)
	go func() {
		defer s.syncing.Add(-1)
		f, err := os.Open(s.LayerPath(d))
		if err == nil {
			defer f.Close()
			// First the data alone: fdatasync of much unwritten data holds
			// up the whole file system's journal.
			_ = unix.SyncFileRange(int(f.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
			if unix.Fdatasync(int(f.Fd())) != nil {
				return
			}
		} else if !errors.Is(err, fs.ErrNotExist) {
			return
		}
		open, gerr := s.gate(unix.LOCK_EX)
		if gerr != nil {
			return
		}
		defer open()
		// Another file for the same layer may have come, not synced yet.
		if err != nil && exists(s.LayerPath(d)) || err == nil && !linked(f) {
			return
		}
		os.Remove(s.markerPath(d))
	}()
}

func exists(p string) bool {
	_, err := os.Lstat(p)
	return err == nil
}

// awaitSyncs gives what is being written out a little more time.
func (s *Store) awaitSyncs(limit time.Duration) {
	for end := time.Now().Add(limit); s.syncing.Load() > 0 && time.Now().Before(end); {
		time.Sleep(2 * time.Millisecond)
	}
}

// sweepUnsynced removes layers that were not on the disk when the machine
// went down, and goes on with those whose process ended too early.
func (s *Store) sweepUnsynced() {
	es, err := os.ReadDir(s.path(dirUnsynced))
	if err != nil || len(es) == 0 {
		return
	}
	boot := bootID()
	for _, e := range es {
		algo, hex, _ := strings.Cut(e.Name(), "-")
		d := digest.NewDigestFromEncoded(digest.Algorithm(algo), hex)
		if _, err := checkDigest(d); err != nil {
			os.Remove(s.path(dirUnsynced, e.Name()))
			continue
		}
		if s.markerBoot(d) == boot {
			s.startSync(d)
			continue
		}
		// On a volume that several machines share at once, a marker of
		// another boot may be another machine's, which is alive.
		if t, err := s.oldestUse(); err != nil || !t.IsZero() {
			return
		}
		s.dropUnsynced(d, boot)
	}
}

func (s *Store) markerBoot(d digest.Digest) string {
	b, _ := os.ReadFile(filepath.Clean(s.markerPath(d)))
	return string(b)
}

func (s *Store) dropUnsynced(d digest.Digest, boot string) {
	open, err := s.gate(unix.LOCK_EX)
	if err != nil {
		return
	}
	defer open()
	if exists(s.markerPath(d)) && s.markerBoot(d) != boot {
		os.Remove(s.LayerPath(d))
		os.Remove(s.markerPath(d))
	}
}
