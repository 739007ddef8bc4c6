package local

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/internal/source/statcache"
	"github.com/kiln-build/kiln/internal/tree"
)

// ContentDigest returns the SHA-256 digest of a regular file's content. A file
// that the stat cache knows is not read. From then on, opening the file and
// reading it to its end gives that content, or an error.
func (t *Tree) ContentDigest(p string) (digest.Digest, error) {
	n, sig, err := t.lstat(p)
	if err != nil {
		return "", err
	}
	if !n.IsRegular() {
		return "", fmt.Errorf("digest of %q: not a regular file", short(p))
	}
	t.mu.Lock()
	h, ok := t.seen[p]
	t.mu.Unlock()
	if ok && h.sig == sig {
		return asDigest(h.sum), nil
	}
	sum, ok := t.cached(sig)
	if !ok {
		if sum, sig, err = t.hash(p); err != nil {
			return "", err
		}
	}
	t.mu.Lock()
	t.seen[p] = hashed{sig: sig, sum: sum}
	t.mu.Unlock()
	return asDigest(sum), nil
}

func asDigest(s statcache.Sum) digest.Digest {
	return digest.NewDigestFromBytes(digest.SHA256, s[:])
}

func (t *Tree) cached(sig statcache.Sig) (statcache.Sum, bool) {
	if t.cache == nil {
		return statcache.Sum{}, false
	}
	return t.cache.Get(sig)
}

// hash reads a file, and records its sum if the file was at rest.
func (t *Tree) hash(p string) (sum statcache.Sum, sig statcache.Sig, err error) {
	began := time.Now()
	f, sig, err := t.openFile(p)
	if err != nil {
		return sum, sig, err
	}
	defer f.Close()
	h := sha256.New()
	buf := make([]byte, min(max(sig.Size+1, 512), 256<<10))
	if _, err := io.CopyBuffer(h, struct{ io.Reader }{f}, buf); err != nil {
		return sum, sig, fmt.Errorf("read %q: %w", short(p), reason(err))
	}
	after, err := fileSig(f)
	if err != nil {
		return sum, sig, pathError("read", p, err)
	}
	if !atRest(sig, after) {
		return sum, sig, fmt.Errorf("read %q: %w", short(p), ErrChanged)
	}
	h.Sum(sum[:0])
	if t.cache != nil && sig == after && t.trusted(f) {
		t.cache.Put(sig, sum, began)
	}
	return sum, sig, nil
}

// trusted reports whether a file's change time means what it should. FUSE
// leaves it to whoever wrote the file system, and FAT has none.
func (t *Tree) trusted(f *os.File) bool {
	const exfat = 0x2011bab0
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return false
	}
	switch int64(st.Type) {
	case unix.FUSE_SUPER_MAGIC, unix.MSDOS_SUPER_MAGIC, exfat:
		return false
	}
	return true
}

// Open implements tree.Tree.
func (t *Tree) Open(p string) (io.ReadCloser, error) {
	f, sig, err := t.openFile(p)
	if err != nil {
		return nil, err
	}
	r := &reader{f: f, path: p, sig: sig}
	t.mu.Lock()
	h, ok := t.seen[p]
	t.mu.Unlock()
	if !ok || h.sig == sig {
		return r, nil
	}
	if h.sig.Size != sig.Size {
		f.Close()
		return nil, fmt.Errorf("open %q: %w", short(p), ErrChanged)
	}
	// Touched, at least, since its digest was given: see whether it is the same.
	r.hash, r.want = sha256.New(), h.sum
	return r, nil
}

// openFile opens a regular file. What is no regular file is not opened.
func (t *Tree) openFile(p string) (*os.File, statcache.Sig, error) {
	// Opening a device or a FIFO can have effects, so look before.
	n, _, err := t.lstat(p)
	if err != nil {
		return nil, statcache.Sig{}, err
	}
	if !n.IsRegular() {
		return nil, statcache.Sig{}, fmt.Errorf("open %q: not a regular file", short(p))
	}
	fd, err := t.openPath(p, unix.O_RDONLY)
	if err != nil {
		return nil, statcache.Sig{}, pathError("open", p, err)
	}
	f := os.NewFile(uintptr(fd), p)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		f.Close()
		return nil, statcache.Sig{}, pathError("open", p, err)
	}
	if st.Mode&tree.ModeType != tree.ModeRegular {
		f.Close()
		return nil, statcache.Sig{}, fmt.Errorf("open %q: %w", short(p), ErrChanged)
	}
	return f, sigOf(&st), nil
}

func fileSig(f *os.File) (statcache.Sig, error) {
	var st unix.Stat_t
	err := unix.Fstat(int(f.Fd()), &st)
	return sigOf(&st), err
}

// atRest reports whether a file's content was the same at both times. Links
// and permissions may come and go: they change ctime, but not the content.
func atRest(a, b statcache.Sig) bool {
	return a.Size == b.Size && a.MTime == b.MTime
}

// reader reads a file and sees to it, with the last byte, that it was one
// content from the first: a caller who knows the size may not read on to EOF.
// It is not an io.WriterTo, which would go past that.
type reader struct {
	f       *os.File
	path    string
	sig     statcache.Sig
	pos     int64
	checked bool
	hash    hash.Hash // nil: the file is as it was when its digest was given
	want    statcache.Sum
}

func (r *reader) Read(b []byte) (int, error) {
	n, err := r.f.Read(b)
	r.pos += int64(n)
	if r.hash != nil {
		r.hash.Write(b[:n])
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return n, fmt.Errorf("read %q: %w", short(r.path), reason(err))
	}
	if r.pos > r.sig.Size {
		return n, fmt.Errorf("read %q: %w", short(r.path), ErrChanged)
	}
	if err != nil || r.pos == r.sig.Size {
		if cerr := r.check(); cerr != nil {
			return n, cerr
		}
	}
	return n, err
}

func (r *reader) check() error {
	if r.checked {
		return nil
	}
	r.checked = true
	after, err := fileSig(r.f)
	if err != nil {
		return pathError("read", r.path, err)
	}
	if !atRest(r.sig, after) || r.hash != nil && statcache.Sum(r.hash.Sum(nil)) != r.want {
		return fmt.Errorf("read %q: %w", short(r.path), ErrChanged)
	}
	return nil
}

func (r *reader) Close() error { return r.f.Close() }
