package remote

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/image"
)

// InlineField is the field of an image's config that has the records of type=inline.
const InlineField = "kiln.cache.v1"

// The records within an image's config. The layers are the image's.
type inlineDocument struct {
	Layers  []inlineLayer  `json:"layers"` // as many as the image has
	Records []inlineRecord `json:"records"`
}

// inlineLayer is what the image does not say of its layer; nothing about a base image's.
type inlineLayer struct {
	Created time.Time `json:"created,omitzero"`
	Newest  time.Time `json:"newest,omitzero"`
}

// inlineRecord is a result: the first so many layers of the image.
type inlineRecord struct {
	Key     digest.Digest `json:"key"`
	Content digest.Digest `json:"content,omitempty"`
	Layers  int           `json:"layers"`
}

// mostInline bounds the layers that all records of an image name together.
const mostInline = 1_000_000

// InlineResult is a record for type=inline.
type InlineResult struct {
	Key digest.Digest
	cache.Record
}

// EncodeInline makes the field of an image's config from the records of those
// operations whose layers the image has. computed are the layers as the
// operations made them, final as the image has them; nothing is said to have been
// made after epoch, if there is one. It asks no clock.
func EncodeInline(results []InlineResult, computed, final []image.Layer, epoch *time.Time) (json.RawMessage, error) {
	d := inlineDocument{Layers: []inlineLayer{}, Records: []inlineRecord{}}
	for _, l := range final {
		var n inlineLayer
		if l.Built() {
			n = inlineLayer{Created: notAfter(l.Created, epoch), Newest: l.Newest}
		}
		d.Layers = append(d.Layers, n)
	}
	// They come in the order in which they were found.
	slices.SortFunc(results, func(a, b InlineResult) int {
		return cmp.Or(cmp.Compare(len(a.Layers), len(b.Layers)), cmp.Compare(a.Key, b.Key))
	})
	results = slices.CompactFunc(results, func(a, b InlineResult) bool { return a.Key == b.Key })
	for _, r := range results {
		if isPrefix(r.Layers, computed) {
			d.Records = append(d.Records, inlineRecord{r.Key, r.Content, len(r.Layers)})
		}
	}
	b, err := json.Marshal(d)
	if err != nil {
		return nil, fmt.Errorf("write records into the image's config: %w", err)
	}
	return b, nil
}

func notAfter(t time.Time, epoch *time.Time) time.Time {
	if epoch != nil && t.After(*epoch) {
		return *epoch
	}
	return t
}

func isPrefix(ls, of []image.Layer) bool {
	if len(ls) > len(of) {
		return false
	}
	for i, l := range ls {
		if l.DiffID != of[i].DiffID {
			return false
		}
	}
	return true
}

// loadImage reads the records within an image's config.
func loadImage(ctx context.Context, s Storage, raw []byte, m *ocispec.Manifest) (*contents, error) {
	config, err := s.Read(ctx, m.Config)
	if err != nil {
		return nil, fmt.Errorf("read the image's config: %w", err)
	}
	img, err := image.New(ocispec.Descriptor{MediaType: m.MediaType}, raw, config, "")
	if err != nil {
		return nil, &unusableError{kindImage, err}
	}
	var c struct {
		Kiln     *inlineDocument `json:"kiln.cache.v1"`
		BuildKit json.RawMessage `json:"moby.buildkit.cache.v0"`
	}
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, unusable(kindImage, "the records in the image's config are not valid: %w", err)
	}
	switch {
	case c.Kiln == nil && c.BuildKit != nil:
		return nil, unusable(kindImage, "it is an image with records of BuildKit's, which say nothing about Kiln's steps")
	case c.Kiln == nil:
		return nil, unusable(kindImage, "it is an image without records: write them with --cache-to type=inline, or a cache of its own")
	}
	return parseInline(img, c.Kiln)
}

func parseInline(img *image.Image, d *inlineDocument) (*contents, error) {
	if len(d.Layers) != len(img.Layers) || len(d.Records) > mostRecords {
		return nil, unusable(kindImage, "the records in the image's config do not fit the image")
	}
	c := &contents{kind: kindImage}
	for i, l := range img.Layers {
		l.Created, l.Newest = d.Layers[i].Created.UTC(), d.Layers[i].Newest.UTC()
		l.Blob = ocispec.Descriptor{MediaType: l.Blob.MediaType, Digest: l.Blob.Digest, Size: l.Blob.Size}
		if !l.Built() {
			l.Blob = ocispec.Descriptor{}
		}
		c.layers = append(c.layers, l)
	}
	all := make([]uint32, len(c.layers))
	for i := range all {
		all[i] = uint32(i)
	}
	sum := 0
	for i, r := range d.Records {
		if r.Key.Validate() != nil || r.Content != "" && r.Content.Validate() != nil || r.Layers < 0 || r.Layers > len(c.layers) {
			return nil, unusable(kindImage, "record %d in the image's config is not valid", i)
		}
		if sum += r.Layers; sum > mostInline {
			return nil, unusable(kindImage, "the records in the image's config name more than %d layers", mostInline)
		}
		c.add(entry{key: r.Key, content: r.Content, layers: all[:r.Layers]})
	}
	return c, nil
}
