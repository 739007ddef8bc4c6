package peer

import (
	"errors"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// stream fails as a client's does.
type stream struct {
	write, close error
	written      int
}

func (s *stream) Write(p []byte) (int, error) {
	if s.write != nil {
		return 0, s.write
	}
	s.written += len(p)
	return len(p), nil
}

func (s *stream) Close() error { return s.close }

// TestFileOfClient writes files that a client has already: that is no failure, but any other error is one.
func TestFileOfClient(t *testing.T) {
	exists, broken := status.Error(codes.AlreadyExists, "not needed"), errors.New("broken")
	for name, c := range map[string]struct {
		stream stream
		want   error
	}{
		"taken":            {stream{}, nil},
		"exists on write":  {stream{write: exists, close: exists}, nil},
		"exists on close":  {stream{close: exists}, nil},
		"fails on write":   {stream{write: broken}, broken},
		"fails at the end": {stream{close: broken}, broken},
	} {
		f := &fileOfClient{WriteCloser: &c.stream}
		_, err := f.Write([]byte("one"))
		if err == nil {
			_, err = f.Write([]byte("two"))
		}
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if name == "taken" && c.stream.written != 6 {
			t.Errorf("%d bytes arrived", c.stream.written)
		}
	}
}
