package image

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/kiln-build/kiln/internal/store"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// dockerManifestFile says in docker's own archives which images there are.
const dockerManifestFile = "manifest.json"

// dockerImage is one entry of it.
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func parseDockerManifest(b []byte) ([]dockerImage, error) {
	var images []dockerImage
	if err := json.Unmarshal(b, &images); err != nil {
		return nil, fmt.Errorf("%s is not valid: %w", dockerManifestFile, err)
	}
	if len(images) == 0 {
		return nil, fmt.Errorf("%s names no image", dockerManifestFile)
	}
	for _, im := range images {
		if len(im.Layers) > MaxLayers || len(im.RepoTags) > maxIndexEntries {
			return nil, fmt.Errorf("%s has an image with %d layers and %d names", dockerManifestFile, len(im.Layers), len(im.RepoTags))
		}
	}
	return images, nil
}

// docker makes manifests for the images of an archive that has none.
func (a *archive) docker() ([]Loaded, error) {
	images, err := parseDockerManifest(a.texts[dockerManifestFile])
	if err != nil {
		return nil, err
	}
	var loaded []Loaded
	var tags []func() error // all or nothing: names come last
	for _, im := range images {
		img, err := a.dockerImage(im)
		if err != nil {
			return nil, err
		}
		d, err := Keep(a.st, img)
		if err != nil {
			return nil, err
		}
		var refs []string
		for _, t := range im.RepoTags {
			ref, err := Normalize(t)
			if err != nil {
				return nil, err
			}
			refs = append(refs, ref)
			loaded = append(loaded, Loaded{Ref: ref, Digest: d.Digest, ID: img.ID()})
		}
		if len(refs) == 0 {
			loaded = append(loaded, Loaded{Digest: d.Digest, ID: img.ID()})
		}
		tags = append(tags, func() error { return Tag(a.st, d, refs...) })
	}
	for _, tag := range tags {
		if err := tag(); err != nil {
			return nil, err
		}
	}
	return loaded, nil
}

func (a *archive) dockerImage(im dockerImage) (*Image, error) {
	f, err := a.find(im.Config)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	config, err := a.st.ReadBlob(f.digest, MaxConfig)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	c, err := ParseConfig(config)
	if err != nil {
		return nil, err
	}
	if len(c.RootFS.DiffIDs) != len(im.Layers) {
		return nil, fmt.Errorf("%s gives an image %d layers, but its config %d", dockerManifestFile, len(im.Layers), len(c.RootFS.DiffIDs))
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: MediaTypeDockerManifest,
		Config:    ocispec.Descriptor{MediaType: MediaTypeDockerConfig, Digest: f.digest, Size: f.size},
		Layers:    []ocispec.Descriptor{},
	}
	for i, name := range im.Layers {
		d, err := a.dockerLayer(name, c.RootFS.DiffIDs[i])
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w", i+1, err)
		}
		m.Layers = append(m.Layers, d)
	}
	raw, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, err
	}
	return New(ocispec.Descriptor{MediaType: m.MediaType}, raw, config, "")
}

// dockerLayer describes a layer, which may be compressed or not.
func (a *archive) dockerLayer(name string, diffID digest.Digest) (ocispec.Descriptor, error) {
	f, err := a.find(name)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	c, err := sniff(a.st, f.digest)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if c == "" && diffID.Algorithm() == f.digest.Algorithm() && f.digest != diffID {
		return ocispec.Descriptor{}, fmt.Errorf("%w: its config says %s, and %q has %s", store.ErrMismatch, diffID, clip(name), f.digest)
	}
	return ocispec.Descriptor{MediaType: layerMediaType(c, true), Digest: f.digest, Size: f.size}, nil
}

// sniff tells a blob's compression from its first bytes.
func sniff(st *store.Store, d digest.Digest) (string, error) {
	r, err := st.OpenBlob(d)
	if err != nil {
		return "", err
	}
	defer r.Close()
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return "", err
	}
	switch {
	case head[0] == 0x1f && head[1] == 0x8b:
		return "gzip", nil
	case head == [4]byte{0x28, 0xb5, 0x2f, 0xfd}:
		return "zstd", nil
	}
	return "", nil
}

// partsOf lists the descriptors in a manifest of any kind.
func partsOf(raw []byte) []ocispec.Descriptor {
	var m struct {
		Config *ocispec.Descriptor  `json:"config"`
		Layers []ocispec.Descriptor `json:"layers"`
		Blobs  []ocispec.Descriptor `json:"blobs"`
	}
	if json.Unmarshal(raw, &m) != nil {
		return nil
	}
	parts := append(m.Layers, m.Blobs...)
	if m.Config != nil {
		parts = append(parts, *m.Config)
	}
	return parts
}
