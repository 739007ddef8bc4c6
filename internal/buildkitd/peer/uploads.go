package peer

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"

	"github.com/moby/buildkit/session/upload"

	"github.com/kiln-build/kiln/internal/layer"
)

// uploads are what the client has sent itself, in files of the scratch directory. A client sends
// each of them once, and a build may ask for it several times.
type uploads struct {
	mu    sync.Mutex
	files map[string]string // from the URL's path
	size  int64             // of all
}

// RoundTrip implements http.RoundTripper for what the client sends itself: an archive that is its context
// ("docker buildx build - < context.tar"), under a URL of the host remote.UploadHost.
func (p *Peer) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Method != http.MethodGet {
		return nil, errors.New("only GET is possible")
	}
	name, err := p.upload(req)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &http.Response{Status: "200 OK", StatusCode: http.StatusOK, Request: req, Header: http.Header{}, Body: f, ContentLength: fi.Size()}, nil
}

// upload is the file of what a request asks for.
func (p *Peer) upload(req *http.Request) (string, error) {
	u := &p.uploads
	u.mu.Lock()
	defer u.mu.Unlock()
	if name, ok := u.files[req.URL.Path]; ok {
		return name, nil
	}
	c, err := p.caller(req.Context(), "")
	if err != nil {
		return "", err
	}
	up, err := upload.New(req.Context(), c, req.URL)
	if err != nil {
		return "", err
	}
	f, err := os.CreateTemp(p.Scratch, "upload-*")
	if err != nil {
		return "", err
	}
	n, err := up.WriteTo(&limited{w: f, left: layer.DefaultLimits().MaxBytes - u.size})
	if err = errors.Join(err, f.Close()); err != nil {
		return "", errors.Join(err, os.Remove(f.Name()))
	}
	if u.files == nil {
		u.files = map[string]string{}
	}
	u.files[req.URL.Path] = f.Name()
	u.size += n
	return f.Name(), nil
}

// limited writes no more than so many bytes.
type limited struct {
	w    io.Writer
	left int64
}

// Write implements io.Writer.
func (l *limited) Write(p []byte) (int, error) {
	if l.left -= int64(len(p)); l.left < 0 {
		return 0, fmt.Errorf("the client sends more than %d bytes", layer.DefaultLimits().MaxBytes)
	}
	return l.w.Write(p)
}
