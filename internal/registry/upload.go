package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync"

	"github.com/kiln-build/kiln/internal/registry/wire"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// upload is one blob on its way.
type upload struct {
	p        *Pusher
	desc     ocispec.Descriptor
	open     func() (io.ReadCloser, error)
	progress func(int64)
}

func (u *upload) run(ctx context.Context, mountFrom string) (BlobResult, error) {
	c := u.p.client
	var exists bool
	err := c.net.Retry(ctx, "look for blob "+u.desc.Digest.String(), func(ctx context.Context) (err error) {
		exists, err = u.exists(ctx)
		return err
	})
	if err != nil && (ctx.Err() != nil || !asStatus(err)) {
		return BlobResult{}, err
	}
	if exists {
		return BlobResult{Outcome: Existed}, nil
	}
	where, mounted := u.mount(ctx, mountFrom)
	if mounted {
		return BlobResult{Outcome: Mounted}, nil
	}
	err = c.net.Retry(ctx, "upload blob "+u.desc.Digest.String(), func(ctx context.Context) error {
		to := where
		where = nil // good for one try
		if to == nil {
			var err error
			if to, err = u.p.begin(ctx, u.p.s); err != nil {
				return err
			}
		}
		return u.send(ctx, to)
	})
	if err != nil {
		return BlobResult{}, err
	}
	return BlobResult{Outcome: Uploaded, Bytes: u.desc.Size}, nil
}

func asStatus(err error) bool {
	var e *wire.Status
	return errors.As(err, &e)
}

// exists asks for a blob's headers. Registries answer this with 401, 403 or 405
// to those who may only push; the upload will tell.
func (u *upload) exists(ctx context.Context) (bool, error) {
	s := u.p.s
	req, err := wire.Request(ctx, http.MethodHead, s.URL("/blobs/"+u.desc.Digest.String()))
	if err != nil {
		return false, err
	}
	resp, err := s.Send(req, http.StatusOK)
	var status *wire.Status
	if errors.As(err, &status) && !wire.TransientStatus(status.Code) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer wire.Drain(resp)
	return resp.ContentLength < 0 || resp.ContentLength == u.desc.Size, nil
}

// mount asks the registry to take the blob from another of its repositories. A
// registry that will not may begin an upload instead, and then says where to.
func (u *upload) mount(ctx context.Context, from string) (where *url.URL, mounted bool) {
	path, ok := u.p.sibling(from)
	if !ok {
		return nil, false
	}
	source := u.p.target.repo
	source.Path = path
	s, err := u.p.client.net.Open(ctx, u.p.target.repo, "pull,push", source)
	if err != nil {
		return nil, false
	}
	to := s.URL("/blobs/uploads/")
	to.RawQuery = url.Values{"mount": {u.desc.Digest.String()}, "from": {path}}.Encode()
	req, err := wire.Request(ctx, http.MethodPost, to)
	if err != nil {
		return nil, false
	}
	resp, err := s.Send(req, http.StatusCreated, http.StatusAccepted)
	if err != nil {
		return nil, false
	}
	defer wire.Drain(resp)
	if resp.StatusCode == http.StatusCreated {
		claimed := resp.Header.Get("Docker-Content-Digest")
		return nil, claimed == "" || claimed == u.desc.Digest.String()
	}
	if where, err = s.Location(resp); err != nil {
		return nil, false
	}
	return where, false
}

// sibling is the path of a repository to mount from: "registry/path" or "path".
func (p *Pusher) sibling(from string) (path string, ok bool) {
	if from == "" {
		return "", false
	}
	t, err := parseTarget(from)
	if err == nil && t.repo.Host == p.target.repo.Host && t.repo.Path != p.target.repo.Path {
		return t.repo.Path, true
	}
	return "", false
}

// send sends the whole blob in one request, and sees that it arrived.
func (u *upload) send(ctx context.Context, to *url.URL) error {
	q := to.Query()
	q.Set("digest", u.desc.Digest.String())
	to.RawQuery = q.Encode()
	req, err := wire.Request(ctx, http.MethodPut, to)
	if err != nil {
		return err
	}
	var body *checkedBody
	req.GetBody = func() (io.ReadCloser, error) {
		r, err := u.open()
		if err != nil {
			return nil, wire.Permanent("open the blob: %w", err)
		}
		body = &checkedBody{ReadCloser: r, desc: u.desc, hash: u.desc.Digest.Algorithm().Hash(), progress: u.progress}
		return body, nil
	}
	if req.Body, err = req.GetBody(); err != nil {
		return err
	}
	if req.ContentLength = u.desc.Size; u.desc.Size == 0 {
		_ = req.Body.Close()
		req.Body = http.NoBody
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	resp, err := u.p.s.Send(req, http.StatusCreated, http.StatusOK, http.StatusNoContent)
	if bad := body.failed(); bad != nil {
		err = bad // the transport's own words for it say less
	}
	var status *wire.Status
	if errors.As(err, &status) && status.Has("BLOB_UPLOAD_UNKNOWN") {
		return fmt.Errorf("%w (%w)", err, wire.ErrBeginAnew)
	}
	if err != nil {
		return err
	}
	defer wire.Drain(resp)
	return u.confirm(ctx, resp.Header.Get("Docker-Content-Digest"))
}

// confirm checks that the registry has got what was sent.
func (u *upload) confirm(ctx context.Context, claimed string) error {
	switch claimed {
	case u.desc.Digest.String():
		return nil
	case "":
		s := u.p.s
		req, err := wire.Request(ctx, http.MethodHead, s.URL("/blobs/"+u.desc.Digest.String()))
		if err != nil {
			return err
		}
		resp, err := s.Send(req, http.StatusOK)
		var status *wire.Status
		if errors.As(err, &status) && status.Code != http.StatusNotFound && !wire.TransientStatus(status.Code) {
			return nil // it does not let us look
		}
		if err != nil {
			return fmt.Errorf("the registry took the blob but does not have it: %w", err)
		}
		wire.Drain(resp)
		return nil
	}
	return wire.Permanent("the registry took the blob as %s", wire.Clean(claimed))
}

// checkedBody sees to it that what is sent is what was described.
type checkedBody struct {
	io.ReadCloser
	desc     ocispec.Descriptor
	progress func(int64)

	mu   sync.Mutex // the transport may still read when its answer is there
	hash interface {
		io.Writer
		Sum([]byte) []byte
	}
	sent int64
	err  error
}

func (b *checkedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.hash.Write(p[:n])
	b.sent += int64(n)
	switch {
	case b.sent > b.desc.Size, err == io.EOF && b.sent < b.desc.Size:
		b.err = wire.Permanent("the blob here has not the %d bytes that it should", b.desc.Size)
	case err == io.EOF:
		if got := digest.NewDigestFromBytes(b.desc.Digest.Algorithm(), b.hash.Sum(nil)); got != b.desc.Digest {
			b.err = wire.Permanent("the blob here has digest %s", got)
		}
	case err != nil:
		b.err = wire.Permanent("read the blob: %w", err)
	}
	if b.err != nil {
		return 0, b.err
	}
	b.progress(b.sent)
	return n, err
}

func (b *checkedBody) failed() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}
