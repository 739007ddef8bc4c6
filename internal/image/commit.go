package image

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// CommitOptions says which forms of a new layer are made.
type CommitOptions struct {
	// Compression of the blob. Empty: none is made yet (see Pack).
	Compression layer.Compression
	Level       int // 0: the compression's default
}

// Commit stores a new layer. write writes its canonical tar (layer.TarWriter's)
// to w, once; what it writes goes at the same time into the digest, the layer
// file and, if it was asked for, the compressed blob. If write fails its
// error is returned and nothing is stored.
func Commit(ctx context.Context, st *store.Store, opt CommitOptions, write func(w io.Writer) error) (Layer, error) {
	file, err := st.NewLayer()
	if err != nil {
		return Layer{}, err
	}
	defer file.Close()
	blob, err := newPacker(st, opt.Compression, opt.Level)
	if err != nil {
		return Layer{}, fmt.Errorf("commit layer: %w", err)
	}
	defer blob.Close()

	pr, pw := io.Pipe()
	var info layer.Info
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		var err error
		info, err = layer.Convert(gctx, pr, file.File(), layer.DefaultLimits())
		pr.CloseWithError(err)
		return err
	})
	g.Go(func() error {
		// Headers come in small pieces, and a pipe is slow with those.
		w := bufio.NewWriterSize(io.MultiWriter(pw, blob), 256<<10)
		err := write(w)
		if err == nil {
			err = w.Flush()
		}
		pw.CloseWithError(err)
		return err
	})
	if err := g.Wait(); err != nil {
		return Layer{}, fmt.Errorf("commit layer: %w", err)
	}
	// Blob first: a layer whose file is there needs no more work.
	desc, err := blob.commit()
	if err != nil {
		return Layer{}, fmt.Errorf("commit layer: %w", err)
	}
	if err := file.Commit(info.DiffID); err != nil {
		return Layer{}, err
	}
	l := Layer{DiffID: info.DiffID, Blob: desc, Newest: info.Newest.UTC()}
	if l.Newest.IsZero() {
		l.Newest = time.Unix(0, 0).UTC() // an empty layer has nothing young in it
	}
	if desc.Digest != "" {
		err = noteBlob(st, l.DiffID, madeBlob(desc, opt.Compression, opt.Level))
	}
	return l, err
}

// packer compresses what is written to it into a blob; or drops it, without a
// compression.
type packer struct {
	blob        *store.BlobWriter
	z           io.WriteCloser
	compression layer.Compression
}

func newPacker(st *store.Store, c layer.Compression, level int) (*packer, error) {
	if c == "" {
		return &packer{}, nil
	}
	blob, err := st.NewBlob()
	if err != nil {
		return nil, err
	}
	z, err := layer.Compress(blob, c, level)
	if err != nil {
		blob.Close()
		return nil, err
	}
	return &packer{blob, z, c}, nil
}

func (p *packer) Write(b []byte) (int, error) {
	if p.z == nil {
		return len(b), nil
	}
	return p.z.Write(b)
}

func (p *packer) commit() (ocispec.Descriptor, error) {
	if p.z == nil {
		return ocispec.Descriptor{}, nil
	}
	z := p.z
	p.z = nil
	if err := z.Close(); err != nil {
		return ocispec.Descriptor{}, err
	}
	d, err := p.blob.Commit("")
	return ocispec.Descriptor{MediaType: layer.MediaType(p.compression), Digest: d, Size: p.blob.Size()}, err
}

func (p *packer) Close() {
	if p.z != nil {
		p.z.Close()
	}
	if p.blob != nil {
		p.blob.Close()
	}
}

// Pack gives a layer the compressed blob that a push needs. A layer that has
// one, of whatever compression, keeps it: it is what a registry may
// have already. What is made is remembered and never made twice.
func Pack(ctx context.Context, st *store.Store, l Layer, c layer.Compression, level int) (Layer, error) {
	return pack(ctx, st, l, c, level, anyBlob)
}

// Repack is Pack for those who insist on the compression, and if level is not 0
// on that, too. It needs the layer to be in the store.
func Repack(ctx context.Context, st *store.Store, l Layer, c layer.Compression, level int) (Layer, error) {
	return pack(ctx, st, l, c, level, suchBlob)
}

// PackNew is Pack for a layer that a build made: its blob is what Kiln makes of it
// now, whatever others the store has seen, so that the image depends on no store.
func PackNew(ctx context.Context, st *store.Store, l Layer, c layer.Compression, level int) (Layer, error) {
	return pack(ctx, st, l, c, level, ourBlob)
}

// demand is which of a layer's blobs will do.
type demand int

const (
	anyBlob  demand = iota // any that is compressed
	suchBlob               // of the compression, and of the level if one is given
	ourBlob                // of the compression and level, and made by Kiln
)

func pack(ctx context.Context, st *store.Store, l Layer, c layer.Compression, level int, want demand) (Layer, error) {
	if settled(l, c, level, want) {
		return l, nil
	}
	if err := checkDigest(l.DiffID); err != nil {
		return Layer{}, fmt.Errorf("compress layer: %w", err)
	}
	unlock, err := st.Lock(ctx, layerLock(l.DiffID))
	if err != nil {
		return Layer{}, err
	}
	defer unlock()
	have, err := knownBlobs(st, l.DiffID)
	if err != nil {
		return Layer{}, err
	}
	if k, ok := pick(have, c, level, want); ok {
		l.Blob, l.Origin = k.Descriptor, ""
		return l, nil
	}
	desc, err := makeBlob(ctx, st, l, have, c, level)
	if err != nil {
		return Layer{}, fmt.Errorf("compress layer %s: %w", l.DiffID, err)
	}
	l.Blob, l.Origin = desc, ""
	return l, noteBlob(st, l.DiffID, madeBlob(desc, c, level))
}

func madeBlob(d ocispec.Descriptor, c layer.Compression, level int) knownBlob {
	return knownBlob{Descriptor: d, Compression: compressionOf(c), Level: level, Ours: true}
}

// compressionOf is a compression as layerType and knownBlob have it.
func compressionOf(c layer.Compression) string {
	if c == layer.Uncompressed {
		return ""
	}
	return string(c)
}

// settled reports whether l has a blob already that will do.
func settled(l Layer, c layer.Compression, level int, want demand) bool {
	if l.Blob.Digest == "" {
		return false
	}
	t := knownLayerTypes()[l.Blob.MediaType]
	switch {
	case t.foreign:
		return true
	case want == anyBlob:
		return t.compression != ""
	case want == suchBlob:
		return level == 0 && t.compression == compressionOf(c)
	}
	return false
}

// pick chooses among blobs that there are: the wanted compression before others.
func pick(have []knownBlob, c layer.Compression, level int, want demand) (best knownBlob, ok bool) {
	for _, k := range have {
		such := k.Compression == compressionOf(c) && (level == 0 || k.Level == level)
		if want == ourBlob {
			such = such && k.Ours && k.Level == level
		}
		if such {
			return k, true
		}
		if want == anyBlob && k.Compression != "" && !ok {
			best, ok = k, true
		}
	}
	return best, ok
}

// makeBlob compresses a layer's tar.
func makeBlob(ctx context.Context, st *store.Store, l Layer, have []knownBlob, c layer.Compression, level int) (ocispec.Descriptor, error) {
	if c == "" {
		return ocispec.Descriptor{}, errors.New("no compression was chosen")
	}
	p, err := newPacker(st, c, level)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer p.Close()
	h := sha256.New()
	w := io.MultiWriter(h, p)
	canonical, err := writeTar(ctx, st, l, have, w)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if err := checkTar(h, l.DiffID, canonical); err != nil {
		return ocispec.Descriptor{}, err
	}
	return p.commit()
}

func checkTar(h hash.Hash, want digest.Digest, canonical bool) error {
	got := digest.NewDigest(digest.SHA256, h)
	switch {
	case got == want:
		return nil
	case canonical:
		return fmt.Errorf("its original tar was made by another tool and is not in the store any more (a new one would be another layer, %s): pull the image again", got)
	}
	return fmt.Errorf("%w: it has the diff ID %s", store.ErrMismatch, got)
}

// writeTar writes the layer's tar from whatever form of it the store has.
// canonical says that it was made anew.
func writeTar(ctx context.Context, st *store.Store, l Layer, have []knownBlob, w io.Writer) (canonical bool, err error) {
	if l.Blob.Digest != "" {
		have = append([]knownBlob{{Descriptor: l.Blob}}, have...)
	}
	for _, k := range have {
		if hasBlob(st, k.Descriptor) {
			return false, copyBlob(ctx, st, k.Descriptor.Digest, w)
		}
	}
	if !st.HasLayer(l.DiffID) {
		return false, &LostError{l, errors.New("the store has no form of it any more")}
	}
	r, err := layer.Open(st.LayerPath(l.DiffID))
	if errors.Is(err, layer.ErrDamaged) {
		_ = st.DropLayer(l.DiffID)
	}
	if err != nil {
		return true, err
	}
	defer r.Close()
	return true, r.WriteTar(ctx, w)
}

func copyBlob(ctx context.Context, st *store.Store, d digest.Digest, w io.Writer) error {
	r, err := st.OpenBlob(d)
	if err != nil {
		return err
	}
	defer r.Close()
	tar, err := layer.Decompress(ctxReader{ctx, r})
	if err != nil {
		return err
	}
	defer tar.Close()
	if _, err := io.Copy(w, tar); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, r) // to its end, where it is verified
	return err
}

type ctxReader struct {
	ctx context.Context //nolint:containedctx // lives as long as one copy
	r   io.Reader
}

func (r ctxReader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.r.Read(p)
}

// PackAll packs the layers of an image, two at a time: compression itself
// uses several cores.
func PackAll(ctx context.Context, st *store.Store, ls []Layer, c layer.Compression, level int) ([]Layer, error) {
	out := make([]Layer, len(ls))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(2)
	for i, l := range ls {
		g.Go(func() error {
			var err error
			out[i], err = Pack(ctx, st, l, c, level)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return out, nil
}

// Packed returns the image with all layers compressed: img itself if they are,
// else one with another manifest. An archive's layers often are plain tars,
// which nobody wants to send as such.
func Packed(ctx context.Context, st *store.Store, img *Image, c layer.Compression, level int) (*Image, error) {
	ls, err := PackAll(ctx, st, img.Layers, c, level)
	if err != nil {
		return nil, err
	}
	m, err := ParseManifest(img.RawManifest, img.Manifest.MediaType)
	if err != nil {
		return nil, err
	}
	changed := false
	for i, l := range ls {
		if l.Blob.Digest != m.Layers[i].Digest {
			m.Layers[i] = manifestLayer(l.Blob, m.MediaType == MediaTypeDockerManifest)
			changed = true
		}
	}
	if !changed {
		return img, nil
	}
	raw, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, err
	}
	out, err := New(ocispec.Descriptor{MediaType: m.MediaType, Annotations: img.Manifest.Annotations}, raw, img.RawConfig, "")
	if err != nil {
		return nil, err
	}
	out.Ref = img.Ref
	for i := range out.Layers {
		out.Layers[i].Origin, out.Layers[i].Created = ls[i].Origin, ls[i].Created
	}
	return out, nil
}
