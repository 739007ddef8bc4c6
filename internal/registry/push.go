package registry

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/registry/wire"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Pusher pushes to one repository. Safe for concurrent use.
type Pusher struct {
	client *Client
	s      *wire.Session
	target target

	mu    sync.Mutex
	there map[digest.Digest]bool // blobs that are known to be in the repository
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
	s, err := c.net.Open(ctx, t.repo, "pull,push")
	p := &Pusher{client: c, s: s, target: t, there: map[digest.Digest]bool{}}
	if err != nil {
		return nil, p.fail(ctx, err)
	}
	if c.net.Options().SkipPushCheck {
		return p, nil
	}
	var where *url.URL
	err = c.net.Retry(ctx, "check permission to push", func(ctx context.Context) (err error) {
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
	return p.s.Fail(ctx, fmt.Sprintf("push to %q", p.target.named), err)
}

// giveUp cancels an upload. That it works is not needed: registries clear away
// what was left.
func (p *Pusher) giveUp(ctx context.Context, where *url.URL) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := wire.Request(ctx, http.MethodDelete, where)
	if err != nil {
		return
	}
	if resp, err := p.s.Send(req, http.StatusNoContent, http.StatusOK, http.StatusAccepted); err == nil {
		wire.Drain(resp)
	}
}

// begin begins an upload and returns where to send it.
func (p *Pusher) begin(ctx context.Context, s *wire.Session) (*url.URL, error) {
	req, err := wire.Request(ctx, http.MethodPost, s.URL("/blobs/uploads/"))
	if err != nil {
		return nil, err
	}
	resp, err := s.Send(req, http.StatusAccepted)
	if err != nil {
		return nil, err
	}
	defer wire.Drain(resp)
	return s.Location(resp)
}

// Blob puts a blob into the repository, unless it is there: from mountFrom,
// another repository of the same registry, if that is not empty and allowed, or
// from one that this client has given it to, else by upload. open is called anew for each try; progress, which may be nil,
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
	at := place{p.target.repo.Host, desc.Digest}
	leave, err := p.client.placed.claim(ctx, at)
	if err != nil {
		return BlobResult{}, err
	}
	defer leave()
	if p.has(desc.Digest) {
		return BlobResult{Outcome: Existed}, nil
	}
	if known := p.client.placed.repo(at); known != "" && known != p.target.repo.Path {
		mountFrom = p.target.repo.Name + "/" + known
	}
	release, err := p.client.slot(ctx, "upload", p.target.repo.Host)
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
	p.client.placed.note(at, p.target.repo.Path)
	return r, nil
}

func (p *Pusher) has(d digest.Digest) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.there[d]
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
	err := p.client.net.Retry(ctx, "put manifest "+id, func(ctx context.Context) error {
		u := p.s.URL("/manifests/" + id)
		req, err := http.NewRequestWithContext(ctx, http.MethodPut, u.String(), bytes.NewReader(raw))
		if err != nil {
			return err
		}
		req.Header.Set("Content-Type", mediaType)
		resp, err := p.s.Send(req, http.StatusCreated, http.StatusOK, http.StatusAccepted, http.StatusNoContent)
		if err != nil {
			return err
		}
		defer wire.Drain(resp)
		claimed := resp.Header.Get("Docker-Content-Digest")
		if claimed != "" && claimed != d.String() && digest.Digest(claimed).Algorithm() == d.Algorithm() {
			return wire.Permanent("the registry took the manifest as %s", wire.Clean(strconv.Quote(claimed)))
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
