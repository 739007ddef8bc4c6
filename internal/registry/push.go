package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Pusher pushes to one repository. Safe for concurrent use.
type Pusher struct {
	client *Client
	s      *session
	target target

	mu    sync.Mutex
	blobs map[digest.Digest]*sync.Mutex // one upload of a blob at a time
	there map[digest.Digest]bool        // blobs that are known to be in the repository
}

// Outcome is how a blob came to be in the repository.
type Outcome string

// The outcomes.
const (
	Existed  Outcome = "existed"  // was there before
	Mounted  Outcome = "mounted"  // taken from another repository of the registry
	Uploaded Outcome = "uploaded" // sent
)

// BlobResult is what Blob did.
type BlobResult struct {
	Outcome Outcome
	Bytes   int64 // sent in the upload that succeeded; 0 unless Uploaded
}

// Pusher returns a pusher to the repository of ref, having asked the registry
// for the permission to push there: an upload is begun, and given up.
func (c *Client) Pusher(ctx context.Context, ref string) (*Pusher, error) {
	t, err := parseTarget(ref)
	if err != nil {
		return nil, err
	}
	s, err := c.session(ctx, t, "pull,push")
	p := &Pusher{
		client: c, s: s, target: t,
		blobs: map[digest.Digest]*sync.Mutex{}, there: map[digest.Digest]bool{},
	}
	if err != nil {
		return nil, p.fail(ctx, err)
	}
	if c.opts.SkipPushCheck {
		return p, nil
	}
	var where *url.URL
	err = c.retry(ctx, "check permission to push", func(ctx context.Context) (err error) {
		where, err = p.begin(ctx, s)
		return err
	})
	if err != nil {
		return nil, p.fail(ctx, err)
	}
	p.giveUp(ctx, where)
	return p, nil
}

func (p *Pusher) fail(ctx context.Context, err error) error {
	return p.s.fail(ctx, fmt.Sprintf("push to %q", p.target.named), err)
}

// giveUp cancels an upload. That it works is not needed: registries clear away
// what was left.
func (p *Pusher) giveUp(ctx context.Context, where *url.URL) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := request(ctx, http.MethodDelete, where)
	if err != nil {
		return
	}
	if resp, err := p.s.send(req, http.StatusNoContent, http.StatusOK, http.StatusAccepted); err == nil {
		drain(resp)
	}
}

// begin begins an upload and returns where to send it.
func (p *Pusher) begin(ctx context.Context, s *session) (*url.URL, error) {
	req, err := request(ctx, http.MethodPost, s.url("/blobs/uploads/"))
	if err != nil {
		return nil, err
	}
	resp, err := s.send(req, http.StatusAccepted)
	if err != nil {
		return nil, err
	}
	defer drain(resp)
	return s.location(resp)
}

// location is where an answer says to go on. On the registry itself the scheme
// stays: many sit behind a proxy that speaks TLS and do not know.
func (s *session) location(resp *http.Response) (*url.URL, error) {
	from := resp.Request.URL
	to, err := from.Parse(resp.Header.Get("Location"))
	if err != nil || resp.Header.Get("Location") == "" {
		return nil, permanent("the registry gave no place to upload to")
	}
	if to.Scheme != from.Scheme && strings.EqualFold(to.Hostname(), from.Hostname()) && to.Port() == from.Port() {
		to.Scheme = from.Scheme
	}
	to.User = nil
	return to, checkHop(from, to)
}

// Blob puts a blob into the repository, unless it is there: from mountFrom,
// another repository of the same registry, if that is not empty and allowed,
// else by upload. open is called anew for each try; progress, which may be nil,
// gets how much of the current try was sent.
func (p *Pusher) Blob(ctx context.Context, desc ocispec.Descriptor, mountFrom string,
	open func() (io.ReadCloser, error), progress func(sent int64),
) (BlobResult, error) {
	if err := desc.Digest.Validate(); err != nil {
		return BlobResult{}, fmt.Errorf("push blob %q: %w", desc.Digest, err)
	}
	if progress == nil {
		progress = func(int64) {}
	}
	defer p.lock(desc.Digest)()
	if p.has(desc.Digest) {
		return BlobResult{Outcome: Existed}, nil
	}
	release, err := p.client.slot(ctx, "upload", p.target.host)
	if err != nil {
		return BlobResult{}, err
	}
	defer release()
	u := &upload{p: p, desc: desc, open: open, progress: progress}
	r, err := u.run(ctx, mountFrom)
	if err != nil {
		return r, p.fail(ctx, fmt.Errorf("blob %s: %w", desc.Digest, err))
	}
	p.mu.Lock()
	p.there[desc.Digest] = true
	p.mu.Unlock()
	return r, nil
}

func (p *Pusher) lock(d digest.Digest) (unlock func()) {
	p.mu.Lock()
	m := p.blobs[d]
	if m == nil {
		m = &sync.Mutex{}
		p.blobs[d] = m
	}
	p.mu.Unlock()
	m.Lock()
	return m.Unlock
}

func (p *Pusher) has(d digest.Digest) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.there[d]
}

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
	err := c.retry(ctx, "look for blob "+u.desc.Digest.String(), func(ctx context.Context) (err error) {
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
	err = c.retry(ctx, "upload blob "+u.desc.Digest.String(), func(ctx context.Context) error {
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
	var e *statusError
	return errors.As(err, &e)
}

// exists asks for a blob's headers. Registries answer this with 401, 403 or 405
// to those who may only push; the upload will tell.
func (u *upload) exists(ctx context.Context) (bool, error) {
	s := u.p.s
	req, err := request(ctx, http.MethodHead, s.url("/blobs/"+u.desc.Digest.String()))
	if err != nil {
		return false, err
	}
	resp, err := s.send(req, http.StatusOK)
	var status *statusError
	if errors.As(err, &status) && !transientStatus(status.code) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer drain(resp)
	return resp.ContentLength < 0 || resp.ContentLength == u.desc.Size, nil
}

// mount asks the registry to take the blob from another of its repositories. A
// registry that will not may begin an upload instead, and then says where to.
func (u *upload) mount(ctx context.Context, from string) (where *url.URL, mounted bool) {
	path, ok := u.p.sibling(from)
	if !ok {
		return nil, false
	}
	source := u.p.target
	source.path = path
	s, err := u.p.client.session(ctx, u.p.target, "pull,push", source.scope("pull"))
	if err != nil {
		return nil, false
	}
	to := s.url("/blobs/uploads/")
	to.RawQuery = url.Values{"mount": {u.desc.Digest.String()}, "from": {path}}.Encode()
	req, err := request(ctx, http.MethodPost, to)
	if err != nil {
		return nil, false
	}
	resp, err := s.send(req, http.StatusCreated, http.StatusAccepted)
	if err != nil {
		return nil, false
	}
	defer drain(resp)
	if resp.StatusCode == http.StatusCreated {
		claimed := resp.Header.Get("Docker-Content-Digest")
		return nil, claimed == "" || claimed == u.desc.Digest.String()
	}
	if where, err = s.location(resp); err != nil {
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
	if err == nil && t.host == p.target.host && t.path != p.target.path {
		return t.path, true
	}
	return "", false
}

// errBeginAnew is that the registry forgot an upload that it had begun.
var errBeginAnew = errors.New("the upload must begin anew")

// send sends the whole blob in one request, and sees that it arrived.
func (u *upload) send(ctx context.Context, to *url.URL) error {
	q := to.Query()
	q.Set("digest", u.desc.Digest.String())
	to.RawQuery = q.Encode()
	req, err := request(ctx, http.MethodPut, to)
	if err != nil {
		return err
	}
	var body *checkedBody
	req.GetBody = func() (io.ReadCloser, error) {
		r, err := u.open()
		if err != nil {
			return nil, permanent("open the blob: %w", err)
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
	resp, err := u.p.s.send(req, http.StatusCreated, http.StatusOK, http.StatusNoContent)
	if bad := body.failed(); bad != nil {
		err = bad // the transport's own words for it say less
	}
	var status *statusError
	if errors.As(err, &status) && status.has("BLOB_UPLOAD_UNKNOWN") {
		return fmt.Errorf("%w (%w)", err, errBeginAnew)
	}
	if err != nil {
		return err
	}
	defer drain(resp)
	return u.confirm(ctx, resp.Header.Get("Docker-Content-Digest"))
}

// confirm checks that the registry has got what was sent.
func (u *upload) confirm(ctx context.Context, claimed string) error {
	switch claimed {
	case u.desc.Digest.String():
		return nil
	case "":
		s := u.p.s
		req, err := request(ctx, http.MethodHead, s.url("/blobs/"+u.desc.Digest.String()))
		if err != nil {
			return err
		}
		resp, err := s.send(req, http.StatusOK)
		var status *statusError
		if errors.As(err, &status) && status.code != http.StatusNotFound && !transientStatus(status.code) {
			return nil // it does not let us look
		}
		if err != nil {
			return fmt.Errorf("the registry took the blob but does not have it: %w", err)
		}
		drain(resp)
		return nil
	}
	return permanent("the registry took the blob as %s", clean(claimed))
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
		b.err = permanent("the blob here has not the %d bytes that it should", b.desc.Size)
	case err == io.EOF:
		if got := digest.NewDigestFromBytes(b.desc.Digest.Algorithm(), b.hash.Sum(nil)); got != b.desc.Digest {
			b.err = permanent("the blob here has digest %s", got)
		}
	case err != nil:
		b.err = permanent("read the blob: %w", err)
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

// Manifest puts a manifest into the repository under its digest.
func (p *Pusher) Manifest(ctx context.Context, mediaType string, raw []byte) (digest.Digest, error) {
	d := digest.FromBytes(raw)
	return d, p.put(ctx, mediaType, raw, d, d.String())
}

// Tag puts a manifest under the tag of the pusher's ref. It is the last thing a
// push does: until then nobody sees any of it. If the ref has a digest and no
// tag, the manifest must be the one it names.
func (p *Pusher) Tag(ctx context.Context, mediaType string, raw []byte) error {
	d := digest.FromBytes(raw)
	if want := p.target.digest; want != "" && verify(raw, want) != nil {
		return p.fail(ctx, diag.New(diag.ExitUsage, "the image has digest %s, not the one of its name", d))
	}
	tag := p.target.tag
	if tag == "" {
		tag = p.target.digest.String()
	}
	return p.put(ctx, mediaType, raw, d, tag)
}

func (p *Pusher) put(ctx context.Context, mediaType string, raw []byte, d digest.Digest, id string) error {
	err := p.client.retry(ctx, "put manifest "+id, func(ctx context.Context) error {
		u := p.s.url("/manifests/" + id)
		req, err := http.NewRequestWithContext(ctx, http.MethodPut, u.String(), bytes.NewReader(raw))
		if err != nil {
			return err
		}
		req.Header.Set("Content-Type", mediaType)
		resp, err := p.s.send(req, http.StatusCreated, http.StatusOK, http.StatusAccepted, http.StatusNoContent)
		if err != nil {
			return err
		}
		defer drain(resp)
		claimed := resp.Header.Get("Docker-Content-Digest")
		if claimed != "" && claimed != d.String() && digest.Digest(claimed).Algorithm() == d.Algorithm() {
			return permanent("the registry took the manifest as %s", clean(strconv.Quote(claimed)))
		}
		return nil
	})
	return p.fail(ctx, wrapNonNil("manifest "+id, err))
}

func wrapNonNil(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}
