package store

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// ErrCorrupt is in the chain of errors about content that is not what its
// digest says. It was moved away: the next who needs it will find it missing.
var ErrCorrupt = errors.New("stored content is damaged")

func (s *Store) blobPath(d digest.Digest) (string, error) {
	p, err := checkDigest(d)
	if err != nil {
		return "", err
	}
	return s.path(dirBlobs, p), nil
}

// StatBlob returns the size of a blob, or fs.ErrNotExist. It does not verify
// the content: reading does.
func (s *Store) StatBlob(d digest.Digest) (int64, error) {
	p, err := s.blobPath(d)
	if err != nil {
		return 0, err
	}
	fi, err := s.touch(p)
	if err != nil {
		return 0, fmt.Errorf("blob %s: %w", d, err)
	}
	if fi.Size() == 0 && d != d.Algorithm().FromBytes(nil) {
		// What a power failure makes of a file that was not yet on disk.
		return 0, fmt.Errorf("blob %s: %w", d, fs.ErrNotExist)
	}
	return fi.Size(), nil
}

// OpenBlob opens a blob, or gives fs.ErrNotExist. The content is verified
// while it is read: if it is not what d says, the last Read returns an error
// that is ErrCorrupt instead of io.EOF, without the last bytes, and the blob
// is moved away so that it will be fetched or made again.
func (s *Store) OpenBlob(d digest.Digest) (io.ReadCloser, error) {
	r, _, err := s.openBlob(d)
	if err != nil {
		return nil, err
	}
	return r, nil
}

func (s *Store) openBlob(d digest.Digest) (*blobReader, int64, error) {
	size, err := s.StatBlob(d)
	if err != nil {
		return nil, 0, err
	}
	p, err := s.blobPath(d)
	if err != nil {
		return nil, 0, err
	}
	f, err := os.OpenFile(p, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("blob %s: %w", d, err)
	}
	return &blobReader{s: s, d: d, f: f, h: d.Algorithm().Hash(), left: size}, size, nil
}

// ReadBlob returns the verified content of a blob of at most max bytes.
func (s *Store) ReadBlob(d digest.Digest, max int64) ([]byte, error) {
	r, size, err := s.openBlob(d)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if size > max {
		return nil, fmt.Errorf("blob %s: %d bytes are more than the %d that are allowed here", d, size, max)
	}
	b := bytes.NewBuffer(make([]byte, 0, size+bytes.MinRead))
	if _, err := b.ReadFrom(r); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

type blobReader struct {
	s    *Store
	d    digest.Digest
	f    *os.File
	h    hash.Hash
	left int64 // bytes until the size that the file had when it was opened
	err  error
}

func (r *blobReader) Read(p []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := 0, error(nil)
	if r.left > 0 {
		n, err = r.f.Read(p[:min(int64(len(p)), r.left)])
		r.h.Write(p[:n])
		r.left -= int64(n)
	}
	switch {
	case err == io.EOF:
		r.err = r.corrupt("it ends too early")
	case err != nil:
		r.err = fmt.Errorf("read blob %s: %w", r.d, err)
	case r.left > 0:
		return n, nil
	case digest.NewDigest(r.d.Algorithm(), r.h) == r.d:
		r.err = io.EOF
		return n, io.EOF
	default:
		r.err = r.corrupt("its digest is another one")
	}
	return 0, r.err
}

func (r *blobReader) Close() error { return r.f.Close() }

// corrupt moves the file away, if it is still the one that was read.
func (r *blobReader) corrupt(why string) error {
	err := fmt.Errorf("read blob %s: %w (%s); it was removed, and will be fetched or made again when it is needed", r.d, ErrCorrupt, why)
	p, perr := r.s.blobPath(r.d)
	mine, serr := r.f.Stat()
	if perr != nil || serr != nil {
		return err
	}
	away := r.s.path(dirTmp, "bad-"+rand.Text())
	if os.Rename(p, away) != nil {
		return err
	}
	if fi, lerr := os.Lstat(away); lerr == nil && !os.SameFile(fi, mine) {
		// Somebody has put a good one there in the meantime.
		_ = os.Link(away, p)
	}
	os.Remove(away)
	return err
}

// PutBlob stores a small blob.
func (s *Store) PutBlob(b []byte) (digest.Digest, error) {
	w, err := s.NewBlob()
	if err != nil {
		return "", err
	}
	defer w.Close()
	if _, err := w.Write(b); err != nil {
		return "", err
	}
	return w.Commit("")
}

// BlobWriter writes a blob whose digest may not be known yet. Not safe for
// concurrent use.
type BlobWriter struct {
	s    *Store
	f    *tmpFile
	h    hash.Hash
	size int64
}

// NewBlob begins a blob. Close must be called in the end.
func (s *Store) NewBlob() (*BlobWriter, error) {
	f, err := s.tempFile("blob")
	if err != nil {
		return nil, s.writing("blob", err)
	}
	return &BlobWriter{s: s, f: f, h: sha256.New()}, nil
}

func (w *BlobWriter) Write(p []byte) (int, error) {
	n, err := w.f.Write(p)
	w.h.Write(p[:n])
	w.size += int64(n)
	if err != nil {
		err = w.s.writing("blob", err)
	}
	return n, err
}

// Size is the number of bytes written so far.
func (w *BlobWriter) Size() int64 { return w.size }

// Digest is that of what was written so far.
func (w *BlobWriter) Digest() digest.Digest { return digest.NewDigest(digest.SHA256, w.h) }

// Commit makes the blob visible under its digest, at once and as a whole. If
// want is not empty, it must be that digest: if it is not, the error is
// ErrMismatch and nothing becomes visible.
func (w *BlobWriter) Commit(want digest.Digest) (digest.Digest, error) {
	if w.f.done {
		return "", errors.New("commit blob: closed or committed before")
	}
	got, err := w.digest(want)
	if err != nil {
		return "", err
	}
	if want != "" && got != want {
		return "", fmt.Errorf("commit blob: %w: %s is expected, %s was given (%d bytes)", ErrMismatch, want, got, w.size)
	}
	p, err := w.s.blobPath(got)
	if err != nil {
		return "", err
	}
	if err := w.f.commit(p); err != nil {
		return "", w.s.writing("blob", err)
	}
	return got, nil
}

// ErrMismatch is in the chain of errors about content from outside whose
// digest is not the one that was promised.
var ErrMismatch = errors.New("content does not match its digest")

// digest is the content's, by want's algorithm.
func (w *BlobWriter) digest(want digest.Digest) (digest.Digest, error) {
	if want != "" {
		if _, err := checkDigest(want); err != nil {
			return "", err
		}
	}
	if want == "" || want.Algorithm() == digest.SHA256 {
		return w.Digest(), nil
	}
	// Rare enough to read it again.
	return want.Algorithm().FromReader(io.NewSectionReader(w.f, 0, w.size))
}

// Close drops the blob unless it was committed.
func (w *BlobWriter) Close() error {
	w.f.discard()
	return nil
}
