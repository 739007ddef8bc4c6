package registry

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"

	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/registry/wire"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// resumeProgress is how much must have come for a broken download to count as
// new trouble rather than the same.
const resumeProgress = 1 << 20

var _ image.Fetcher = (*Client)(nil)

// Fetch implements image.Fetcher. A download that breaks is resumed where it
// broke. It takes one of the registry's places for downloads until it is read to
// its end or closed.
func (c *Client) Fetch(ctx context.Context, l image.Layer) (io.ReadCloser, error) {
	t, err := parseTarget(l.Origin)
	if err != nil {
		return nil, err
	}
	if err := l.Blob.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("fetch layer %q from %s: %w", l.Blob.Digest, l.Origin, err)
	}
	var r io.ReadCloser
	err = c.fromAny(ctx, t, func(from target) (err error) {
		r, err = c.fetch(ctx, from, l)
		return err
	})
	return r, err
}

func (c *Client) fetch(ctx context.Context, t target, l image.Layer) (io.ReadCloser, error) {
	s, err := c.net.Open(ctx, t.repo, "pull")
	b := &blobReader{ctx: ctx, net: c.net, s: s, desc: l.Blob}
	if err != nil {
		return nil, b.fail(err)
	}
	if b.release, err = c.slot(ctx, "download", t.repo.Host); err != nil {
		return nil, err
	}
	b.hash = l.Blob.Digest.Algorithm().Hash()
	err = c.net.Retry(ctx, "get blob "+l.Blob.Digest.String(), b.open)
	if err != nil {
		b.release()
		return nil, b.fail(err)
	}
	return b, nil
}

// blobReader is a blob while it is downloaded.
type blobReader struct {
	ctx     context.Context //nolint:containedctx // of the one Fetch that this is the result of
	net     *wire.Net
	s       *wire.Session
	desc    ocispec.Descriptor
	release func()

	body   io.ReadCloser
	hash   hash.Hash
	offset int64
	tries  int   // without progress
	mark   int64 // the offset at which tries began
	err    error
}

func (b *blobReader) fail(err error) error {
	return b.s.Fail(b.ctx, "fetch layer "+b.desc.Digest.String(), err)
}

// open asks for the blob from offset on.
func (b *blobReader) open(ctx context.Context) error {
	req, err := wire.Request(ctx, http.MethodGet, b.s.URL("/blobs/"+b.desc.Digest.String()))
	if err != nil {
		return err
	}
	ok := []int{http.StatusOK}
	if b.offset > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", b.offset))
		ok = append(ok, http.StatusPartialContent)
	}
	resp, err := b.s.Send(req, ok...)
	if err != nil {
		return err
	}
	skip, err := b.checkLength(resp)
	if err == nil && skip > 0 {
		_, err = io.CopyN(io.Discard, resp.Body, skip)
	}
	if err != nil {
		_ = resp.Body.Close()
		return err
	}
	b.body = resp.Body
	return nil
}

// checkLength compares what an answer announces with what is wanted, and
// returns how much of it was had before.
func (b *blobReader) checkLength(resp *http.Response) (skip int64, err error) {
	start, size := int64(0), resp.ContentLength
	if resp.StatusCode == http.StatusPartialContent {
		var end int64
		if _, err := fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-%d/", &start, &end); err != nil || start != b.offset {
			return 0, wire.Permanent("asked for bytes from %d, the registry gave %q", b.offset, wire.Clean(resp.Header.Get("Content-Range")))
		}
	}
	if size >= 0 && start+size != b.desc.Size {
		return 0, wire.Permanent("the blob has %d bytes, the manifest says %d", start+size, b.desc.Size)
	}
	return b.offset - start, nil
}

// Read implements io.Reader.
func (b *blobReader) Read(p []byte) (int, error) {
	for b.err == nil {
		if len(p) == 0 {
			return 0, nil
		}
		// What comes after the blob's size is not read: the digest decides.
		n, err := b.body.Read(p[:min(int64(len(p)), max(b.desc.Size-b.offset, 1))])
		if b.desc.Size == 0 {
			n = 0
		}
		b.offset += int64(n)
		b.hash.Write(p[:n])
		switch {
		case b.offset == b.desc.Size:
			_ = b.end(b.finish())
		case err == io.EOF:
			err = io.ErrUnexpectedEOF
			fallthrough
		case err != nil:
			if err := b.resume(err); err != nil {
				_ = b.end(err)
			}
		}
		if n > 0 {
			return n, nil
		}
	}
	return 0, b.err
}

// finish is io.EOF if everything is as it should be.
func (b *blobReader) finish() error {
	if got := digest.NewDigest(b.desc.Digest.Algorithm(), b.hash); got != b.desc.Digest {
		return wire.Permanent("the blob has digest %s", got)
	}
	return io.EOF
}

// end stores what all further reads return, and gives back what is held.
func (b *blobReader) end(err error) error {
	if err != io.EOF { //nolint:errorlint // ours, unwrapped
		err = b.fail(err)
	}
	b.err = err
	if b.body != nil {
		_ = b.body.Close()
	}
	b.release()
	return err
}

// resume opens the blob again after why.
func (b *blobReader) resume(why error) error {
	_ = b.body.Close()
	if b.offset-b.mark >= resumeProgress {
		b.tries, b.mark = 0, b.offset
	}
	for {
		if b.ctx.Err() != nil {
			return context.Cause(b.ctx)
		}
		if b.tries++; b.tries >= b.net.Options().Retry.Tries || !wire.Transient(why) {
			return fmt.Errorf("after %d of %d bytes: %w", b.offset, b.desc.Size, why)
		}
		if err := b.net.Pause(b.ctx, b.tries, 0, "resume blob "+b.desc.Digest.String(), why); err != nil {
			return err
		}
		if why = b.open(b.ctx); why == nil {
			return nil
		}
	}
}

// Close implements io.Closer.
func (b *blobReader) Close() error {
	if b.err == nil {
		_ = b.end(io.EOF)
		b.err = errors.New("read of a closed layer")
	}
	return nil
}
