package registry

import (
	"bytes"
	"encoding/json"
	"mime"
	"sort"

	"github.com/containerd/platforms"
	"github.com/kiln-build/kiln/internal/registry/wire"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Media types of docker's that OCI's spec has no constants for.
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
	dockerSchema1  = "application/vnd.docker.distribution.manifest.v1+json"
	dockerSigned1  = "application/vnd.docker.distribution.manifest.v1+prettyjws"
)

const (
	maxManifest = 8 << 20 // registries themselves take 4 MiB
	maxConfig   = 16 << 20
)

func isIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == dockerList
}

func isManifest(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageManifest || mediaType == dockerManifest
}

// document is a manifest or an index, before it is known which.
type document struct {
	SchemaVersion int                  `json:"schemaVersion"`
	MediaType     string               `json:"mediaType"`
	Config        ocispec.Descriptor   `json:"config"`
	Layers        []ocispec.Descriptor `json:"layers"`
	Manifests     []ocispec.Descriptor `json:"manifests"`
	FSLayers      json.RawMessage      `json:"fsLayers"` // of schema 1
}

// parseDocument reads what a registry calls a manifest. It refuses whatever
// could be taken for two different things, and returns its media type.
func parseDocument(raw []byte, contentType string) (*document, string, error) {
	declared, _, err := mime.ParseMediaType(contentType)
	if err != nil {
		declared = ""
	}
	if declared == dockerSchema1 || declared == dockerSigned1 {
		return nil, "", errSchema1
	}
	var d document
	if err := json.Unmarshal(raw, &d); err != nil {
		if wire.IsHTML(raw) {
			return nil, "", wire.Permanent("the answer is a web page, not a manifest")
		}
		return nil, "", wire.Permanent("the manifest is not valid JSON: %w", err)
	}
	if d.SchemaVersion == 1 || d.FSLayers != nil {
		return nil, "", errSchema1
	}
	mt := d.MediaType
	switch {
	case mt == "" && (isIndex(declared) || isManifest(declared)):
		mt = declared
	case mt == "" && d.Manifests != nil:
		mt = ocispec.MediaTypeImageIndex
	case mt == "":
		mt = ocispec.MediaTypeImageManifest
	case (isIndex(declared) || isManifest(declared)) && declared != mt:
		return nil, "", wire.Permanent("the manifest says it is %q, the registry %q", wire.Clean(mt), declared)
	}
	switch {
	case isIndex(mt) && (d.Layers != nil || d.Config.Digest != ""), isManifest(mt) && d.Manifests != nil:
		return nil, "", wire.Permanent("the manifest is an image and an index at once")
	case !isIndex(mt) && !isManifest(mt):
		return nil, "", wire.Permanent("the manifest is of type %q, which is not an image", wire.Clean(mt))
	}
	return &d, mt, d.check()
}

var errSchema1 = wire.Permanent("the image's manifest is of docker's schema 1, which ended with docker 29; push the image anew")

func (d *document) check() error {
	all := append(append([]ocispec.Descriptor{}, d.Layers...), d.Manifests...)
	if d.Config.Digest != "" || d.Manifests == nil {
		all = append(all, d.Config)
	}
	for _, desc := range all {
		if err := desc.Digest.Validate(); err != nil {
			return wire.Permanent("the manifest has the digest %q: %w", wire.Clean(string(desc.Digest)), err)
		}
		if desc.Size < 0 {
			return wire.Permanent("the manifest gives %s the size %d", desc.Digest, desc.Size)
		}
	}
	return nil
}

// choose orders the manifests of an index by how well they fit platform, the
// best first. Those that do not fit are left out.
func choose(manifests []ocispec.Descriptor, platform ocispec.Platform) []ocispec.Descriptor {
	m := platforms.Only(platforms.Normalize(platform))
	var fit, unnamed []ocispec.Descriptor
	for _, d := range manifests {
		switch {
		case !isIndex(d.MediaType) && !isManifest(d.MediaType) && d.MediaType != "":
		case d.Platform == nil:
			unnamed = append(unnamed, d)
		case m.Match(*d.Platform):
			fit = append(fit, d)
		}
	}
	sort.SliceStable(fit, func(i, j int) bool { return m.Less(*fit[i].Platform, *fit[j].Platform) })
	return append(fit, unnamed...)
}

// offered lists the platforms of an index, for an error.
func offered(manifests []ocispec.Descriptor) string {
	var b bytes.Buffer
	seen := map[string]bool{}
	for _, d := range manifests {
		if d.Platform == nil || d.Platform.OS == "unknown" {
			continue
		}
		s := wire.Clean(platforms.FormatAll(*d.Platform))
		if seen[s] || len(seen) >= 20 {
			continue
		}
		if len(seen) > 0 {
			b.WriteString(", ")
		}
		seen[s] = true
		b.WriteString(s)
	}
	if b.Len() == 0 {
		return "none"
	}
	return b.String()
}

// config is what an image's configuration must have to be one.
type config struct {
	ocispec.Platform
	RootFS struct {
		Type    string          `json:"type"`
		DiffIDs []digest.Digest `json:"diff_ids"`
	} `json:"rootfs"`
}

func parseConfig(raw []byte, d *document) (*config, error) {
	switch d.Config.MediaType {
	case ocispec.MediaTypeImageConfig, dockerConfig, "":
	default:
		return nil, wire.Permanent("it is not a container image but %q", wire.Clean(d.Config.MediaType))
	}
	var c config
	if err := json.Unmarshal(raw, &c); err != nil {
		return nil, wire.Permanent("the image's config is not valid JSON: %w", err)
	}
	if len(c.RootFS.DiffIDs) != len(d.Layers) {
		return nil, wire.Permanent("the image has %d layers, but its config %d", len(d.Layers), len(c.RootFS.DiffIDs))
	}
	for _, id := range c.RootFS.DiffIDs {
		if err := id.Validate(); err != nil {
			return nil, wire.Permanent("the image's config has the layer %q: %w", wire.Clean(string(id)), err)
		}
	}
	return &c, nil
}

// verify checks bytes against a digest, which may be of any known algorithm.
func verify(raw []byte, want digest.Digest) error {
	if err := want.Validate(); err != nil {
		return wire.Permanent("digest %q: %w", wire.Clean(string(want)), err)
	}
	if got := want.Algorithm().FromBytes(raw); got != want {
		return wire.Permanent("the content has digest %s, not %s", got, want)
	}
	return nil
}
