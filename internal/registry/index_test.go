package registry_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/registry/registrytest"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func index(t *testing.T, manifests ...ocispec.Descriptor) []byte {
	t.Helper()
	return toJSON(t, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: manifests,
	})
}

func platform(s string) ocispec.Platform {
	f := strings.Split(s+"//", "/")
	return ocispec.Platform{OS: f[0], Architecture: f[1], Variant: f[2]}
}

func TestPlatforms(t *testing.T) {
	r := registrytest.New(t, registrytest.Options{})
	c := newClient(t)
	ref := r.Host() + "/a/b:c"
	p := pusher(t, c, ref)
	images := map[string]digest.Digest{}
	push := func(platforms ...string) (descs []ocispec.Descriptor) {
		for _, s := range platforms {
			pf := platform(s)
			img := newImage(t, pf, 10)
			images[s] = img.push(t, p)
			d := describe(ocispec.MediaTypeImageManifest, img.manifest)
			if s != "unknown/unknown" {
				d.Platform = &pf
			} else {
				d.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
			}
			descs = append(descs, d)
		}
		return descs
	}
	tag := func(raw []byte) {
		t.Helper()
		if err := p.Tag(t.Context(), ocispec.MediaTypeImageIndex, raw); err != nil {
			t.Fatal(err)
		}
	}
	check := func(want, name string) {
		t.Helper()
		img, err := c.Resolve(t.Context(), ref, platform(want))
		if err != nil {
			t.Errorf("%s: %v", want, err)
			return
		}
		if img.Manifest.Digest != images[name] {
			t.Errorf("%s: got %+v", want, img.Manifest)
		}
	}
	descs := push("unknown/unknown", "linux/386", "linux/arm/v6", "linux/arm/v7", "linux/arm64/v8", "windows/amd64", "linux/amd64")
	raw := index(t, descs...)
	tag(raw)
	for want, name := range map[string]string{
		"linux/amd64": "linux/amd64", "linux/arm64": "linux/arm64/v8", "linux/arm64/v8": "linux/arm64/v8",
		"linux/arm/v7": "linux/arm/v7", "linux/arm/v6": "linux/arm/v6", "linux/arm": "linux/arm/v7",
	} {
		check(want, name)
	}
	img := resolve(t, c, ref)
	if img.Digest != digest.FromBytes(raw) {
		t.Errorf("digest %s is not the index's", img.Digest)
	}
	_, err := c.Resolve(t.Context(), ref, platform("linux/s390x"))
	wantError(t, err, "linux/amd64", "linux/s390x is wanted", "--platform")
	if strings.Contains(err.Error(), "unknown") {
		t.Error("offers an attestation")
	}

	// Indexes in indexes, and manifests that do not say what they are for.
	inner := index(t, descs[6])
	if _, err := p.Manifest(t.Context(), ocispec.MediaTypeImageIndex, inner); err != nil {
		t.Fatal(err)
	}
	unnamed := descs[4]
	unnamed.Platform = nil
	tag(index(t, unnamed, describe(ocispec.MediaTypeImageIndex, inner)))
	check("linux/arm64", "linux/arm64/v8")
	check("linux/amd64", "linux/amd64")
	_, err = c.Resolve(t.Context(), ref, platform("linux/s390x"))
	wantError(t, err, "no image for this platform")

	// An index that is wrong about a size.
	lying := descs[6]
	lying.Size++
	tag(index(t, lying))
	_, err = c.Resolve(t.Context(), ref, amd64)
	wantError(t, err, "were announced")

	// A single manifest is what it is.
	single := newImage(t, platform("linux/arm64"), 10)
	single.push(t, p)
	if err := p.Tag(t.Context(), ocispec.MediaTypeImageManifest, single.manifest); err != nil {
		t.Fatal(err)
	}
	if img := resolve(t, c, ref); img.Manifest.Platform.Architecture != "arm64" {
		t.Errorf("%+v", img.Manifest)
	}
}

func TestNestedIndexesEnd(t *testing.T) {
	r := registrytest.New(t, registrytest.Options{})
	c := newClient(t)
	p := pusher(t, c, r.Host()+"/a/b:c")
	raw := index(t)
	for range 10 {
		if _, err := p.Manifest(t.Context(), ocispec.MediaTypeImageIndex, raw); err != nil {
			t.Fatal(err)
		}
		d := describe(ocispec.MediaTypeImageIndex, raw)
		d.Platform = &amd64
		raw = index(t, d)
	}
	if err := p.Tag(t.Context(), ocispec.MediaTypeImageIndex, raw); err != nil {
		t.Fatal(err)
	}
	_, err := c.Resolve(t.Context(), r.Host()+"/a/b:c", amd64)
	wantError(t, err, "indexes inside each other")
	if n := r.Counts().ManifestGets; n > 6 {
		t.Errorf("%d manifests were asked for", n)
	}
}

func TestCertsOfHosts(t *testing.T) {
	r := registrytest.New(t, registrytest.Options{TLS: true})
	dir := t.TempDir()
	with := func(o *registry.Options) { o.CertDirs = []string{dir} }
	if err := os.MkdirAll(filepath.Join(dir, r.Host()), 0o700); err != nil {
		t.Fatal(err)
	}
	_, err := newClient(t, with).Pusher(t.Context(), r.Host()+"/a/b")
	wantError(t, err, "certificate")
	pem, err := os.ReadFile(r.CAFile())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, r.Host(), "ca.crt"), pem, 0o600); err != nil {
		t.Fatal(err)
	}
	pusher(t, newClient(t, with), r.Host()+"/a/b")
	if err := os.WriteFile(filepath.Join(dir, r.Host(), "client.cert"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = newClient(t, with).Pusher(t.Context(), r.Host()+"/a/b")
	wantError(t, err, "client certificate")
}
