package registry

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/registry/wire"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// accepted are the manifests that are asked for.
var accepted = strings.Join([]string{
	ocispec.MediaTypeImageIndex, image.MediaTypeDockerList, ocispec.MediaTypeImageManifest, image.MediaTypeDockerManifest,
	dockerSigned1 + ";q=0.1", dockerSchema1 + ";q=0.1",
}, ", ")

// Resolve gets an image's manifest and config for a platform, verified, and no
// layer. A ref that names a manifest rather than an index gives that image,
// whatever its platform, as docker does: see Image.Manifest.Platform.
func (c *Client) Resolve(ctx context.Context, ref string, platform ocispec.Platform) (*image.Image, error) {
	t, err := parseTarget(ref)
	if err != nil {
		return nil, err
	}
	var img *image.Image
	err = c.fromAny(ctx, t, func(from target) (err error) {
		img, err = c.resolve(ctx, from, platform)
		return err
	})
	return img, err
}

func (c *Client) resolve(ctx context.Context, t target, platform ocispec.Platform) (*image.Image, error) {
	s, err := c.pull(ctx, t)
	what := fmt.Sprintf("resolve image %q", t.named)
	if err != nil {
		return nil, s.Fail(ctx, what, err)
	}
	raw, desc, err := s.manifest(ctx, t.id(), t.digest)
	if err != nil {
		return nil, s.Fail(ctx, what, err)
	}
	get := func(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
		if d.Digest == desc.Digest {
			return raw, nil
		}
		return s.document(ctx, d)
	}
	img, err := image.Resolve(ctx, get, desc, platform)
	if err != nil {
		return nil, s.Fail(ctx, what, err)
	}
	for i := range img.Layers {
		img.Layers[i].Origin = t.named.Name()
	}
	img.Ref = t.named.String()
	return img, nil
}

// session is one for pulling, which knows manifests.
type session struct {
	*wire.Session
	net *wire.Net
}

// pull opens a session; its Fail works even if that failed.
func (c *Client) pull(ctx context.Context, t target) (*session, error) {
	s, err := c.net.Open(ctx, t.repo, "pull")
	return &session{Session: s, net: c.net}, err
}

// document gets a manifest, an index or a config: an image.Documents.
func (s *session) document(ctx context.Context, d ocispec.Descriptor) (raw []byte, err error) {
	if d.MediaType == "" || image.IsIndex(d.MediaType) || image.IsManifest(d.MediaType) {
		raw, _, err = s.manifest(ctx, d.Digest.String(), d.Digest)
		return raw, err
	}
	err = s.net.Retry(ctx, "get config", func(ctx context.Context) (err error) {
		raw, err = s.small(ctx, d)
		return err
	})
	return raw, err
}

// manifest gets an image's manifest by tag or digest, verified, with want if that is given.
func (s *session) manifest(ctx context.Context, id string, want digest.Digest) (raw []byte, desc ocispec.Descriptor, err error) {
	return s.anyManifest(ctx, id, want, checkDocument)
}

// anyManifest gets what has that tag or digest among manifests. check looks at what came,
// and says its media type.
func (s *session) anyManifest(ctx context.Context, id string, want digest.Digest, check func(raw []byte, contentType string) (string, error)) (raw []byte, desc ocispec.Descriptor, err error) {
	err = s.net.Retry(ctx, "get manifest "+id, func(ctx context.Context) error {
		req, err := wire.Request(ctx, http.MethodGet, s.URL("/manifests/"+id))
		if err != nil {
			return err
		}
		req.Header.Set("Accept", accepted)
		resp, err := s.Send(req, http.StatusOK)
		if err != nil {
			return err
		}
		defer wire.Drain(resp)
		if raw, err = readAll(resp, image.MaxManifest, "manifest"); err != nil {
			return err
		}
		mt, err := check(raw, resp.Header.Get("Content-Type"))
		if err != nil {
			return err
		}
		dgst, err := manifestDigest(raw, want, resp.Header)
		desc = ocispec.Descriptor{MediaType: mt, Digest: dgst, Size: int64(len(raw))}
		return err
	})
	return raw, desc, err
}

// manifestDigest verifies a manifest with the digest that was asked for, and
// with the one that the registry claims.
func manifestDigest(raw []byte, want digest.Digest, h http.Header) (digest.Digest, error) {
	claimed := digest.Digest(h.Get("Docker-Content-Digest"))
	if want != "" {
		if claimed != "" && claimed != want && claimed.Algorithm() == want.Algorithm() {
			return "", wire.Permanent("asked for %s, the registry claims to give %s", want, wire.Clean(string(claimed)))
		}
		return want, verify(raw, want)
	}
	if claimed != "" {
		return claimed, verify(raw, claimed)
	}
	return digest.FromBytes(raw), nil
}

// readAll reads an answer of at most limit bytes; a length that was announced
// must be what comes.
func readAll(resp *http.Response, limit int64, what string) ([]byte, error) {
	if resp.ContentLength > limit {
		return nil, wire.Permanent("the %s has %d bytes, more than %d", what, resp.ContentLength, limit)
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read the %s: %w", what, err)
	}
	if int64(len(raw)) > limit {
		return nil, wire.Permanent("the %s has more than %d bytes", what, limit)
	}
	return raw, nil
}

// small gets a whole blob, verified.
func (s *session) small(ctx context.Context, desc ocispec.Descriptor) ([]byte, error) {
	if len(desc.Data) > 0 && int64(len(desc.Data)) == desc.Size && verify(desc.Data, desc.Digest) == nil {
		return desc.Data, nil
	}
	req, err := wire.Request(ctx, http.MethodGet, s.URL("/blobs/"+desc.Digest.String()))
	if err != nil {
		return nil, err
	}
	resp, err := s.Send(req, http.StatusOK)
	if err != nil {
		return nil, err
	}
	defer wire.Drain(resp)
	raw, err := readAll(resp, desc.Size, "blob "+desc.Digest.String())
	if err != nil {
		return nil, err
	}
	if int64(len(raw)) < desc.Size {
		return nil, wire.Permanent("blob %s has %d bytes, the manifest says %d", desc.Digest, len(raw), desc.Size)
	}
	return raw, verify(raw, desc.Digest)
}

// Digest returns what ref names now, without getting it: by HEAD, and by GET
// from registries that do not do that well.
func (c *Client) Digest(ctx context.Context, ref string) (ocispec.Descriptor, error) {
	t, err := parseTarget(ref)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var desc ocispec.Descriptor
	err = c.fromAny(ctx, t, func(from target) (err error) {
		desc, err = c.lookup(ctx, from)
		return err
	})
	return desc, err
}

func (c *Client) lookup(ctx context.Context, t target) (ocispec.Descriptor, error) {
	what := fmt.Sprintf("look up image %q", t.named)
	s, err := c.pull(ctx, t)
	if err != nil {
		return ocispec.Descriptor{}, s.Fail(ctx, what, err)
	}
	desc, ok := s.head(ctx, t)
	if ok {
		return desc, nil
	}
	if _, desc, err = s.manifest(ctx, t.id(), t.digest); err != nil {
		return ocispec.Descriptor{}, s.Fail(ctx, what, err)
	}
	return desc, nil
}

// head asks for a manifest's headers; ok is false if they are not enough, for
// whatever reason: GET tells more.
func (s *session) head(ctx context.Context, t target) (desc ocispec.Descriptor, ok bool) {
	req, err := wire.Request(ctx, http.MethodHead, s.URL("/manifests/"+t.id()))
	if err != nil {
		return desc, false
	}
	req.Header.Set("Accept", accepted)
	resp, err := s.Send(req, http.StatusOK)
	if err != nil {
		return desc, false
	}
	defer wire.Drain(resp)
	desc = ocispec.Descriptor{
		MediaType: mediaType(resp.Header.Get("Content-Type")),
		Digest:    digest.Digest(resp.Header.Get("Docker-Content-Digest")),
		Size:      resp.ContentLength,
	}
	known := image.IsIndex(desc.MediaType) || image.IsManifest(desc.MediaType)
	if !known || desc.Digest.Validate() != nil || desc.Size <= 0 || t.digest != "" && desc.Digest != t.digest {
		return desc, false
	}
	return desc, true
}
