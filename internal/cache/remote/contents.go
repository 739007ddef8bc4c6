package remote

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/image"
)

// MediaType is the config's of a manifest that is a cache.
const MediaType = "application/vnd.kiln.cache.v1+json"

// version of the config's format.
const version = 1

// mostRecords bounds what is read. Writers are bounded by cache.Bounds.
const mostRecords = 50_000

// contents is what a cache has.
type contents struct {
	manifest digest.Digest // that it was read from; "" if there is none
	kind     kind          // of what is there
	layers   []image.Layer // without origin; those without a blob are of base images
	entries  []entry
	index    map[digest.Digest]int // of entries, by key and by content
}

// entry is one record of a cache.
type entry struct {
	key, content digest.Digest
	layers       []uint32 // numbers in contents.layers
	used         time.Time
}

// add makes an entry that is found. Of several for one key, the one used last is.
func (c *contents) add(e entry) {
	if c.index == nil {
		c.index = map[digest.Digest]int{}
	}
	c.entries = append(c.entries, e)
	for _, k := range []digest.Digest{e.key, e.content} {
		if k == "" {
			continue
		}
		if have, ok := c.index[k]; !ok || !c.entries[have].used.After(e.used) {
			c.index[k] = len(c.entries) - 1
		}
	}
}

func (c *contents) lookup(key digest.Digest, origin string) *cache.Record {
	i, ok := c.index[key]
	if !ok {
		return nil
	}
	r := cache.Record{Layers: make([]image.Layer, 0, len(c.entries[i].layers))}
	if key == c.entries[i].key {
		r.Content = c.entries[i].content
	}
	for _, n := range c.entries[i].layers {
		l := c.layers[n]
		if l.Blob.Digest != "" {
			l.Origin = origin
		}
		r.Layers = append(r.Layers, l)
	}
	return &r
}

// The config of a cache's manifest.
type configDocument struct {
	Version int              `json:"version"`
	Layers  []layerDocument  `json:"layers"`
	Records []recordDocument `json:"records"`
}

// layerDocument is a layer. Blob is its number among the manifest's layers; one
// without is of a base image.
type layerDocument struct {
	DiffID  digest.Digest `json:"diffID"`
	Created time.Time     `json:"created,omitzero"`
	Newest  time.Time     `json:"newest,omitzero"`
	Blob    *uint32       `json:"blob,omitempty"`
}

// recordDocument is a result. Layers are numbers of the config's layers, the
// bottom first; Used is in seconds since 1970.
type recordDocument struct {
	Key     digest.Digest `json:"key"`
	Content digest.Digest `json:"content,omitempty"`
	Layers  []uint32      `json:"layers"`
	Used    int64         `json:"used"`
}

// parse reads a cache's manifest and config, which were verified, and believes neither.
func parse(m *ocispec.Manifest, config []byte) (*contents, error) {
	var d configDocument
	if err := json.Unmarshal(config, &d); err != nil {
		return nil, fmt.Errorf("its records are not valid JSON: %w", err)
	}
	switch {
	case d.Version != version:
		return nil, fmt.Errorf("its format is version %d, and this kiln knows version %d", d.Version, version)
	case len(d.Records) > mostRecords || len(d.Layers) > mostRecords:
		return nil, fmt.Errorf("it has more than %d records", mostRecords)
	}
	c := &contents{kind: kindCache}
	for i, l := range d.Layers {
		got, err := parseLayer(l, m.Layers)
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
		c.layers = append(c.layers, got)
	}
	for i, r := range d.Records {
		if r.Key.Validate() != nil || r.Content != "" && r.Content.Validate() != nil {
			return nil, fmt.Errorf("record %d: its key is not valid", i)
		}
		if len(r.Layers) > image.MaxLayers || slices.ContainsFunc(r.Layers, func(n uint32) bool { return int(n) >= len(c.layers) }) {
			return nil, fmt.Errorf("record %d: its layers are not there", i)
		}
		c.add(entry{r.Key, r.Content, r.Layers, time.Unix(r.Used, 0)})
	}
	return c, nil
}

func parseLayer(l layerDocument, blobs []ocispec.Descriptor) (image.Layer, error) {
	out := image.Layer{DiffID: l.DiffID, Created: l.Created.UTC(), Newest: l.Newest.UTC()}
	if err := l.DiffID.Validate(); err != nil {
		return out, fmt.Errorf("diff ID: %w", err)
	}
	if l.Blob == nil {
		if out.Built() {
			return out, errors.New("it was built, and has no blob")
		}
		return out, nil
	}
	if int(*l.Blob) >= len(blobs) {
		return out, errors.New("its blob is not there")
	}
	b := blobs[*l.Blob]
	if b.Digest.Validate() != nil || b.Size < 0 || !out.Built() {
		return out, errors.New("its blob is not valid")
	}
	// Not URLs or annotations: they would get into images.
	out.Blob = ocispec.Descriptor{MediaType: b.MediaType, Digest: b.Digest, Size: b.Size}
	return out, image.CheckLayerType(b.MediaType)
}

// form is what kind of document a cache's manifest is.
type form struct {
	index  bool // with the config as the last of its manifests
	docker bool // media types
}

// encode writes manifest and config. The same contents give the same bytes.
func (c *contents) encode(f form) (manifest Manifest, config []byte, err error) {
	d := configDocument{Version: version, Layers: []layerDocument{}, Records: []recordDocument{}}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{},
	}
	blobs := map[digest.Digest]uint32{}
	numbers := map[uint32]uint32{} // of those layers that are in use
	for _, e := range c.entries {
		r := recordDocument{Key: e.key, Content: e.content, Layers: []uint32{}, Used: e.used.Unix()}
		for _, n := range e.layers {
			to, ok := numbers[n]
			if !ok {
				to = uint32(len(d.Layers))
				numbers[n] = to
				d.Layers = append(d.Layers, layerOf(c.layers[n], &m, blobs, f.docker))
			}
			r.Layers = append(r.Layers, to)
		}
		d.Records = append(d.Records, r)
	}
	if config, err = compact(d); err != nil {
		return manifest, nil, err
	}
	m.Config = ocispec.Descriptor{MediaType: MediaType, Digest: digest.FromBytes(config), Size: int64(len(config))}
	manifest, err = f.manifest(&m)
	return manifest, config, err
}

// manifest is an image manifest in its form.
func (f form) manifest(m *ocispec.Manifest) (Manifest, error) {
	out := Manifest{Type: m.MediaType, Layers: m.Layers}
	var err error
	if !f.index {
		out.Raw, err = compact(m)
		return out, err
	}
	if out.Type = ocispec.MediaTypeImageIndex; f.docker {
		out.Type = image.MediaTypeDockerList
	}
	out.Raw, err = compact(ocispec.Index{
		Versioned: m.Versioned, MediaType: out.Type, Manifests: append(slices.Clip(m.Layers), m.Config),
	})
	return out, err
}

// ofIndex is the image manifest that an index stands for, nil if it is no cache of Kiln's.
func ofIndex(idx *ocispec.Index) *ocispec.Manifest {
	last := len(idx.Manifests) - 1
	if last < 0 || idx.Manifests[last].MediaType != MediaType {
		return nil
	}
	return &ocispec.Manifest{Config: idx.Manifests[last], Layers: idx.Manifests[:last]}
}

// layerOf describes a layer, and puts its blob into the manifest.
func layerOf(l image.Layer, m *ocispec.Manifest, blobs map[digest.Digest]uint32, docker bool) layerDocument {
	d := layerDocument{DiffID: l.DiffID, Created: l.Created, Newest: l.Newest}
	if l.Blob.Digest == "" {
		return d
	}
	n, ok := blobs[l.Blob.Digest]
	if !ok {
		n = uint32(len(m.Layers))
		blobs[l.Blob.Digest] = n
		m.Layers = append(m.Layers, ocispec.Descriptor{
			MediaType: image.ConvertLayerType(l.Blob.MediaType, docker), Digest: l.Blob.Digest, Size: l.Blob.Size,
		})
	}
	d.Blob = &n
	return d
}

func compact(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(v)
	return b.Bytes(), err
}
