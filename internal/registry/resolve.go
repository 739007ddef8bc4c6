package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/containerd/platforms"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/registry/wire"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// accepted are the manifests that are asked for; schema 1 among them so that it
// can be refused by name rather than not be found.
var accepted = strings.Join([]string{
	ocispec.MediaTypeImageIndex, dockerList, ocispec.MediaTypeImageManifest, dockerManifest,
	dockerSigned1 + ";q=0.1", dockerSchema1 + ";q=0.1",
}, ", ")

// maxNested is how many indexes may be inside each other.
const maxNested = 3

// maxUnnamed is how many manifests that do not say their platform are looked at.
const maxUnnamed = 8

// Resolve gets an image's manifest and config for a platform, verified, and no
// layer. A ref that names a manifest rather than an index gives that image,
// whatever its platform, as docker does: see Image.Manifest.Platform.
func (c *Client) Resolve(ctx context.Context, ref string, platform ocispec.Platform) (*image.Image, error) {
	t, err := parseTarget(ref)
	if err != nil {
		return nil, err
	}
	s, err := c.pull(ctx, t)
	what := fmt.Sprintf("resolve image %q", t.named)
	if err != nil {
		return nil, s.Fail(ctx, what, err)
	}
	raw, desc, err := s.manifest(ctx, t.id(), t.digest)
	if err != nil {
		return nil, s.Fail(ctx, what, err)
	}
	r := &resolver{s: s, platform: platform, origin: t.named.Name()}
	img, err := r.image(ctx, raw, desc, 0)
	if err != nil {
		return nil, s.Fail(ctx, what, err)
	}
	img.Ref, img.Digest = t.named.String(), desc.Digest
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

type resolver struct {
	s        *session
	platform ocispec.Platform
	origin   string // of the layers
}

var errNoPlatform = errors.New("no image for this platform")

// image follows indexes from a manifest to one image.
func (r *resolver) image(ctx context.Context, raw []byte, desc ocispec.Descriptor, depth int) (*image.Image, error) {
	doc, mediaType, err := parseDocument(raw, desc.MediaType)
	if err != nil {
		return nil, err
	}
	desc.MediaType = mediaType
	if isManifest(mediaType) {
		return r.leaf(ctx, raw, desc, doc)
	}
	if depth >= maxNested {
		return nil, wire.Permanent("more than %d indexes inside each other", maxNested)
	}
	unnamed := 0
	for _, d := range choose(doc.Manifests, r.platform) {
		if d.Platform == nil {
			if unnamed++; unnamed > maxUnnamed {
				break
			}
		}
		raw, got, err := r.s.manifest(ctx, d.Digest.String(), d.Digest)
		if err != nil {
			return nil, err
		}
		if got.Size != d.Size {
			return nil, wire.Permanent("manifest %s has %d bytes, the index says %d", d.Digest, got.Size, d.Size)
		}
		if d.MediaType != "" {
			got.MediaType = d.MediaType // the index is verified, the header is not
		}
		img, err := r.image(ctx, raw, got, depth+1)
		if errors.Is(err, errNoPlatform) {
			continue
		}
		if err == nil && d.Platform == nil && !platforms.Only(r.platform).Match(*img.Manifest.Platform) {
			continue
		}
		return img, err
	}
	want := platforms.FormatAll(r.platform)
	return nil, &diag.Error{
		Err:  fmt.Errorf("%w: it has %s, not %s", errNoPlatform, offered(doc.Manifests), want),
		Hint: "Choose one of its platforms with --platform, or another image.",
		Code: diag.ExitRegistry,
	}
}

// leaf is the image that a manifest describes.
func (r *resolver) leaf(ctx context.Context, raw []byte, desc ocispec.Descriptor, doc *document) (*image.Image, error) {
	if doc.Config.Size > maxConfig {
		return nil, wire.Permanent("the image's config has %d bytes, more than %d", doc.Config.Size, maxConfig)
	}
	var rawConfig []byte
	err := r.s.net.Retry(ctx, "get config", func(ctx context.Context) (err error) {
		rawConfig, err = r.s.small(ctx, doc.Config)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("get the image's config: %w", err)
	}
	cfg, err := parseConfig(rawConfig, doc)
	if err != nil {
		return nil, err
	}
	desc.Platform = &cfg.Platform
	img := &image.Image{Manifest: desc, RawManifest: raw, RawConfig: rawConfig}
	for i, l := range doc.Layers {
		img.Layers = append(img.Layers, image.Layer{
			DiffID: cfg.RootFS.DiffIDs[i],
			Blob:   l,
			Origin: r.origin,
		})
	}
	return img, nil
}

// manifest gets a manifest by tag or digest, verified, with want if that is given.
func (s *session) manifest(ctx context.Context, id string, want digest.Digest) (raw []byte, desc ocispec.Descriptor, err error) {
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
		if raw, err = readAll(resp, maxManifest, "manifest"); err != nil {
			return err
		}
		dgst, err := manifestDigest(raw, want, resp.Header)
		desc = ocispec.Descriptor{MediaType: resp.Header.Get("Content-Type"), Digest: dgst, Size: int64(len(raw))}
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
		if contentIsSchema1(h.Get("Content-Type")) { // whose digest is not that of its bytes
			return claimed, nil
		}
		return claimed, verify(raw, claimed)
	}
	return digest.FromBytes(raw), nil
}

func contentIsSchema1(contentType string) bool {
	return strings.HasPrefix(contentType, dockerSigned1) || strings.HasPrefix(contentType, dockerSchema1)
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
	what := fmt.Sprintf("look up image %q", t.named)
	s, err := c.pull(ctx, t)
	if err != nil {
		return ocispec.Descriptor{}, s.Fail(ctx, what, err)
	}
	if desc, ok := s.head(ctx, t); ok {
		return desc, nil
	}
	raw, desc, err := s.manifest(ctx, t.id(), t.digest)
	if err != nil {
		return ocispec.Descriptor{}, s.Fail(ctx, what, err)
	}
	if _, desc.MediaType, err = parseDocument(raw, desc.MediaType); err != nil {
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
		MediaType: resp.Header.Get("Content-Type"),
		Digest:    digest.Digest(resp.Header.Get("Docker-Content-Digest")),
		Size:      resp.ContentLength,
	}
	known := isIndex(desc.MediaType) || isManifest(desc.MediaType)
	if !known || desc.Digest.Validate() != nil || desc.Size <= 0 || t.digest != "" && desc.Digest != t.digest {
		return desc, false
	}
	return desc, true
}
