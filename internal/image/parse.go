package image

import (
	"encoding/json"
	"errors"
	"fmt"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Bounds of what is accepted from outside.
const (
	MaxManifest = 4 << 20 // what registries take
	MaxConfig   = 8 << 20
	MaxLayers   = 10_000
	// MaxDockerLayers is the number of layers up to which an image runs
	// with docker's overlay2 driver.
	MaxDockerLayers = 127

	maxIndexEntries = 10_000
)

// Config is an image's configuration, docker's extensions included.
type Config = dockerspec.DockerOCIImage

// document is what a manifest or an index may have, before it is known which
// of the two it is.
type document struct {
	SchemaVersion int             `json:"schemaVersion"`
	MediaType     string          `json:"mediaType"`
	Config        json.RawMessage `json:"config"`
	Layers        json.RawMessage `json:"layers"`
	Manifests     json.RawMessage `json:"manifests"`
	FSLayers      json.RawMessage `json:"fsLayers"`
	Signatures    json.RawMessage `json:"signatures"`
}

// DocumentType says whether raw is a manifest or an index, as its media type.
// declared is what came with it, from a descriptor or a header; may be empty.
// What could be taken for both is refused: two tools would see two images.
func DocumentType(raw []byte, declared string) (string, error) {
	if len(raw) > MaxManifest {
		return "", fmt.Errorf("the manifest has %d bytes, more than %d", len(raw), MaxManifest)
	}
	var d document
	if err := json.Unmarshal(raw, &d); err != nil {
		return "", fmt.Errorf("the manifest is not valid JSON: %w", err)
	}
	if d.SchemaVersion == 1 || d.FSLayers != nil || d.Signatures != nil || declared == mediaTypeDockerSchema1 || declared == mediaTypeDockerSigned1 {
		return "", errors.New("the image's manifest is of docker's old schema 1, which no current tool makes: build or push the image again with one")
	}
	known := func(t string) bool { return IsIndex(t) || IsManifest(t) }
	mt := d.MediaType
	switch {
	case mt == "" && known(declared):
		mt = declared
	case mt == "" && d.Manifests != nil:
		mt = ocispec.MediaTypeImageIndex
	case mt == "":
		mt = ocispec.MediaTypeImageManifest
	case known(declared) && declared != mt:
		return "", fmt.Errorf("the manifest says that it is %q, but it was announced as %q", clip(mt), clip(declared))
	}
	switch {
	case !known(mt):
		return "", fmt.Errorf("the manifest is of type %q, which is not an image", clip(mt))
	case IsIndex(mt) && (d.Layers != nil || d.Config != nil), IsManifest(mt) && d.Manifests != nil:
		return "", errors.New("the manifest is one image and an index of several at once")
	}
	return mt, nil
}

// ParseManifest reads the manifest of one image and checks it: descriptors
// valid, layers of known types. declared is as in DocumentType. The
// result's MediaType is set.
func ParseManifest(raw []byte, declared string) (*ocispec.Manifest, error) {
	mt, err := DocumentType(raw, declared)
	if err != nil {
		return nil, err
	}
	if !IsManifest(mt) {
		return nil, errors.New("the manifest is an index of several images, not one image")
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, fmt.Errorf("the manifest is not valid: %w", err)
	}
	m.MediaType = mt
	switch m.Config.MediaType {
	case ocispec.MediaTypeImageConfig, MediaTypeDockerConfig, "":
	default:
		what := m.ArtifactType
		if what == "" {
			what = m.Config.MediaType
		}
		return nil, fmt.Errorf("it is not a container image, but has content of type %q", clip(what))
	}
	if err := checkDescriptor("config", m.Config); err != nil {
		return nil, err
	}
	if m.Config.Size > MaxConfig {
		return nil, fmt.Errorf("the image's config has %d bytes, more than %d", m.Config.Size, MaxConfig)
	}
	if len(m.Layers) > MaxLayers {
		return nil, fmt.Errorf("the image has %d layers, more than %d", len(m.Layers), MaxLayers)
	}
	known := knownLayerTypes()
	for i, l := range m.Layers {
		if err := checkDescriptor(fmt.Sprintf("layer %d", i+1), l); err != nil {
			return nil, err
		}
		if _, ok := known[l.MediaType]; !ok {
			return nil, fmt.Errorf("layer %d of the image has the unknown type %q", i+1, clip(l.MediaType))
		}
	}
	return &m, nil
}

// ParseIndex reads an index (a "manifest list" in docker's words) and checks it.
func ParseIndex(raw []byte, declared string) (*ocispec.Index, error) {
	mt, err := DocumentType(raw, declared)
	if err != nil {
		return nil, err
	}
	if !IsIndex(mt) {
		return nil, errors.New("the manifest is one image, not an index of several")
	}
	var idx ocispec.Index
	if err := json.Unmarshal(raw, &idx); err != nil {
		return nil, fmt.Errorf("the index is not valid: %w", err)
	}
	idx.MediaType = mt
	if len(idx.Manifests) > maxIndexEntries {
		return nil, fmt.Errorf("the index has %d entries, more than %d", len(idx.Manifests), maxIndexEntries)
	}
	for i, d := range idx.Manifests {
		if err := checkDescriptor(fmt.Sprintf("entry %d of the index", i+1), d); err != nil {
			return nil, err
		}
	}
	return &idx, nil
}

// ParseConfig reads an image's configuration and checks what Kiln relies on.
func ParseConfig(raw []byte) (*Config, error) {
	if len(raw) > MaxConfig {
		return nil, fmt.Errorf("the image's config has %d bytes, more than %d", len(raw), MaxConfig)
	}
	var c *Config
	if err := json.Unmarshal(raw, &c); err != nil {
		return nil, fmt.Errorf("the image's config is not valid: %w", err)
	}
	if c == nil {
		return nil, errors.New("the image's config is null")
	}
	if len(c.RootFS.DiffIDs) > MaxLayers {
		return nil, fmt.Errorf("the image's config has %d layers, more than %d", len(c.RootFS.DiffIDs), MaxLayers)
	}
	for i, d := range c.RootFS.DiffIDs {
		if err := checkDigest(d); err != nil {
			return nil, fmt.Errorf("layer %d in the image's config: %w", i+1, err)
		}
	}
	return c, nil
}

func checkDescriptor(what string, d ocispec.Descriptor) error {
	if err := checkDigest(d.Digest); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if d.Size < 0 {
		return fmt.Errorf("%s: the size is %d", what, d.Size)
	}
	return nil
}

func checkDigest(d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w", clip(string(d)), err)
	}
	return nil
}

// New puts an image together from its manifest and config: what each says
// must fit the other. desc describes the manifest; origin is where the layers
// can be fetched ("" if only the store may have them).
func New(desc ocispec.Descriptor, rawManifest, rawConfig []byte, origin string) (*Image, error) {
	m, err := ParseManifest(rawManifest, desc.MediaType)
	if err != nil {
		return nil, err
	}
	if err := verify(rawConfig, m.Config); err != nil {
		return nil, fmt.Errorf("the image's config: %w", err)
	}
	c, err := ParseConfig(rawConfig)
	if err != nil {
		return nil, err
	}
	if len(m.Layers) != len(c.RootFS.DiffIDs) {
		return nil, fmt.Errorf("the image's manifest has %d layers, but its config %d", len(m.Layers), len(c.RootFS.DiffIDs))
	}
	desc.MediaType, desc.Digest, desc.Size = m.MediaType, digest.FromBytes(rawManifest), int64(len(rawManifest))
	desc.Platform = &ocispec.Platform{
		OS: c.OS, Architecture: c.Architecture, Variant: c.Variant, OSVersion: c.OSVersion, OSFeatures: c.OSFeatures,
	}
	img := &Image{Digest: desc.Digest, Manifest: desc, RawManifest: rawManifest, RawConfig: rawConfig}
	for i, l := range m.Layers {
		img.Layers = append(img.Layers, Layer{DiffID: c.RootFS.DiffIDs[i], Blob: l, Origin: origin})
	}
	return img, nil
}

// ID is what docker calls the image's ID: the digest of its config.
func (img *Image) ID() digest.Digest { return digest.FromBytes(img.RawConfig) }

// Warnings says what may keep an image from running somewhere.
func (img *Image) Warnings() []string {
	if n := len(img.Layers); n > MaxDockerLayers {
		return []string{fmt.Sprintf("the image has %d layers; docker can run images of at most %d", n, MaxDockerLayers)}
	}
	return nil
}

// verify compares bytes with a descriptor.
func verify(b []byte, d ocispec.Descriptor) error {
	if err := checkDigest(d.Digest); err != nil {
		return err
	}
	if int64(len(b)) != d.Size {
		return fmt.Errorf("it has %d bytes, and %d were announced (%s)", len(b), d.Size, d.Digest)
	}
	if got := d.Digest.Algorithm().FromBytes(b); got != d.Digest {
		return fmt.Errorf("its digest is %s, and %s was announced", got, d.Digest)
	}
	return nil
}
