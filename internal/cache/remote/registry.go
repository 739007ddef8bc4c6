package remote

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/registry"
)

// tagged is a cache under a tag of a registry.
type tagged struct {
	ref, repo string
	reg       *registry.Client
	open      func(ctx context.Context) (*export.Push, error) // once
}

var _ Storage = (*tagged)(nil)

// OpenRegistry returns the cache that ref names in a registry. f fetches layers
// that the store lacks. No request is sent yet.
func OpenRegistry(reg *registry.Client, f image.Fetcher, ref string, opt Options) (*Cache, error) {
	ref, err := registry.NormalizeRef(ref)
	if err != nil {
		return nil, err
	}
	repo, err := registry.Repository(ref)
	if err != nil {
		return nil, err
	}
	opt.Name = ref
	f = image.Tracking(f)
	t := &tagged{ref: ref, repo: repo, reg: reg}
	var once sync.Once
	var push *export.Push
	t.open = func(ctx context.Context) (*export.Push, error) {
		once.Do(func() { push, err = export.OpenPush(ctx, reg, opt.Store, f, ref, opt.Progress) })
		return push, err
	}
	return New(t, f, opt), nil
}

// Origin implements Storage.
func (t *tagged) Origin() string { return t.repo }

// Resolve implements Storage.
func (t *tagged) Resolve(ctx context.Context) ([]byte, ocispec.Descriptor, error) {
	raw, desc, err := t.reg.Document(ctx, t.ref)
	if registry.NotFound(err) {
		err = fmt.Errorf("%w (%w)", fs.ErrNotExist, err)
	}
	return raw, desc, err
}

// Read implements Storage.
func (t *tagged) Read(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	return t.reg.Small(ctx, t.ref, d, maxDocument)
}

// Put implements Storage.
func (t *tagged) Put(ctx context.Context, l image.Layer) error {
	p, err := t.open(ctx)
	if err != nil {
		return err
	}
	return p.Layer(ctx, l)
}

// Replace implements Storage. Registries have no way to replace a tag only if it
// has not moved: it is looked at as late as possible.
func (t *tagged) Replace(ctx context.Context, old digest.Digest, config []byte, manifest Manifest) (bool, error) {
	p, err := t.open(ctx)
	if err != nil {
		return false, err
	}
	if err := p.Blob(ctx, MediaType, config); err != nil {
		return false, err
	}
	now, err := t.reg.Current(ctx, t.ref)
	if registry.NotFound(err) {
		now, err = "", nil
	}
	if err != nil || now != old {
		return false, err
	}
	_, err = p.Tag(ctx, manifest.Descriptor(), manifest.Raw)
	if registry.Unknown(err) {
		err = errors.Join(errLost, err)
	}
	return err == nil, err
}
