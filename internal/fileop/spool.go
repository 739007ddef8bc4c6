package fileop

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
)

// spool is the scratch file for the content of archives, made when it is first
// needed and without a name from then on. Safe for concurrent use.
type spool struct {
	mu    sync.Mutex
	f     *os.File
	size  int64
	users int // Changes that share it
}

// add copies size bytes of r, by way of buf, to the file and says where they are.
func (s *spool) add(dir string, r io.Reader, size int64, buf []byte) (int64, error) {
	f, at, err := s.reserve(dir, size)
	if err != nil {
		return 0, err
	}
	n, err := io.CopyBuffer(struct{ io.Writer }{io.NewOffsetWriter(f, at)}, struct{ io.Reader }{io.LimitReader(r, size)}, buf)
	if err == nil && n != size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return 0, fmt.Errorf("keep content: %w", err)
	}
	return at, nil
}

func (s *spool) reserve(dir string, size int64) (*os.File, int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.f == nil {
		if dir == "" {
			return nil, 0, errors.New("keep content: no directory for scratch files")
		}
		f, err := os.CreateTemp(dir, "archive-*")
		if err != nil {
			return nil, 0, fmt.Errorf("keep content: %w", err)
		}
		if err := os.Remove(f.Name()); err != nil {
			f.Close()
			return nil, 0, fmt.Errorf("keep content: %w", err)
		}
		s.f = f
	}
	at := s.size
	s.size += size
	return s.f, at, nil
}

func (s *spool) open(at, size int64) (io.ReadCloser, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.f == nil {
		return nil, fmt.Errorf("open content: %w", os.ErrClosed)
	}
	return io.NopCloser(io.NewSectionReader(s.f, at, size)), nil
}

func (s *spool) share() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users++
}

// release closes the file with its last user.
func (s *spool) release() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users--
	if s.users > 0 || s.f == nil {
		return nil
	}
	err := s.f.Close()
	s.f = nil
	return err
}
