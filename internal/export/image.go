package export

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/kiln-build/kiln/internal/tree"
)

// OpenTree opens the merged root file system of layers, which are fetched from f
// if the store lacks them. The function that it returns closes it.
func OpenTree(ctx context.Context, st *store.Store, f image.Fetcher, layers []image.Layer) (tree.Tree, func(), error) {
	var rs []*layer.Reader
	closeAll := func() {
		for _, r := range rs {
			r.Close()
		}
	}
	if _, err := image.UnpackAll(ctx, st, layers, f, nil); err != nil {
		return nil, nil, err
	}
	ts := make([]tree.Tree, 0, len(layers))
	for _, l := range layers {
		r, err := image.OpenLayer(ctx, st, l, f)
		if err != nil {
			closeAll()
			return nil, nil, err
		}
		rs, ts = append(rs, r), append(ts, r)
	}
	return rootfs.New(ts...), closeAll, nil
}

// Push is a push to one repository.
type Push struct {
	Refs     []string       // in this repository; Tag gives the image all of them
	ByDigest bool           // Tag gives it none
	Step     *progress.Step // that Tag is a part of; nil: each name is a step of its own

	reg     *registry.Client
	store   *store.Store
	fetcher image.Fetcher
	pusher  *registry.Pusher
	repo    string
	rec     *progress.Recorder
}

// OpenPush checks that ref's repository can be pushed to.
func OpenPush(ctx context.Context, reg *registry.Client, st *store.Store, f image.Fetcher, ref string, rec *progress.Recorder) (*Push, error) {
	repo, err := registry.Repository(ref)
	if err != nil {
		return nil, err
	}
	p := &Push{Refs: []string{ref}, reg: reg, store: st, fetcher: f, repo: repo, rec: rec}
	if p.pusher, err = reg.Pusher(ctx, ref); err != nil {
		return nil, err
	}
	return p, nil
}

// Layer sends a layer's blob, unless the repository has it or can mount it.
// Safe for concurrent use. What is sent is a step of its own in the progress.
func (p *Push) Layer(ctx context.Context, l image.Layer) error {
	open := func() (io.ReadCloser, error) {
		r, err := p.store.OpenBlob(l.Blob.Digest)
		if errors.Is(err, fs.ErrNotExist) {
			return p.fetcher.Fetch(ctx, l)
		}
		return r, err
	}
	item := shortDigest(l.Blob.Digest)
	// A step only if there is something to send, and from then on. The body
	// may still be read for a moment after Blob has given up.
	step := sync.OnceValue(func() *progress.Step {
		s := p.rec.Step("pushing layer "+item+" to "+p.repo, "")
		s.Start()
		return s
	})
	var sending atomic.Bool
	_, err := p.pusher.Blob(ctx, l.Blob, l.Origin, open, func(sent int64) {
		sending.Store(true)
		step().Transfer(item, sent, l.Blob.Size)
	})
	if err != nil {
		err = fmt.Errorf("push layer %s: %w", item, err)
	}
	if sending.Load() {
		step().Done(err)
	}
	return err
}

// Blob sends a small blob, a config.
func (p *Push) Blob(ctx context.Context, mediaType string, raw []byte) error {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil }
	_, err := p.pusher.Blob(ctx, d, "", open, nil)
	return err
}

// Manifests sends the config of each image, and, if they are to be in an index,
// their manifests by digest.
func (p *Push) Manifests(ctx context.Context, built []*image.Image, indexed bool) error {
	for _, b := range built {
		if err := p.Blob(ctx, ocispec.MediaTypeImageConfig, b.RawConfig); err != nil {
			return fmt.Errorf("push config: %w", err)
		}
		if !indexed {
			continue // the tag sends the manifest
		}
		if _, err := p.pusher.Manifest(ctx, b.Manifest.MediaType, b.RawManifest); err != nil {
			return err
		}
	}
	return nil
}

// Tag gives the image all Refs, and returns by what it can be pulled now. It is
// the last thing of a build.
func (p *Push) Tag(ctx context.Context, d ocispec.Descriptor, raw []byte) ([]string, error) {
	if p.ByDigest {
		err := p.shown(p.repo, d.Digest, func() error {
			_, err := p.pusher.Manifest(ctx, d.MediaType, raw)
			return err
		})
		return []string{p.repo + "@" + d.Digest.String()}, err
	}
	for _, ref := range p.Refs {
		if err := p.shown(ref, d.Digest, func() error { return p.tag(ctx, ref, d, raw) }); err != nil {
			return nil, err
		}
	}
	return p.Refs, nil
}

// shown shows how a manifest is pushed, in BuildKit's words.
func (p *Push) shown(name string, d digest.Digest, push func() error) error {
	text := "pushing manifest for " + name + "@" + d.String()
	if p.Step != nil {
		defer p.Step.Part(text)()
		return push()
	}
	step := p.rec.Step(text, "")
	step.Start()
	err := push()
	step.Done(err)
	return err
}

func (p *Push) tag(ctx context.Context, ref string, d ocispec.Descriptor, raw []byte) error {
	pusher := p.pusher
	if ref != p.Refs[0] {
		var err error
		if pusher, err = p.reg.Pusher(ctx, ref); err != nil {
			return err
		}
	}
	return pusher.Tag(ctx, d.MediaType, raw)
}

// shortDigest is the form in which progress shows a digest.
func shortDigest(d digest.Digest) string { return d.Algorithm().String() + ":" + d.Encoded()[:12] }
