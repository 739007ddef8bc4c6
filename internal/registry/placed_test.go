package registry_test

import (
	"bytes"
	"context"
	"io"
	"sync"
	"testing"

	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/registry/registrytest"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestBlobIsSentOnce to a registry, for however many repositories, at the same time too.
func TestBlobIsSentOnce(t *testing.T) {
	reg := registrytest.New(t, registrytest.Options{})
	c := newClient(t)
	blob := noise(t, 100_000)
	desc := ocispec.Descriptor{Digest: digest.FromBytes(blob), Size: int64(len(blob))}
	var wg sync.WaitGroup
	for _, repo := range []string{"team/app", "team/cache", "other"} {
		p, err := c.Pusher(context.Background(), reg.Host()+"/"+repo+":1")
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(blob)), nil }
				if _, err := p.Blob(context.Background(), desc, "", open, nil); err != nil {
					t.Error(err)
				}
			}()
		}
	}
	wg.Wait()
	if n := reg.Counts(); n.BlobPuts != 1 || n.BlobMounts != 2 {
		t.Errorf("%+v", n)
	}
}

func TestDocument(t *testing.T) {
	reg := registrytest.New(t, registrytest.Options{})
	c := newClient(t)
	if _, _, err := c.Document(context.Background(), reg.Host()+"/nosuch:1"); !registry.NotFound(err) {
		t.Error(err)
	}
	p, err := c.Pusher(context.Background(), reg.Host()+"/a:1")
	if err != nil {
		t.Fatal(err)
	}
	config := []byte(`{"anything":true}`)
	desc := ocispec.Descriptor{MediaType: "application/vnd.example+json", Digest: digest.FromBytes(config), Size: int64(len(config))}
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(config)), nil }
	if _, err := p.Blob(context.Background(), desc, "", open, nil); err != nil {
		t.Fatal(err)
	}
	raw := toJSON(t, ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: desc, Layers: []ocispec.Descriptor{}})
	if err := p.Tag(context.Background(), ocispec.MediaTypeImageManifest, raw); err != nil {
		t.Fatal(err)
	}
	got, d, err := c.Document(context.Background(), reg.Host()+"/a:1")
	if err != nil || !bytes.Equal(got, raw) || d.Digest != digest.FromBytes(raw) {
		t.Errorf("%s %+v %v", got, d, err)
	}
	if got, err := c.Small(context.Background(), reg.Host()+"/a:1", desc, 100); err != nil || !bytes.Equal(got, config) {
		t.Errorf("%s %v", got, err)
	}
	if got, err := c.Small(context.Background(), reg.Host()+"/a:1", d, 10_000); err != nil || !bytes.Equal(got, raw) {
		t.Errorf("%s %v", got, err)
	}
	if _, err := c.Small(context.Background(), reg.Host()+"/a:1", desc, 3); err == nil {
		t.Error("more than is allowed was read")
	}
	lie := desc
	lie.Digest = digest.FromString("other")
	if _, err := c.Small(context.Background(), reg.Host()+"/a:1", lie, 100); !registry.NotFound(err) {
		t.Error(err)
	}
}
