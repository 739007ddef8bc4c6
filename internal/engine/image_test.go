package engine_test

import (
	"context"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/engine"
	"github.com/kiln-build/kiln/internal/image"
)

// tall has images of three layers, in registries and layouts.
type tall struct{ catalogue }

func (tall) Resolve(_ context.Context, ref string, _ ocispec.Platform) (*image.Image, error) {
	img := &image.Image{Ref: ref, Digest: digest.FromString(ref)}
	for _, s := range []string{"1", "2", "3"} {
		img.Layers = append(img.Layers, image.Layer{DiffID: digest.FromString(s)})
	}
	return img, nil
}

func (t tall) ResolveLayout(ctx context.Context, _ string, d digest.Digest, p ocispec.Platform) (*image.Image, error) {
	return t.Resolve(ctx, d.String(), p)
}

func TestImageLimits(t *testing.T) {
	f := newFixture(t)
	f.c.Images = tall{}
	for name, c := range map[string]struct {
		do   engine.Operation
		want int
		err  string
	}{
		"all":               {&engine.Image{Ref: "a"}, 3, ""},
		"two":               {&engine.Image{Ref: "a", Limit: 2}, 2, ""},
		"as many":           {&engine.Image{Ref: "a", Limit: 3}, 3, ""},
		"more":              {&engine.Image{Ref: "a", Limit: 4}, 0, "layer limit 4 is greater than the number of layers in the image 3"},
		"one of a layout":   {&engine.Layout{Digest: "d", Limit: 1}, 1, ""},
		"what was expected": {&engine.Image{Ref: "a", Checksum: digest.FromString("a")}, 3, ""},
		"something else": {
			&engine.Image{Ref: "a", Checksum: digest.FromString("b")}, 0,
			"image digest " + digest.FromString("a").String() + " for a does not match expected checksum " + digest.FromString("b").String(),
		},
	} {
		ls, err := f.solve(f.op(&engine.Merge{}, f.op(c.do))) // whose layers nobody fetches
		if len(ls) != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %d layers, %v", name, len(ls), err)
		}
	}
}
