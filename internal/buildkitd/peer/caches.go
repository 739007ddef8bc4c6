package peer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/cache/remote"
	"github.com/kiln-build/kiln/internal/image"
)

// OpenDirectory implements build.Directories: the client calls the store of a cache "local:DIRECTORY".
func (p *Peer) OpenDirectory(sp cache.Spec, f image.Fetcher) (build.Directory, error) {
	s, err := p.store(p.ctx, "local:"+sp.Dir)
	if err != nil {
		return nil, fmt.Errorf("cache %s: %w", sp, err)
	}
	d := &directory{store: s, fetcher: f, manifest: ocispec.Descriptor{Digest: sp.Digest}}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.caches = append(p.caches, d)
	return d, nil
}

// CacheManifest describes the manifest of the cache that was written, as JSON; empty if none was.
// The client gives it a name.
func (p *Peer) CacheManifest() (string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, d := range p.caches {
		if d.written {
			b, err := json.Marshal(d.manifest)
			return string(b), err
		}
	}
	return "", nil
}

// directory is a cache in a directory that the client has. Tags are the client's
// business: it says which manifest is to be read, and is told which one was written.
type directory struct {
	*store
	fetcher image.Fetcher // of layers that come from elsewhere

	mu       sync.Mutex
	manifest ocispec.Descriptor
	written  bool
}

// Origin implements remote.Storage.
func (d *directory) Origin() string { return "client:" + d.name }

// Resolve implements remote.Storage.
func (d *directory) Resolve(ctx context.Context) ([]byte, ocispec.Descriptor, error) {
	d.mu.Lock()
	m := d.manifest
	d.mu.Unlock()
	if m.Digest == "" {
		return nil, m, fs.ErrNotExist
	}
	raw, err := d.Read(ctx, m)
	m.Size = int64(len(raw))
	return raw, m, err
}

// Read implements remote.Storage.
func (d *directory) Read(ctx context.Context, desc ocispec.Descriptor) ([]byte, error) {
	raw, err := d.document(ctx, desc)
	if err != nil {
		return nil, err
	}
	if got := desc.Digest.Algorithm().FromBytes(raw); got != desc.Digest {
		return nil, fmt.Errorf("blob %s of the client's cache has the digest %s", desc.Digest, got)
	}
	return raw, nil
}

// Put implements remote.Storage.
func (d *directory) Put(ctx context.Context, l image.Layer) error {
	if ok, err := d.has(ctx, l.Blob); ok || err != nil {
		return err
	}
	r, err := d.fetcher.Fetch(ctx, l)
	if err != nil {
		return err
	}
	defer r.Close()
	return d.put(ctx, l.Blob, r)
}

// Replace implements remote.Storage.
func (d *directory) Replace(ctx context.Context, old digest.Digest, config []byte, manifest remote.Manifest) (bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.manifest.Digest != old {
		return false, nil
	}
	c := ocispec.Descriptor{MediaType: remote.MediaType, Digest: digest.FromBytes(config), Size: int64(len(config))}
	if err := d.put(ctx, c, bytes.NewReader(config)); err != nil {
		return false, err
	}
	desc := manifest.Descriptor()
	if err := d.put(ctx, desc, bytes.NewReader(manifest.Raw)); err != nil { // last: what it names is there
		return false, err
	}
	d.manifest, d.written = desc, true
	return true, nil
}

// Fetch implements image.Fetcher, for layers that are in the cache.
func (d *directory) Fetch(ctx context.Context, l image.Layer) (io.ReadCloser, error) {
	if l.Origin != d.Origin() {
		return nil, errors.New("the layer is not of this cache")
	}
	return d.fetch(ctx, l.Blob)
}
