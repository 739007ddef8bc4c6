package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/registry/wire"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// unchecked takes whatever a registry calls a manifest.
func unchecked(_ []byte, contentType string) (string, error) { return mediaType(contentType), nil }

// Document gets what ref names, a manifest or an index, of whatever it may be:
// its bytes, verified but not understood. It comes from the registry itself and no mirror,
// for it is of what may be written, too. See NotFound.
func (c *Client) Document(ctx context.Context, ref string) ([]byte, ocispec.Descriptor, error) {
	t, err := parseTarget(ref)
	if err != nil {
		return nil, ocispec.Descriptor{}, err
	}
	s, err := c.pull(ctx, t)
	what := fmt.Sprintf("read %q", t.named)
	if err != nil {
		return nil, ocispec.Descriptor{}, s.Fail(ctx, what, err)
	}
	raw, desc, err := s.anyManifest(ctx, t.id(), t.digest, unchecked)
	return raw, desc, s.Fail(ctx, what, err)
}

// Current is the digest of what Document would get now.
func (c *Client) Current(ctx context.Context, ref string) (digest.Digest, error) {
	t, err := parseTarget(ref)
	if err != nil {
		return "", err
	}
	s, err := c.pull(ctx, t)
	if err != nil {
		return "", s.Fail(ctx, fmt.Sprintf("look up %q", t.named), err)
	}
	if desc, ok := s.head(ctx, t); ok {
		return desc.Digest, nil
	}
	_, desc, err := c.Document(ctx, ref)
	return desc.Digest, err
}

// Small gets a manifest or a small blob of ref's repository as a whole, verified.
// More than limit bytes are refused.
func (c *Client) Small(ctx context.Context, ref string, desc ocispec.Descriptor, limit int64) (raw []byte, err error) {
	t, err := parseTarget(ref)
	if err != nil {
		return nil, err
	}
	s, err := c.pull(ctx, t)
	what := fmt.Sprintf("read %s of %q", desc.Digest, t.named)
	if err != nil {
		return nil, s.Fail(ctx, what, err)
	}
	if err := desc.Digest.Validate(); err != nil {
		return nil, s.Fail(ctx, what, wire.Permanent("digest %q: %w", wire.Clean(string(desc.Digest)), err))
	}
	if desc.Size < 0 || desc.Size > limit {
		return nil, s.Fail(ctx, what, wire.Permanent("it has %d bytes, and %d are allowed", desc.Size, limit))
	}
	if image.IsManifest(desc.MediaType) || image.IsIndex(desc.MediaType) {
		raw, _, err = s.anyManifest(ctx, desc.Digest.String(), desc.Digest, unchecked)
		return raw, s.Fail(ctx, what, err)
	}
	err = c.net.Retry(ctx, "get blob "+desc.Digest.String(), func(ctx context.Context) (err error) {
		raw, err = s.small(ctx, desc)
		return err
	})
	return raw, s.Fail(ctx, what, err)
}

// NotFound reports whether a registry's answer was that there is no such thing:
// no repository, tag or blob.
func NotFound(err error) bool {
	var status *wire.Status
	return errors.As(err, &status) && status.Code == http.StatusNotFound
}

// Unknown reports whether a registry refused a manifest because it lacks a
// blob that the manifest names.
func Unknown(err error) bool {
	var status *wire.Status
	return errors.As(err, &status) && (status.Has("MANIFEST_BLOB_UNKNOWN") || status.Has("BLOB_UNKNOWN"))
}
