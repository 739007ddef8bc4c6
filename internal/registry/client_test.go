package registry_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/registry/auth"
	"github.com/kiln-build/kiln/internal/registry/registrytest"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var amd64 = ocispec.Platform{OS: "linux", Architecture: "amd64"}

// keychain gives one user to everyone.
type keychain struct{ user, password string }

func (k keychain) Resolve(authn.Resource) (authn.Authenticator, error) {
	if k.user == "" {
		return authn.Anonymous, nil
	}
	return auth.NewCredential(k.user, k.password, "the test"), nil
}

// newClient is impatient, so that tests of failures are quick.
func newClient(t *testing.T, change ...func(*registry.Options)) *registry.Client {
	t.Helper()
	o := registry.Options{
		Keychain:     keychain{},
		Retry:        registry.Retry{Tries: 4, Base: time.Millisecond, Max: 50 * time.Millisecond},
		StallTimeout: 300 * time.Millisecond,
		CertDirs:     []string{t.TempDir()},
	}
	for _, f := range change {
		f(&o)
	}
	c, err := registry.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func as(user, password string) func(*registry.Options) {
	return func(o *registry.Options) { o.Keychain = keychain{user, password} }
}

// testImage is an image whose layers are noise.
type testImage struct {
	manifest []byte
	config   []byte
	layers   [][]byte
	doc      ocispec.Manifest
}

func noise(t *testing.T, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return b
}

func toJSON(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func describe(mediaType string, b []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
}

func newImage(t *testing.T, p ocispec.Platform, sizes ...int) *testImage {
	t.Helper()
	var img testImage
	cfg := ocispec.Image{Platform: p, RootFS: ocispec.RootFS{Type: "layers"}}
	img.doc = ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, n := range sizes {
		b := noise(t, n)
		img.layers = append(img.layers, b)
		cfg.RootFS.DiffIDs = append(cfg.RootFS.DiffIDs, digest.FromBytes(b))
		img.doc.Layers = append(img.doc.Layers, describe(ocispec.MediaTypeImageLayer, b))
	}
	img.config = toJSON(t, cfg)
	img.doc.Config = describe(ocispec.MediaTypeImageConfig, img.config)
	img.manifest = toJSON(t, img.doc)
	return &img
}

func opener(b []byte) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
}

// push pushes everything but the tag.
func (img *testImage) push(t *testing.T, p *registry.Pusher) digest.Digest {
	t.Helper()
	ctx := t.Context()
	for i, desc := range img.doc.Layers {
		if _, err := p.Blob(ctx, desc, "", opener(img.layers[i]), nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := p.Blob(ctx, img.doc.Config, "", opener(img.config), nil); err != nil {
		t.Fatal(err)
	}
	d, err := p.Manifest(ctx, ocispec.MediaTypeImageManifest, img.manifest)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func pushed(t *testing.T, c *registry.Client, ref string, sizes ...int) *testImage {
	t.Helper()
	img := newImage(t, amd64, sizes...)
	p := pusher(t, c, ref)
	img.push(t, p)
	if err := p.Tag(t.Context(), ocispec.MediaTypeImageManifest, img.manifest); err != nil {
		t.Fatal(err)
	}
	return img
}

func pusher(t *testing.T, c *registry.Client, ref string) *registry.Pusher {
	t.Helper()
	p, err := c.Pusher(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func resolve(t *testing.T, c *registry.Client, ref string) *image.Image {
	t.Helper()
	img, err := c.Resolve(t.Context(), ref, amd64)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func fetch(ctx context.Context, c *registry.Client, l image.Layer) ([]byte, error) {
	r, err := c.Fetch(ctx, l)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(r)
	return b, errors.Join(err, r.Close())
}

// wantError checks for a registry error that says all of parts and none of secrets.
func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	var d *diag.Error
	if !errors.As(err, &d) || diag.ExitCode(err) != diag.ExitRegistry {
		t.Errorf("not a registry error: %v", err)
	}
	text := err.Error()
	if d != nil {
		text += "\n" + d.Hint
	}
	for _, p := range parts {
		if !strings.Contains(text, p) {
			t.Errorf("%q is not in error:\n%s", p, text)
		}
	}
	if len(text) > 2000 {
		t.Errorf("an error of %d bytes", len(text))
	}
	t.Log(text)
}

func TestPushAndPull(t *testing.T) {
	for name, o := range map[string]registrytest.Options{
		"open":     {},
		"password": {User: "ann", Password: "s3cret!"},
		"token":    {User: "ann", Password: "s3cret!", Token: true},
		"tls":      {TLS: true},
		"tlstoken": {User: "ann", Password: "s3cret!", Token: true, TLS: true},
	} {
		t.Run(name, func(t *testing.T) {
			r := registrytest.New(t, o)
			c := newClient(t, as(o.User, o.Password), func(o *registry.Options) { o.CAFile = r.CAFile() })
			ref := r.Host() + "/team/app:v1"
			want := pushed(t, c, ref, 0, 10, 3<<20)

			got := resolve(t, c, ref)
			if got.Ref != ref || got.Digest != digest.FromBytes(want.manifest) || got.Manifest.Digest != got.Digest {
				t.Errorf("resolved to %+v", got)
			}
			if !bytes.Equal(got.RawManifest, want.manifest) || !bytes.Equal(got.RawConfig, want.config) {
				t.Error("manifest or config differ")
			}
			if p := got.Manifest.Platform; p == nil || p.Architecture != "amd64" {
				t.Errorf("platform %+v", p)
			}
			if len(got.Layers) != len(want.layers) {
				t.Fatalf("%d layers", len(got.Layers))
			}
			for i, l := range got.Layers {
				if l.Origin != r.Host()+"/team/app" || l.DiffID != digest.FromBytes(want.layers[i]) {
					t.Errorf("layer %+v", l)
				}
				b, err := fetch(t.Context(), c, l)
				if err != nil || !bytes.Equal(b, want.layers[i]) {
					t.Errorf("layer %d: %v", i, err)
				}
			}
			desc, err := c.Digest(t.Context(), ref)
			if err != nil || desc.Digest != got.Digest || desc.Size != int64(len(want.manifest)) {
				t.Errorf("Digest: %+v, %v", desc, err)
			}
			byDigest := resolve(t, c, r.Host()+"/team/app@"+got.Digest.String())
			if byDigest.Digest != got.Digest {
				t.Errorf("by digest: %+v", byDigest)
			}
		})
	}
}

func TestPushSendsNothingTwice(t *testing.T) {
	r := registrytest.New(t, registrytest.Options{User: "ann", Password: "pw", Token: true})
	c := newClient(t, as("ann", "pw"))
	img := pushed(t, c, r.Host()+"/a/one:1", 1000, 2000)
	if n := r.Counts(); n.BlobPuts != 3 || n.BlobBytesSent != 3000+int64(len(img.config)) {
		t.Errorf("first push: %+v", n)
	}

	r.ResetCounts()
	p := pusher(t, newClient(t, as("ann", "pw")), r.Host()+"/a/one:2")
	got, err := p.Blob(t.Context(), img.doc.Layers[0], "", opener(img.layers[0]), nil)
	if err != nil || got.Outcome != registry.Existed {
		t.Errorf("again: %+v, %v", got, err)
	}
	p = pusher(t, newClient(t, as("ann", "pw")), r.Host()+"/b/two:1")
	fail := func() (io.ReadCloser, error) { return nil, errors.New("must not be opened") }
	for i, from := range []string{r.Host() + "/a/one", r.Host() + "/a/one:1"} {
		got, err = p.Blob(t.Context(), img.doc.Layers[i], from, fail, nil)
		if err != nil || got.Outcome != registry.Mounted {
			t.Errorf("mount: %+v, %v", got, err)
		}
	}
	if n := r.Counts(); n.BlobPuts != 0 || n.BlobMounts != 2 {
		t.Errorf("second push: %+v", n)
	}
	// What cannot be mounted is uploaded.
	for i, from := range []string{r.Host() + "/no/such", "elsewhere.example/a/one", r.Host() + "/c/three"} {
		b := noise(t, 100+i)
		got, err := p.Blob(t.Context(), describe(ocispec.MediaTypeImageLayer, b), from, opener(b), nil)
		if err != nil || got.Outcome != registry.Uploaded || got.Bytes != int64(len(b)) {
			t.Errorf("mount from %s: %+v, %v", from, got, err)
		}
	}
}

func contextWithCause(t *testing.T) (context.Context, context.CancelCauseFunc) {
	t.Helper()
	ctx, cancel := context.WithCancelCause(t.Context())
	t.Cleanup(func() { cancel(nil) })
	return ctx, cancel
}
