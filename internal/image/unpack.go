package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// parallelUnpacks is how many layers are fetched and unpacked at once.
const parallelUnpacks = 4

// Unpack makes sure that the store has the layer file of l. What is missing is
// fetched from f and, in one streaming pass, verified, kept as a blob and
// converted. Nothing becomes visible unless everything about it is right: size
// and digest of the blob, and the diff ID of its content. Who asks for
// the same layer meanwhile, in this process or another, waits and fetches nothing.
//
// progress, which may be nil, is told how many bytes of the blob have been
// read; it is not called if there is nothing to do. The result has the blob
// that the store has, if l had none. f may be nil if the store must have it.
func Unpack(ctx context.Context, st *store.Store, l Layer, f Fetcher, progress func(current int64)) (Layer, error) {
	if err := checkDigest(l.DiffID); err != nil {
		return Layer{}, fmt.Errorf("unpack layer: %w", err)
	}
	if st.HasLayer(l.DiffID) {
		// Asking for the blob keeps a prune from it while this build runs.
		_ = l.Blob.Digest != "" && hasBlob(st, l.Blob)
		return withBlob(st, l)
	}
	unlock, err := st.Lock(ctx, layerLock(l.DiffID))
	if err != nil {
		return Layer{}, err
	}
	defer unlock()
	if l, err = withBlob(st, l); err != nil || st.HasLayer(l.DiffID) {
		return l, err
	}
	if l.Blob.Digest == "" {
		return Layer{}, fmt.Errorf("unpack layer %s: %w", l.DiffID, &LostError{l, errors.New("the store has lost it, and it was never in a registry")})
	}
	u := unpacking{st: st, l: l, progress: progress}
	if most := layer.DefaultLimits().MaxBytes; l.Blob.Size > most {
		return Layer{}, u.explain(&layer.LimitError{Name: "MaxBytes", What: "bytes in the layer's blob", Max: most})
	}
	if hasBlob(st, l.Blob) {
		err = u.fromStore(ctx)
		if !errors.Is(err, store.ErrCorrupt) {
			return l, u.explain(err)
		}
		// It is gone now: as if it had not been there.
	}
	if f == nil {
		return Layer{}, fmt.Errorf("unpack layer %s: %w", l.DiffID, &LostError{l, fmt.Errorf("its blob %s is not in the store", l.Blob.Digest)})
	}
	return l, u.explain(u.fetch(ctx, f))
}

// withBlob completes a layer without a blob with one that the store has.
func withBlob(st *store.Store, l Layer) (Layer, error) {
	if l.Blob.Digest != "" {
		return l, nil
	}
	have, err := knownBlobs(st, l.DiffID)
	if err == nil && len(have) > 0 {
		l.Blob = have[0].Descriptor
	}
	return l, err
}

type unpacking struct {
	st       *store.Store
	l        Layer
	progress func(int64)
}

// fromStore converts a blob that the store has.
func (u *unpacking) fromStore(ctx context.Context) error {
	r, err := u.st.OpenBlob(u.l.Blob.Digest)
	if err != nil {
		return err
	}
	defer r.Close()
	w, err := u.convert(ctx, ctxReader{ctx, r})
	if err != nil {
		// Damage may look like anything, unless it is read to its end.
		if derr := drain(ctx, r, err); errors.Is(derr, store.ErrCorrupt) {
			return derr
		}
		return err
	}
	defer w.Close()
	return u.commit(w)
}

// commit makes the layer file visible and notes its blob, which is there.
func (u *unpacking) commit(w *store.LayerWriter) error {
	if err := w.Commit(u.l.DiffID); err != nil {
		return err
	}
	return noteBlob(u.st, u.l.DiffID, knownBlob{Descriptor: u.l.Blob, Compression: knownLayerTypes()[u.l.Blob.MediaType].compression})
}

// fetch converts a blob while it comes in.
func (u *unpacking) fetch(ctx context.Context, f Fetcher) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r, err := f.Fetch(ctx, u.l)
	if err != nil {
		if IsForeign(u.l.Blob.MediaType) {
			return fmt.Errorf("fetch it (a foreign layer, which registries need not have: %q): %w", u.l.Blob.MediaType, err)
		}
		return fmt.Errorf("fetch it: %w", err)
	}
	defer r.Close()
	blob, err := u.st.NewBlob()
	if err != nil {
		return err
	}
	defer blob.Close()
	// One byte more than there should be is enough to know.
	in := io.TeeReader(io.LimitReader(ctxReader{ctx, r}, u.l.Blob.Size+1), blob)
	w, err := u.convert(ctx, in)
	if lie := u.checkBlob(ctx, in, blob, err); lie != nil {
		if w != nil {
			w.Close()
		}
		return lie
	}
	defer w.Close()
	if _, err := blob.Commit(u.l.Blob.Digest); err != nil {
		return err
	}
	return u.commit(w)
}

// checkBlob returns err, or, if the blob is another one than was announced, that:
// for then this is why its content makes no sense.
func (u *unpacking) checkBlob(ctx context.Context, in io.Reader, blob *store.BlobWriter, err error) error {
	want := u.l.Blob
	if err != nil {
		if derr := drain(ctx, in, err); derr != nil {
			var told *diag.Error
			if errors.As(derr, &told) {
				return derr // whom it was fetched from knows better what is wrong
			}
			return err
		}
	}
	switch {
	case blob.Size() > want.Size:
		return fmt.Errorf("%w: it has more than the %d bytes that its manifest announces", store.ErrMismatch, want.Size)
	case blob.Size() < want.Size:
		return fmt.Errorf("%w: it has %d bytes, and its manifest announces %d", store.ErrMismatch, blob.Size(), want.Size)
	case err != nil && want.Digest.Algorithm() == digest.SHA256 && blob.Digest() != want.Digest:
		return fmt.Errorf("%w: %s was announced, and %s came", store.ErrMismatch, want.Digest, blob.Digest())
	}
	return err
}

// drain reads on after an error of what was read so far, if that can tell more.
// It returns nil if the end was reached.
func drain(ctx context.Context, r io.Reader, err error) error {
	var limit *layer.LimitError
	if ctx.Err() != nil || errors.As(err, &limit) {
		return err
	}
	const most = 1 << 30
	n, derr := io.Copy(io.Discard, io.LimitReader(ctxReader{ctx, r}, most))
	if derr == nil && n == most {
		return err
	}
	return derr
}

// convert writes the layer file and checks that it is what it should be. The
// caller commits and closes it.
func (u *unpacking) convert(ctx context.Context, r io.Reader) (_ *store.LayerWriter, err error) {
	if u.progress != nil {
		r = &countingReader{r: r, progress: u.progress}
	}
	tar, err := layer.Decompress(r)
	if err != nil {
		return nil, err
	}
	defer tar.Close()
	w, err := u.st.NewLayer()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			w.Close()
		}
	}()
	info, err := layer.Convert(ctx, tar, w.File(), layer.DefaultLimits())
	if err != nil {
		return nil, err
	}
	// What the decompressor had no use for belongs to the digest too.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return nil, err
	}
	if info.DiffID != u.l.DiffID {
		return nil, fmt.Errorf("failed to verify layer: %w: its content has the diff ID %s, and the image's config says another one", store.ErrMismatch, info.DiffID)
	}
	return w, nil
}

// explain says which layer failed, and what to do about it.
func (u *unpacking) explain(err error) error {
	if err == nil {
		return nil
	}
	err = fmt.Errorf("unpack layer %s: %w", u.name(), lost(u.l, err))
	code := diag.ExitFailure
	if u.l.Origin != "" {
		code = diag.ExitRegistry
	}
	var limit *layer.LimitError
	switch {
	case errors.As(err, &limit):
		return (&diag.Error{Err: err, Code: code}).
			WithHint("Such a layer is usually an attack or an accident. Kiln takes layers of up to %d GiB and %d files.",
				layer.DefaultLimits().MaxBytes>>30, layer.DefaultLimits().MaxEntries)
	case errors.Is(err, store.ErrMismatch):
		return (&diag.Error{Err: err, Code: code}).
			WithHint("Where it came from gives something else than was asked for: it, or something on the way, is broken or not to be trusted.")
	}
	return err
}

// lost makes a LostError of err, unless it is this machine's disk that failed.
func lost(l Layer, err error) error {
	for _, own := range []error{syscall.ENOSPC, syscall.EDQUOT, syscall.EIO, syscall.EROFS, syscall.EMFILE, syscall.ENFILE} {
		if errors.Is(err, own) {
			return err
		}
	}
	return &LostError{l, err}
}

func (u *unpacking) name() digest.Digest {
	if u.l.Blob.Digest != "" {
		return u.l.Blob.Digest
	}
	return u.l.DiffID
}

type countingReader struct {
	r        io.Reader
	n        int64
	progress func(int64)
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if n > 0 {
		c.n += int64(n)
		c.progress(c.n)
	}
	return n, err
}

// UnpackAll unpacks the layers of an image, several at once. progress, which may
// be nil, is told the index of the layer too, and may be called concurrently.
func UnpackAll(ctx context.Context, st *store.Store, ls []Layer, f Fetcher, progress func(layer int, current int64)) ([]Layer, error) {
	out := make([]Layer, len(ls))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallelUnpacks)
	for i, l := range ls {
		g.Go(func() error {
			var report func(int64)
			if progress != nil {
				report = func(n int64) { progress(i, n) }
			}
			var err error
			out[i], err = Unpack(ctx, st, l, f, report)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return out, nil
}

// Available reports whether a layer can be had: from the store, as a layer file or blob,
// or from where it came from.
func Available(st *store.Store, l Layer) bool {
	if st.HasLayer(l.DiffID) {
		return true
	}
	if l.Blob.Digest == "" {
		return false
	}
	_, err := st.StatBlob(l.Blob.Digest)
	return err == nil || l.Origin != ""
}

// OpenLayer opens the layer file of l, which is unpacked first if it is not
// there. One that turns out to be damaged is removed, and unpacked once more.
func OpenLayer(ctx context.Context, st *store.Store, l Layer, f Fetcher) (*layer.Reader, error) {
	for try := 0; ; try++ {
		if _, err := Unpack(ctx, st, l, f, nil); err != nil {
			return nil, err
		}
		r, err := layer.Open(st.LayerPath(l.DiffID))
		if err == nil {
			return r, nil
		}
		if !errors.Is(err, layer.ErrDamaged) {
			return nil, fmt.Errorf("open layer %s: %w", l.DiffID, err)
		}
		if derr := st.DropLayer(l.DiffID); derr != nil || try > 0 {
			return nil, errors.Join(fmt.Errorf("open layer %s: %w", l.DiffID, err), derr)
		}
	}
}
