package remote

import (
	"context"
	"errors"
	"io/fs"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/image"
)

// FuzzRecords: whatever a cache's records are, reading them ends in records that make
// sense, or in an error.
func FuzzRecords(f *testing.F) {
	d := digest.FromString("x").String()
	for _, s := range []string{
		`{"version":1,"layers":[],"records":[]}`,
		`{"version":1,"layers":[{"diffID":"` + d + `"}],"records":[{"key":"` + d + `","layers":[0,0]}]}`,
		`{"version":1,"layers":[{"diffID":"` + d + `","created":"2024-01-01T00:00:00Z","blob":0}],"records":[{"key":"` + d + `","content":"` + d + `","layers":[0],"used":-1}]}`,
		`{"version":1,"layers":[{"diffID":"` + d + `","blob":9}]}`, `null`, `[]`, `{"version":1,"records":[{"layers":[4294967295]}]}`,
	} {
		f.Add([]byte(s))
	}
	m := &ocispec.Manifest{Layers: []ocispec.Descriptor{
		{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromString("blob"), Size: 4, URLs: []string{"https://elsewhere.example"}},
	}}
	f.Fuzz(func(t *testing.T, config []byte) {
		c, err := parse(m, config)
		if err != nil {
			return
		}
		for key := range c.index {
			r := c.lookup(key, "r.example/a")
			for _, l := range r.Layers {
				if l.DiffID.Validate() != nil || len(l.Blob.URLs) > 0 || l.Built() != (l.Blob.Digest != "") {
					t.Errorf("%+v", l)
				}
			}
		}
		for _, f := range []form{{}, {index: true}, {index: true, docker: true}} {
			manifest, again, err := c.encode(f)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := loadFrom(t.Context(), documents{digest.FromBytes(again): again}, manifest.Raw); err != nil {
				t.Errorf("what was written cannot be read: %v", err)
			}
		}
	})
}

// documents is a Storage to read from.
type documents map[digest.Digest][]byte

func (d documents) Resolve(context.Context) ([]byte, ocispec.Descriptor, error) {
	return nil, ocispec.Descriptor{}, fs.ErrNotExist
}

func (d documents) Read(_ context.Context, desc ocispec.Descriptor) ([]byte, error) {
	return d[desc.Digest], nil
}

func (d documents) Put(context.Context, image.Layer) error { return nil }

func (d documents) Replace(context.Context, digest.Digest, []byte, Manifest) (bool, error) {
	return false, nil
}

func (d documents) Origin() string { return "r.example/a" }

// TestBuildKitIndex is what BuildKit writes with image-manifest=false, and not every registry takes.
func TestBuildKitIndex(t *testing.T) {
	raw := []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[` +
		`{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"` + digest.FromString("layer").String() + `","size":5},` +
		`{"mediaType":"application/vnd.buildkit.cacheconfig.v0","digest":"` + digest.FromString("{}").String() + `","size":2}]}`)
	if _, err := loadFrom(t.Context(), documents{}, raw); !errors.Is(err, errBuildKit) {
		t.Error(err)
	}
}
