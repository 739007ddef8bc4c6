package remote

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/image"
)

// TestForms: one cache in each form. What it says is the same, whatever the media types of its layers were.
func TestForms(t *testing.T) {
	key := digest.FromString("key")
	var c contents
	for i, mediaType := range []string{ocispec.MediaTypeImageLayerGzip, image.MediaTypeDockerLayerZstd} {
		c.layers = append(c.layers, image.Layer{
			DiffID: digest.FromString(mediaType), Created: time.Unix(int64(i), 0).UTC(),
			Blob: ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromString("blob of " + mediaType), Size: 7},
		})
	}
	c.add(entry{key: key, layers: []uint32{0, 1}, used: time.Unix(5, 0)})
	oci := []string{ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd}
	docker := []string{image.MediaTypeDockerLayerGzip, image.MediaTypeDockerLayerZstd}
	for _, w := range []struct {
		form      form
		mediaType string
		layers    []string
	}{
		{form{}, ocispec.MediaTypeImageManifest, oci},
		{form{index: true}, ocispec.MediaTypeImageIndex, oci},
		{form{index: true, docker: true}, image.MediaTypeDockerList, docker},
	} {
		m, config, err := c.encode(w.form)
		if err != nil {
			t.Fatal(err)
		}
		var doc struct {
			MediaType string
			Config    *ocispec.Descriptor
			Layers    []ocispec.Descriptor
			Manifests []ocispec.Descriptor
		}
		if err := json.Unmarshal(m.Raw, &doc); err != nil {
			t.Fatal(err)
		}
		if w.form.index {
			last := len(doc.Manifests) - 1
			doc.Config, doc.Layers = &doc.Manifests[last], doc.Manifests[:last]
		}
		if doc.MediaType != w.mediaType || m.Type != w.mediaType || doc.Config.MediaType != MediaType || len(doc.Layers) != 2 || len(m.Layers) != 2 {
			t.Errorf("%+v: %s", w.form, m.Raw)
			continue
		}
		for i, l := range doc.Layers {
			if l.MediaType != w.layers[i] || l.Digest != c.layers[i].Blob.Digest {
				t.Errorf("%+v: layer %d is %+v", w.form, i, l)
			}
		}
		got, err := loadFrom(t.Context(), documents{digest.FromBytes(config): config}, m.Raw)
		if err != nil {
			t.Fatal(err)
		}
		if r := got.lookup(key, ""); r == nil || len(r.Layers) != 2 || r.Layers[1].DiffID != c.layers[1].DiffID {
			t.Errorf("%+v: found %+v", w.form, r)
		}
	}
}
