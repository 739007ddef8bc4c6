package export

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/store"
)

// StoredPush pushes images that the store has, of whatever origin: the build's
// own are pushed by Push, while they are made.
type StoredPush struct {
	Store    *store.Store
	Registry *registry.Client
	Platform *ocispec.Platform // of an index, this image alone; nil: all
}

// Push pushes what ref, a tag of the store, names, and returns what the
// registry has then under that name. Blobs on their way are told to step.
func (p *StoredPush) Push(ctx context.Context, ref string, step *progress.Step) (desc ocispec.Descriptor, err error) {
	if desc, err = p.Store.Tag(ref); err != nil {
		return desc, err
	}
	if p.Platform != nil {
		img, err := image.Resolve(ctx, image.InStore(p.Store), desc, *p.Platform)
		if err != nil {
			return desc, err
		}
		desc = img.Manifest
	}
	to, err := p.Registry.Pusher(ctx, ref)
	if err != nil {
		return desc, err
	}
	raw, err := p.content(ctx, to, desc, step, 0)
	if err != nil {
		return desc, err
	}
	return desc, to.Tag(ctx, desc.MediaType, raw)
}

const maxNested = 4 // indexes in indexes

// content pushes everything that a manifest or index names, and returns it.
func (p *StoredPush) content(ctx context.Context, to *registry.Pusher, desc ocispec.Descriptor, step *progress.Step, depth int) ([]byte, error) {
	raw, err := p.Store.ReadBlob(desc.Digest, image.MaxManifest)
	if err != nil {
		return nil, fmt.Errorf("read manifest %s: %w", desc.Digest, err)
	}
	if !image.IsIndex(desc.MediaType) {
		return raw, p.image(ctx, to, desc, raw, step)
	}
	idx, err := image.ParseIndex(raw, desc.MediaType)
	if err != nil {
		return nil, err
	}
	if depth == maxNested {
		return nil, diag.New(diag.ExitFailure, "index %s: too many indexes within each other", desc.Digest)
	}
	for _, m := range idx.Manifests {
		child, err := p.content(ctx, to, m, step, depth+1)
		if err != nil {
			return nil, err
		}
		if _, err := to.Manifest(ctx, m.MediaType, child); err != nil {
			return nil, err
		}
	}
	return raw, nil
}

// image pushes the layers and the config of one image, or of an attestation.
func (p *StoredPush) image(ctx context.Context, to *registry.Pusher, desc ocispec.Descriptor, raw []byte, step *progress.Step) error {
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return fmt.Errorf("read manifest %s: %w", desc.Digest, err)
	}
	origins := map[digest.Digest]string{}
	if img, err := image.FromStore(p.Store, string(desc.Digest), ocispec.Platform{}); err == nil {
		for _, l := range img.Layers {
			origins[l.Blob.Digest] = l.Origin
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	seen := map[digest.Digest]bool{}
	for _, b := range append(m.Layers, m.Config) {
		if seen[b.Digest] || image.IsForeign(b.MediaType) {
			continue
		}
		seen[b.Digest] = true
		g.Go(func() error { return p.blob(gctx, to, b, origins[b.Digest], step) })
	}
	return g.Wait()
}

func (p *StoredPush) blob(ctx context.Context, to *registry.Pusher, b ocispec.Descriptor, origin string, step *progress.Step) error {
	open := func() (io.ReadCloser, error) {
		// A layer of the base image may never have been needed here.
		if err := image.Fetch(ctx, p.Store, image.Layer{Blob: b, Origin: origin}, p.Registry); err != nil {
			return nil, err
		}
		return p.Store.OpenBlob(b.Digest)
	}
	_, err := to.Blob(ctx, b, origin, open, func(sent int64) {
		step.Transfer(shortDigest(b.Digest), sent, b.Size)
	})
	return err
}
