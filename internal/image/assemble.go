package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// NewLayer is a layer on its way into an image, with what is noted about it
// if the frontend's history does not say so.
type NewLayer struct {
	Layer
	Created   *time.Time
	CreatedBy string
}

// AssembleOptions says what an image is made of.
type AssembleOptions struct {
	// Config is the image config as the frontend wrote it, docker's or
	// OCI's: its history without the times of what is new. Fields that
	// nobody here knows are kept as they are.
	Config []byte
	// BaseConfig is the config of the base image, if there is one: the times in
	// its history are not changed by Epoch.
	BaseConfig []byte
	// Layers are all layers, the base image's too. Each has its Blob.
	Layers []NewLayer
	// Epoch is SOURCE_DATE_EPOCH: nothing new is younger than that.
	Epoch *time.Time
	// Rewritten says that the new layers have no files younger than Epoch either, which is noted on each.
	Rewritten bool
	// Annotations go into the manifest.
	Annotations map[string]string
	// DockerTypes asks for docker's media types instead of OCI's.
	DockerTypes bool
	// Extra are further fields of the config.
	Extra map[string]json.RawMessage
}

// annotationRewritten is on layers whose files' times were made to be no later than its value, a Unix time.
const annotationRewritten = "buildkit/rewritten-timestamp"

// Assemble makes the config and manifest of an image, byte by byte as BuildKit's
// exporter does. The same options give the same bytes: it asks no clock.
func Assemble(opt AssembleOptions) (*Image, error) {
	if opt.DockerTypes && len(opt.Annotations) > 0 {
		return nil, errors.New("assemble image: docker's manifests have no annotations; use OCI media types")
	}
	if len(opt.Layers) > MaxLayers {
		return nil, fmt.Errorf("assemble image: %d layers are more than %d", len(opt.Layers), MaxLayers)
	}
	for i, l := range opt.Layers {
		if l.Blob.Digest == "" || l.DiffID == "" {
			return nil, fmt.Errorf("assemble image: layer %d has no blob yet", i+1)
		}
	}
	config, err := patchConfig(opt)
	if err != nil {
		return nil, fmt.Errorf("assemble image: %w", err)
	}
	m := ocispec.Manifest{
		Versioned:   specs.Versioned{SchemaVersion: 2},
		MediaType:   ocispec.MediaTypeImageManifest,
		Annotations: opt.Annotations,
		Config: ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageConfig,
			Digest:    digest.FromBytes(config),
			Size:      int64(len(config)),
		},
		Layers: []ocispec.Descriptor{},
	}
	if opt.DockerTypes {
		m.MediaType, m.Config.MediaType = MediaTypeDockerManifest, MediaTypeDockerConfig
	}
	for _, l := range opt.Layers {
		d := manifestLayer(l.Blob, opt.DockerTypes)
		if opt.Rewritten && opt.Epoch != nil && !opt.DockerTypes && l.Built() {
			d.Annotations = maps.Clone(d.Annotations)
			if d.Annotations == nil {
				d.Annotations = map[string]string{}
			}
			d.Annotations[annotationRewritten] = strconv.FormatInt(opt.Epoch.Unix(), 10)
		}
		m.Layers = append(m.Layers, d)
	}
	raw, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("assemble image: %w", err)
	}
	img, err := New(ocispec.Descriptor{MediaType: m.MediaType}, raw, config, "")
	if err != nil {
		return nil, fmt.Errorf("assemble image: %w", err)
	}
	for i := range img.Layers {
		img.Layers[i].Origin, img.Layers[i].Created = opt.Layers[i].Origin, opt.Layers[i].Layer.Created
	}
	return img, nil
}

// manifestLayer is a layer's descriptor as a manifest has it.
func manifestLayer(d ocispec.Descriptor, docker bool) ocispec.Descriptor {
	out := ocispec.Descriptor{
		MediaType: ConvertLayerType(d.MediaType, docker), Digest: d.Digest, Size: d.Size, URLs: d.URLs,
	}
	for k, v := range d.Annotations {
		if docker || k == "buildkit/createdat" || strings.HasPrefix(k, "containerd.io/") {
			continue
		}
		if out.Annotations == nil {
			out.Annotations = map[string]string{}
		}
		out.Annotations[k] = v
	}
	return out
}

// patchConfig sets rootfs, history and created in the frontend's config.
func patchConfig(opt AssembleOptions) ([]byte, error) {
	if len(opt.Config) > MaxConfig {
		return nil, fmt.Errorf("the image's config has %d bytes, more than %d", len(opt.Config), MaxConfig)
	}
	var known ocispec.Image
	if err := json.Unmarshal(opt.Config, &known); err != nil {
		return nil, fmt.Errorf("the image's config is not valid: %w", err)
	}
	m := map[string]json.RawMessage{}
	if err := json.Unmarshal(opt.Config, &m); err != nil {
		return nil, fmt.Errorf("the image's config is not valid: %w", err)
	}
	if known.OS == "" || known.Architecture == "" {
		return nil, errors.New("the image's config lacks os or architecture")
	}
	base, err := baseHistory(opt.BaseConfig)
	if err != nil {
		return nil, err
	}
	history := completeHistory(known.History, opt.Layers)
	if opt.Epoch != nil {
		clampHistory(history, base, *opt.Epoch)
	}
	root := ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{}}
	for _, l := range opt.Layers {
		root.DiffIDs = append(root.DiffIDs, l.DiffID)
	}
	set := map[string]any{"rootfs": root, "history": history}
	if created := createdTime(known.Created, m["created"] != nil, history, opt.Epoch); created != known.Created || created == nil {
		set["created"] = created
	}
	maps.Copy(m, opt.Extra)
	for k, v := range set {
		if m[k], err = json.Marshal(v); err != nil {
			return nil, fmt.Errorf("write %s of the image's config: %w", k, err)
		}
	}
	return json.Marshal(m)
}

// createdTime is when the image was made: as its config says, or else when
// its last layer was; not after the epoch.
func createdTime(said *time.Time, isSaid bool, history []ocispec.History, epoch *time.Time) *time.Time {
	created := said
	if !isSaid {
		for _, h := range history {
			if h.Created != nil {
				created = h.Created
			}
		}
	}
	if created != nil && epoch != nil && created.After(*epoch) {
		created = epoch
	}
	return created
}

func baseHistory(config []byte) ([]ocispec.History, error) {
	if len(config) == 0 {
		return nil, nil
	}
	c, err := ParseConfig(config)
	if err != nil {
		return nil, fmt.Errorf("base image: %w", err)
	}
	return c.History, nil
}

// completeHistory makes history have exactly one entry for each layer (and
// any number for instructions that made none), each with a time.
func completeHistory(given []ocispec.History, layers []NewLayer) []ocispec.History {
	history := append([]ocispec.History{}, given...)
	n := 0
	for i, h := range history {
		if h.EmptyLayer {
			continue
		}
		if n >= len(layers) { // the config speaks of layers that there are not
			history[i].EmptyLayer = true
			continue
		}
		if h.Created == nil {
			history[i].Created = layers[n].Created
		}
		n++
	}
	for _, l := range layers[n:] {
		by := l.CreatedBy
		if by == "" {
			by = "created by kiln"
		}
		history = append(history, ocispec.History{Created: l.Created, CreatedBy: by, Comment: "kiln"})
	}
	fillTimes(history)
	return history
}

// fillTimes gives a time to entries that have none: that of the entry before,
// or, before the first new layer, that layer's; otherwise an instruction
// without a layer would be as old as the base image.
func fillTimes(history []ocispec.History) {
	var created *time.Time
	gap := false
	for _, h := range history {
		if h.Created == nil {
			gap = true
			continue
		}
		created = h.Created
		if gap {
			break
		}
	}
	gap = false
	for i, h := range history {
		switch {
		case h.Created == nil:
			gap = true
			history[i].Created = created
		case gap:
			created = h.Created
		}
	}
}

// clampHistory lets nothing be younger than epoch, but leaves what the base
// image says of itself.
func clampHistory(history, base []ocispec.History, epoch time.Time) {
	for i, h := range history {
		if i < len(base) && reflect.DeepEqual(h, base[i]) {
			continue
		}
		base = nil
		if h.Created == nil || h.Created.After(epoch) {
			history[i].Created = &epoch
		}
	}
}

// IndexOptions says what an index is made of.
type IndexOptions struct {
	// Manifests are the entries, each with its platform (and annotations).
	Manifests   []ocispec.Descriptor
	Annotations map[string]string
	DockerTypes bool
}

// AssembleIndex makes the index of several images, in the order given.
func AssembleIndex(opt IndexOptions) (raw []byte, desc ocispec.Descriptor, err error) {
	idx := ocispec.Index{
		Versioned:   specs.Versioned{SchemaVersion: 2},
		MediaType:   ocispec.MediaTypeImageIndex,
		Manifests:   opt.Manifests,
		Annotations: opt.Annotations,
	}
	if idx.Manifests == nil {
		idx.Manifests = []ocispec.Descriptor{}
	}
	if opt.DockerTypes {
		idx.MediaType = MediaTypeDockerList
		if len(opt.Annotations) > 0 {
			return nil, desc, errors.New("assemble index: docker's manifest lists have no annotations; use OCI media types")
		}
	}
	for i, d := range opt.Manifests {
		if err := checkDescriptor(fmt.Sprintf("entry %d", i+1), d); err != nil {
			return nil, desc, fmt.Errorf("assemble index: %w", err)
		}
		if d.Platform == nil {
			return nil, desc, fmt.Errorf("assemble index: entry %d has no platform", i+1)
		}
	}
	raw, err = json.MarshalIndent(idx, "", "  ")
	if err != nil {
		return nil, desc, fmt.Errorf("assemble index: %w", err)
	}
	return raw, ocispec.Descriptor{MediaType: idx.MediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}, nil
}
