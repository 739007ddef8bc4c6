// Package store keeps content on disk: blobs and layer files by digest, tags,
// and small records by key.
//
// Any number of processes may use one store at once, and each may be killed at
// any moment. This holds because there is one way to change anything: write a
// file of its own under tmp/, and rename it to where it belongs. What is not
// renamed was never there; what is, is whole. There is no index beside the
// files, so there is nothing to repair. Files in tmp/ are locked (flock) by
// the process that writes them, and one that nobody locks is removed by a
// later Open or Prune. docs/design/store.md has the reasons.
//
// Content is verified when it is read, never trusted for being there.
package store

import (
	_ "crypto/sha256" // digest algorithms that images may use
	_ "crypto/sha512"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/opencontainers/go-digest"
)

// layoutVersion is what this program reads and writes. A store of a lower
// version would be converted by Open; one of a higher version is refused.
const layoutVersion = 1

// VersionFile is the first file that a store gets.
const VersionFile = "kiln-store"

// The folders of a store.
const (
	dirBlobs   = "blobs"   // ALGORITHM/HEX
	dirLayers  = "layers"  // ALGORITHM/HEX
	dirTags    = "tags"    // hash of the reference
	dirRecords = "records" // KIND/hash of the key
	dirLocks   = "locks"   // hash of the name
	dirUses    = "uses"    // one locked file for each hold by Use
	dirTmp     = "tmp"     // what is being written
	// dirUnsynced is with what it is for, in unsynced.go.
)

func allDirs() []string {
	return []string{dirBlobs, dirLayers, dirTags, dirRecords, dirUnsynced, dirLocks, dirUses, dirTmp}
}

// Store is an open store. Safe for concurrent use.
type Store struct {
	root string

	mu    sync.Mutex
	since time.Time             // start of the latest Use
	local map[string]*localLock // Lock's queue within this process

	syncing atomic.Int64 // layers on their way to the disk
}

// Open opens the store at root and makes it if there is none. Whatever dead
// processes left half-written is removed. The error is a *diag.Error if the
// directory cannot be used.
func Open(root string) (*Store, error) {
	abs, err := filepath.Abs(root)
	if err != nil {
		return nil, unusable(root, err)
	}
	if err := os.MkdirAll(abs, 0o700); err != nil {
		return nil, unusable(abs, err)
	}
	s := &Store{root: abs, local: map[string]*localLock{}}
	if err := s.checkVersion(); err != nil {
		return nil, err
	}
	for _, d := range allDirs() {
		if err := os.MkdirAll(filepath.Join(abs, d), 0o700); err != nil {
			return nil, unusable(abs, err)
		}
	}
	if err := s.makeGate(); err != nil {
		return nil, unusable(abs, err)
	}
	if err := s.checkOwner(); err != nil {
		return nil, err
	}
	s.sweepTemp()
	s.sweepUnsynced()
	return s, nil
}

// Root is the absolute path of the store.
func (s *Store) Root() string { return s.root }

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.root}, elem...)...)
}

// checkVersion reads the layout version, and writes it into a new store: it
// is the first thing that a store has.
func (s *Store) checkVersion() error {
	for try := 0; ; try++ {
		b, err := os.ReadFile(s.path(VersionFile))
		if err == nil {
			return s.checkVersionText(string(b))
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return unusable(s.root, err)
		}
		err = s.claim()
		if err == nil {
			return nil
		}
		// Another process may have made the store in between.
		if try > 0 {
			return err
		}
	}
}

func (s *Store) checkVersionText(text string) error {
	v, err := strconv.Atoi(strings.TrimSpace(text))
	if err != nil || v < 1 || len(text) > 16 {
		return diag.New(diag.ExitFailure, "open store %q: %s does not name a layout version", s.root, VersionFile).
			WithHint("The directory may not be a store of Kiln, or its disk is damaged: choose another with --root, or remove it.")
	}
	if v > layoutVersion {
		return diag.New(diag.ExitFailure, "open store %q: it has layout version %d, and this kiln knows versions up to %d", s.root, v, layoutVersion).
			WithHint("It was made by a newer kiln: use that one, or choose another directory with --root.")
	}
	return nil
}

// claim makes a store of an empty directory.
func (s *Store) claim() error {
	es, err := os.ReadDir(s.root)
	if err != nil {
		return unusable(s.root, err)
	}
	for _, e := range es {
		// A freshly made volume has lost+found; dot files belong to whoever
		// claims the directory at the same time, or to a volume's driver.
		if e.Name() != "lost+found" && !strings.HasPrefix(e.Name(), ".") {
			return diag.New(diag.ExitFailure, "open store %q: the directory has other files in it (%q) and is not a store of kiln", s.root, e.Name()).
				WithHint("Choose an empty or new directory with --root.")
		}
	}
	f, err := os.CreateTemp(s.root, "."+VersionFile+"-*")
	if err != nil {
		return unusable(s.root, err)
	}
	defer os.Remove(f.Name()) // nothing after the rename
	defer f.Close()
	if _, err := fmt.Fprintf(f, "%d\n", layoutVersion); err != nil {
		return unusable(s.root, err)
	}
	// The one file that cannot be verified when it is read.
	if err := f.Sync(); err != nil {
		return unusable(s.root, err)
	}
	if err := os.Rename(f.Name(), s.path(VersionFile)); err != nil {
		return unusable(s.root, err)
	}
	return nil
}

// checkOwner finds out by doing it whether files can be made and locked, and
// whether they belong to the same user as the store's. (Comparing with the
// user id of the process would fail on file systems that map users.)
func (s *Store) checkOwner() error {
	f, err := s.tempFile("probe")
	if err != nil {
		return unusable(s.root, err)
	}
	defer f.discard()
	mine, err := f.Stat()
	if err != nil {
		return unusable(s.root, err)
	}
	for _, d := range append(allDirs(), VersionFile) {
		fi, err := os.Lstat(s.path(d))
		if err != nil {
			return unusable(s.root, err)
		}
		if fi.Mode()&fs.ModeSymlink != 0 {
			return diag.New(diag.ExitFailure, "open store %q: %s is a symbolic link", s.root, d).
				WithHint("A store is one directory on one disk: link to the whole of it instead.")
		}
		if owner(fi) != owner(mine) {
			return diag.New(diag.ExitFailure, "open store %q: it belongs to user id %d, and this process is user id %d", s.root, owner(fi), os.Geteuid()).
				WithHint("A store has one user: choose another directory with --root or KILN_ROOT, or run as that user.")
		}
	}
	return nil
}

func owner(fi fs.FileInfo) uint32 {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return st.Uid
	}
	return 0
}

// checkDigest returns the path below a folder that content of digest d has.
// Digests come from outside: only a valid one becomes a path.
func checkDigest(d digest.Digest) (string, error) {
	if err := d.Validate(); err != nil {
		return "", fmt.Errorf("digest %q: %w", clip(string(d)), err)
	}
	switch d.Algorithm() {
	case digest.SHA256, digest.SHA384, digest.SHA512:
		return filepath.Join(string(d.Algorithm()), d.Encoded()), nil
	}
	return "", fmt.Errorf("digest %q: %w", clip(string(d)), digest.ErrDigestUnsupported)
}

// clip bounds what of a hostile string gets into a message.
func clip(s string) string {
	if len(s) > 200 {
		return s[:200] + "…"
	}
	return s
}
