package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/cache/remote"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/store"
)

// images resolves what a Dockerfile starts from: an image of the local store
// first, as docker does, then the registry. What was resolved once stays so
// for the whole build.
type images struct {
	store    *store.Store
	registry *registry.Client
	pull     bool
	layouts  Layouts

	mu     sync.Mutex
	seen   map[string]*image.Image
	opened map[string]Layout    // by name
	theirs map[string]Directory // by origin
}

func key(ref string, p ocispec.Platform) string {
	return platforms.FormatAll(platforms.Normalize(p)) + " " + ref
}

// remember keeps an image under all the references that the front end may use for it.
func (s *images) remember(ref string, p ocispec.Platform, img *image.Image) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seen == nil {
		s.seen = map[string]*image.Image{}
	}
	s.seen[key(ref, p)] = img
	if !strings.Contains(ref, "@") {
		s.seen[key(ref+"@"+img.Digest.String(), p)] = img
	}
}

func (s *images) recall(ref string, p ocispec.Platform) *image.Image {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen[key(ref, p)]
}

// Resolve implements engine.Images, and Build with it frontend.Sources.
func (s *images) Resolve(ctx context.Context, ref string, p ocispec.Platform) (*image.Image, error) {
	if img := s.recall(ref, p); img != nil {
		return img, nil
	}
	img, err := s.resolve(ctx, ref, p)
	if err != nil {
		return nil, err
	}
	s.remember(ref, p, img)
	return img, nil
}

func (s *images) resolve(ctx context.Context, ref string, p ocispec.Platform) (*image.Image, error) {
	name, err := registry.NormalizeRef(ref)
	if err != nil {
		return nil, err
	}
	if s.pull {
		return s.registry.Resolve(ctx, name, p)
	}
	img, err := image.FromStore(s.store, name, p)
	if err == nil && fits(img, p) {
		return img, nil
	}
	// The store may have the image of another platform, or not all of it.
	remote, rerr := s.registry.Resolve(ctx, name, p)
	switch {
	case rerr == nil:
		return remote, nil
	case err == nil && ctx.Err() == nil:
		return nil, fmt.Errorf("image %q of the local store is for %s, and %s is wanted: %w",
			ref, platforms.Format(*img.Manifest.Platform), platforms.Format(p), rerr)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	return nil, rerr
}

// fits reports whether an image is for a platform. A registry's may be for any, as
// with docker; but a local image must not stand in for the registry's of the same name.
func fits(img *image.Image, p ocispec.Platform) bool {
	have := img.Manifest.Platform
	return have == nil || have.OS == "" || p.OS == "" || platforms.Only(p).Match(*have)
}

// ResolveLayout implements engine.Images, and Build with it frontend.Sources.
func (s *images) ResolveLayout(ctx context.Context, name string, d digest.Digest, p ocispec.Platform) (*image.Image, error) {
	l, err := s.layout(ctx, name)
	if err != nil {
		return nil, err
	}
	return l.Resolve(ctx, d.String(), p)
}

// layout opens a layout, once.
func (s *images) layout(ctx context.Context, name string) (Layout, error) {
	s.mu.Lock()
	l := s.opened[name]
	s.mu.Unlock()
	if l != nil {
		return l, nil
	}
	if s.layouts == nil {
		return nil, fmt.Errorf("there is no OCI layout %q", name)
	}
	l, err := s.layouts.OpenLayout(ctx, name)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if first := s.opened[name]; first != nil {
		return first, nil
	}
	if s.opened == nil {
		s.opened = map[string]Layout{}
	}
	s.opened[name] = l
	return l, nil
}

// Fetch implements image.Fetcher. Its errors, and those of reading, are *image.LostError.
func (s *images) Fetch(ctx context.Context, l image.Layer) (io.ReadCloser, error) {
	return image.Tracking(image.FetcherFunc(s.fetch)).Fetch(ctx, l)
}

// addOrigin has layers fetched from a cache that is somebody else's.
func (s *images) addOrigin(d Directory) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.theirs == nil {
		s.theirs = map[string]Directory{}
	}
	s.theirs[d.Origin()] = d
}

func (s *images) fetch(ctx context.Context, l image.Layer) (io.ReadCloser, error) {
	s.mu.Lock()
	theirs := s.theirs[l.Origin]
	s.mu.Unlock()
	if theirs != nil {
		return theirs.Fetch(ctx, l)
	}
	if dir, ok := strings.CutPrefix(l.Origin, remote.DirectoryOrigin); ok {
		return image.LayoutBlobs(dir).Fetch(ctx, l)
	}
	if l.Origin != "" {
		return s.registry.Fetch(ctx, l)
	}
	s.mu.Lock()
	opened := slices.Collect(maps.Values(s.opened))
	s.mu.Unlock()
	for _, lo := range opened {
		if r, err := lo.Fetch(ctx, l); err == nil {
			return r, nil
		}
	}
	return nil, fmt.Errorf("layer %s is not in the local store any more, and it has no registry to come from", l.DiffID)
}
