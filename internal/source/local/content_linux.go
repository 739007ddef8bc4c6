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
	st, err := t.stat(p)
	if err != nil {
		return "", err
	}
	if st.Mode&tree.ModeType != tree.ModeRegular {
		return "", fmt.Errorf("digest of %q: not a regular file", short(p))
	}
	sig := sigOf(&st)
	t.mu.Lock()
	h, ok := t.seen[p]
	t.mu.Unlock()
	if ok && h.sig == sig {
		return asDigest(h.sum), nil
	}
	h = hashed{sig: sig, settled: true}
	if h.sum, ok = t.cached(sig); !ok {
		if h, err = t.hash(p); err != nil {
			return "", err
		}
	}
	t.mu.Lock()
	t.seen[p] = h
	t.mu.Unlock()
	return asDigest(h.sum), nil
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
func (t *Tree) hash(p string) (hashed, error) {
	began := time.Now()
	f, sig, err := t.openFile(p)
	if err != nil {
		return hashed{}, err
	}
	defer f.Close()
	w := sha256.New()
	buf := make([]byte, min(max(sig.Size+1, 512), 256<<10))
	if _, err := io.CopyBuffer(w, struct{ io.Reader }{f}, buf); err != nil {
		return hashed{}, fmt.Errorf("read %q: %w", short(p), reason(err))
	}
	after, err := fileSig(f)
	if err != nil {
		return hashed{}, pathError("read", p, err)
	}
	if !atRest(sig, after) {
		return hashed{}, fmt.Errorf("read %q: %w", short(p), ErrChanged)
	}
	h := hashed{sig: sig, settled: sig == after && sig.Settled(began) && t.trusted(f)}
	w.Sum(h.sum[:0])
	if t.cache != nil && h.settled {
		t.cache.Put(sig, h.sum, began)
	}
	return h, nil
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
	if !ok || h.settled && h.sig == sig {
		return r, nil
	}
	if h.sig.Size != sig.Size {
		f.Close()
		return nil, fmt.Errorf("open %q: %w", short(p), ErrChanged)
	}
	// Touched since its digest was given, or so young then that it could have
	// changed without a trace: see whether it is the same.
	r.hash, r.want = sha256.New(), h.sum
	return r, nil
}

// openFile opens a regular file. What is no regular file is not opened.
func (t *Tree) openFile(p string) (*os.File, statcache.Sig, error) {
	// Opening a device or a FIFO can have effects, so look before.
	st, err := t.stat(p)
	if err != nil {
		return nil, statcache.Sig{}, err
	}
	if st.Mode&tree.ModeType != tree.ModeRegular {
		return nil, statcache.Sig{}, fmt.Errorf("open %q: not a regular file", short(p))
	}
	fd, err := t.openPath(p, unix.O_RDONLY)
	if err != nil {
		return nil, statcache.Sig{}, pathError("open", p, err)
	}
	f := os.NewFile(uintptr(fd), p)
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
		return 0, fmt.Errorf("read %q: %w", short(r.path), ErrChanged)
	}
	if err != nil || r.pos == r.sig.Size {
		if cerr := r.check(); cerr != nil {
			// Without the bytes: who asked for that many overlooks the error.
			return 0, cerr
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
