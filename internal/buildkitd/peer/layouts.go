package peer

import (
	"context"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/image"
)

// OpenLayout implements build.Layouts: the client calls the store of a layout "oci:NAME".
func (p *Peer) OpenLayout(ctx context.Context, name string) (build.Layout, error) {
	s, err := p.store(ctx, "oci:"+name)
	if err != nil {
		return nil, fmt.Errorf("OCI layout %q: %w", name, err)
	}
	return layout{s, name}, nil
}

// layout is an OCI layout that the client has.
type layout struct {
	*store
	name string
}

// Resolve implements build.Layout. The client has looked tags up: there are digests alone.
func (l layout) Resolve(ctx context.Context, d string, p ocispec.Platform) (*image.Image, error) {
	if err := digest.Digest(d).Validate(); err != nil {
		return nil, fmt.Errorf("OCI layout %q: digest %.100q: %w", l.name, d, err)
	}
	img, err := image.Resolve(ctx, l.document, ocispec.Descriptor{Digest: digest.Digest(d)}, p)
	if err != nil {
		return nil, fmt.Errorf("OCI layout %q: %w", l.name, err)
	}
	return img, nil
}

// Fetch implements image.Fetcher.
func (l layout) Fetch(ctx context.Context, layer image.Layer) (io.ReadCloser, error) {
	return l.fetch(ctx, layer.Blob)
}
