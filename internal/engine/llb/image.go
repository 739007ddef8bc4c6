package llb

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/engine"
)

// imageSource decodes a source that is an image of a registry.
func imageSource(ref string, attrs map[string]string, p ocispec.Platform) (_ *engine.Image, err error) {
	img := &engine.Image{Ref: ref, Platform: p, Checksum: digest.Digest(attrs[pb.AttrImageChecksum])}
	if img.Checksum != "" {
		if err := img.Checksum.Validate(); err != nil {
			return nil, fmt.Errorf("image %s: invalid image checksum %s: %w", ref, img.Checksum, err)
		}
	}
	img.Limit, err = layerLimit(ref, attrs, pb.AttrImageLayerLimit)
	return img, err
}

// layoutSource decodes a source that is an image of an OCI layout: NAME@DIGEST.
func layoutSource(ref string, attrs map[string]string, p ocispec.Platform) (_ *engine.Layout, err error) {
	_, dg, _ := strings.Cut(ref, "@")
	l := &engine.Layout{Store: attrs[pb.AttrOCILayoutStoreID], Digest: digest.Digest(dg), Platform: p}
	if err := l.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("source oci-layout://%s: %w", ref, err)
	}
	l.Limit, err = layerLimit(ref, attrs, pb.AttrOCILayoutLayerLimit)
	return l, err
}

// layerLimit is how many layers are wanted; 0: all.
func layerLimit(ref string, attrs map[string]string, attr string) (int, error) {
	v, ok := attrs[attr]
	if !ok {
		return 0, nil
	}
	n, err := strconv.Atoi(v)
	if err != nil || n <= 0 {
		return 0, fmt.Errorf("image %s: invalid layer limit %s", ref, v)
	}
	return n, nil
}
