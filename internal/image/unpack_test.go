package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func newStore(t testing.TB) *store.Store {
	t.Helper()
	return must(store.Open(filepath.Join(t.TempDir(), "store")))(t)
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// makeTar is a layer's tar as other tools write it.
func makeTar(t testing.TB, files map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for name, content := range files {
		if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), ModTime: time.Unix(1e9, 0), Uname: "root"}); err != nil {
			t.Fatal(err)
		}
		io.WriteString(tw, content)
	}
	tw.Close()
	return b.Bytes()
}

func compress(t testing.TB, b []byte, c layer.Compression) []byte {
	t.Helper()
	if c == "" {
		return b
	}
	var out bytes.Buffer
	z := must(layer.Compress(&out, c, 0))(t)
	z.Write(b)
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// remote is a Fetcher that gives what it was told to, right or wrong.
type remote struct {
	blobs   map[digest.Digest][]byte
	fetches atomic.Int64
	slow    time.Duration
}

func (r *remote) Fetch(ctx context.Context, l Layer) (io.ReadCloser, error) {
	r.fetches.Add(1)
	time.Sleep(r.slow)
	b, ok := r.blobs[l.Blob.Digest]
	if !ok {
		return nil, errors.New("404")
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

// layerOf describes a layer, and a remote that has it.
func layerOf(t testing.TB, raw []byte, c layer.Compression) (Layer, *remote) {
	t.Helper()
	blob := compress(t, raw, c)
	l := Layer{
		DiffID: digest.FromBytes(raw),
		Blob:   ocispec.Descriptor{MediaType: layer.MediaType(c), Digest: digest.FromBytes(blob), Size: int64(len(blob))},
		Origin: "registry.example/x",
	}
	return l, &remote{blobs: map[digest.Digest][]byte{l.Blob.Digest: blob}}
}

func readFile(t testing.TB, st *store.Store, diffID digest.Digest, name string) string {
	t.Helper()
	r := must(layer.Open(st.LayerPath(diffID)))(t)
	defer r.Close()
	f := must(r.Open(name))(t)
	defer f.Close()
	return string(must(io.ReadAll(f))(t))
}

// nothingIn fails if the store has any content or leftovers.
func nothingIn(t testing.TB, st *store.Store) {
	t.Helper()
	u := must(st.Usage(context.Background()))(t)
	if u.Blobs.Count+u.Layers.Count+u.Temp.Count+u.Records.Count+u.Tags.Count != 0 {
		t.Errorf("something is in the store: %+v", u)
	}
}

func TestUnpack(t *testing.T) {
	for _, c := range []layer.Compression{layer.Gzip, layer.Zstd, ""} {
		t.Run(string(c), func(t *testing.T) {
			st, ctx := newStore(t), context.Background()
			raw := makeTar(t, map[string]string{"etc/passwd": "root", "big": strings.Repeat("x", 1_000_000)})
			l, r := layerOf(t, raw, c)
			last := int64(0)
			got := must(Unpack(ctx, st, l, r, func(n int64) { last = n }))(t)
			if got.Blob.Digest != l.Blob.Digest || got.Origin != l.Origin {
				t.Errorf("layer %+v", got)
			}
			if last != l.Blob.Size {
				t.Errorf("progress ended at %d of %d", last, l.Blob.Size)
			}
			if s := readFile(t, st, l.DiffID, "etc/passwd"); s != "root" {
				t.Errorf("content %q", s)
			}
			if b := must(st.ReadBlob(l.Blob.Digest, 1<<30))(t); !bytes.Equal(b, r.blobs[l.Blob.Digest]) {
				t.Error("the blob differs")
			}
			must(Unpack(ctx, st, l, r, func(int64) { t.Error("progress without work") }))(t)
			// Known by its diff ID alone.
			got = must(Unpack(ctx, st, Layer{DiffID: l.DiffID}, nil, nil))(t)
			if got.Blob.Digest != l.Blob.Digest {
				t.Errorf("by diff ID: %+v", got)
			}
			// From the blob, when the layer file is lost.
			if err := st.DropLayer(l.DiffID); err != nil {
				t.Fatal(err)
			}
			must(Unpack(ctx, st, Layer{DiffID: l.DiffID}, nil, nil))(t)
			if !st.HasLayer(l.DiffID) || r.fetches.Load() != 1 {
				t.Errorf("%d fetches", r.fetches.Load())
			}
		})
	}
}

func TestUnpackOnceForMany(t *testing.T) {
	st, ctx := newStore(t), context.Background()
	l, r := layerOf(t, makeTar(t, map[string]string{"f": "x"}), layer.Gzip)
	r.slow = 20 * time.Millisecond
	var wg sync.WaitGroup
	for i := range 16 {
		s := st
		if i%2 == 0 { // another process, as far as the store can tell
			s = must(store.Open(st.Root()))(t)
		}
		wg.Go(func() {
			if _, err := Unpack(ctx, s, l, r, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := r.fetches.Load(); n != 1 {
		t.Errorf("%d fetches for one layer", n)
	}
}

func TestUnpackLies(t *testing.T) {
	raw := makeTar(t, map[string]string{"f": strings.Repeat("content ", 10_000)})
	noise := make([]byte, 300_000)
	for i := range noise {
		noise[i] = byte(rand.Uint32())
	}
	noisy := makeTar(t, map[string]string{"noise": string(noise)})
	cases := map[string]struct {
		raw  []byte
		lie  func(l *Layer, blob []byte) []byte
		want string
	}{
		"size too small":       {raw, func(l *Layer, b []byte) []byte { l.Blob.Size--; return b }, "more than the"},
		"size too large":       {raw, func(l *Layer, b []byte) []byte { l.Blob.Size++; return b }, "its manifest announces"},
		"size of an exabyte":   {raw, func(l *Layer, b []byte) []byte { l.Blob.Size = 1 << 60; return b }, "limit"},
		"size negative":        {raw, func(l *Layer, b []byte) []byte { l.Blob.Size = -1; return b }, "more than the"},
		"another blob":         {raw, func(l *Layer, b []byte) []byte { return compress(t, append(raw, make([]byte, 512)...), layer.Gzip) }, "announces"},
		"another diff ID":      {raw, func(l *Layer, b []byte) []byte { l.DiffID = digest.FromString("x"); return b }, "failed to verify layer"},
		"cut":                  {noisy, func(l *Layer, b []byte) []byte { return b[:len(b)/2] }, "announces"},
		"a bit flipped":        {noisy, func(l *Layer, b []byte) []byte { b[len(b)/2] ^= 1; return b }, "was announced"},
		"first byte":           {noisy, func(l *Layer, b []byte) []byte { b[0] ^= 1; return b }, "was announced"},
		"last byte":            {noisy, func(l *Layer, b []byte) []byte { b[len(b)-1] ^= 1; return b }, "was announced"},
		"rubbish behind":       {raw, func(l *Layer, b []byte) []byte { return append(b, "rubbish"...) }, "more than the"},
		"nothing":              {raw, func(l *Layer, b []byte) []byte { return nil }, "0 bytes"},
		"an error page":        {raw, func(l *Layer, b []byte) []byte { return []byte("<html>502") }, "9 bytes"},
		"rubbish, as promised": {raw, promised([]byte(strings.Repeat("rubbish", 1000))), "read layer"},
		"zeros, as promised":   {raw, promised(make([]byte, 10_240)), "diff ID"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			st := newStore(t)
			l, r := layerOf(t, c.raw, layer.Gzip)
			for d, b := range r.blobs {
				b = c.lie(&l, bytes.Clone(b))
				r.blobs = map[digest.Digest][]byte{d: b, l.Blob.Digest: b}
			}
			_, err := Unpack(context.Background(), st, l, r, nil)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error is %v, want %q", err, c.want)
			}
			if strings.Contains(err.Error(), "announce") && diag.ExitCode(err) != diag.ExitRegistry {
				t.Errorf("exit code %d", diag.ExitCode(err))
			}
			nothingIn(t, st)
		})
	}
}

func promised(content []byte) func(l *Layer, b []byte) []byte {
	return func(l *Layer, _ []byte) []byte {
		l.Blob.Digest, l.Blob.Size = digest.FromBytes(content), int64(len(content))
		return content
	}
}

// A blob that went bad on the disk is fetched again, whatever is wrong with it.
func TestUnpackHealsDamage(t *testing.T) {
	for name, at := range map[string]int{"head": 0, "middle": 100_000, "tail": -1} {
		t.Run(name, func(t *testing.T) {
			st, ctx := newStore(t), context.Background()
			noise := make([]byte, 300_000)
			for i := range noise {
				noise[i] = byte(rand.Uint32())
			}
			l, r := layerOf(t, makeTar(t, map[string]string{"f": string(noise)}), layer.Gzip)
			must(Unpack(ctx, st, l, r, nil))(t)
			if err := st.DropLayer(l.DiffID); err != nil {
				t.Fatal(err)
			}
			p := filepath.Join(st.Root(), "blobs/sha256", l.Blob.Digest.Encoded())
			b := must(os.ReadFile(p))(t)
			if at < 0 {
				at += len(b)
			}
			b[at] ^= 0x10
			os.Chmod(p, 0o600)
			os.WriteFile(p, b, 0o600)
			if _, err := Unpack(ctx, st, l, nil, nil); err == nil || st.HasLayer(l.DiffID) {
				t.Fatalf("unpacked from a damaged blob: %v", err)
			}
			must(Unpack(ctx, st, l, r, nil))(t)
			if n := r.fetches.Load(); n != 2 {
				t.Errorf("%d fetches, want 2", n)
			}
			must(st.ReadBlob(l.Blob.Digest, 1<<30))(t)
		})
	}
}

func TestUnpackInterrupted(t *testing.T) {
	st := newStore(t)
	l, _ := layerOf(t, makeTar(t, map[string]string{"f": "x"}), layer.Gzip)
	l.Blob.Size = 1 << 30
	ctx, cancel := context.WithCancelCause(context.Background())
	why := errors.New("enough")
	endless := fetcherFunc(func(context.Context, Layer) (io.ReadCloser, error) {
		return io.NopCloser(readerFunc(func(p []byte) (int, error) {
			cancel(why)
			return copy(p, "\x1f\x8b\x08"), nil
		})), nil
	})
	for range 2 { // while it reads, and before
		if _, err := Unpack(ctx, st, l, endless, nil); !errors.Is(err, why) {
			t.Errorf("error is %v", err)
		}
		nothingIn(t, st)
	}
}

type fetcherFunc func(context.Context, Layer) (io.ReadCloser, error)

func (f fetcherFunc) Fetch(ctx context.Context, l Layer) (io.ReadCloser, error) { return f(ctx, l) }

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestUnpackAll(t *testing.T) {
	st, ctx := newStore(t), context.Background()
	all := &remote{blobs: map[digest.Digest][]byte{}}
	var ls []Layer
	for i := range 10 {
		l, r := layerOf(t, makeTar(t, map[string]string{"f": fmt.Sprint(i % 9)}), layer.Zstd)
		for d, b := range r.blobs {
			all.blobs[d] = b
		}
		ls = append(ls, l)
	}
	var seen sync.Map
	got := must(UnpackAll(ctx, st, ls, all, func(i int, _ int64) { seen.Store(i, true) }))(t)
	for i, l := range got {
		if l.DiffID != ls[i].DiffID || !st.HasLayer(l.DiffID) {
			t.Errorf("layer %d: %+v", i, l)
		}
	}
	if n := all.fetches.Load(); n != 9 { // two are the same
		t.Errorf("%d fetches", n)
	}
	ls = append(ls, Layer{DiffID: digest.FromString("x"), Blob: ocispec.Descriptor{Digest: digest.FromString("y"), Size: 1}})
	if _, err := UnpackAll(ctx, st, ls, all, nil); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("a missing layer gave %v", err)
	}
	for _, bad := range []Layer{{}, {DiffID: "sha256:x"}, {DiffID: digest.FromString("x")}} {
		if _, err := Unpack(ctx, st, bad, all, nil); err == nil {
			t.Errorf("%+v: no error", bad)
		}
	}
}

func TestOpenLayerHealsDamage(t *testing.T) {
	st, ctx := newStore(t), context.Background()
	l, r := layerOf(t, makeTar(t, map[string]string{"f": "x"}), layer.Gzip)
	must(Unpack(ctx, st, l, r, nil))(t)
	p := st.LayerPath(l.DiffID)
	os.Chmod(p, 0o600)
	if err := os.Truncate(p, 100); err != nil {
		t.Fatal(err)
	}
	rd := must(OpenLayer(ctx, st, l, nil))(t) // the blob is there
	rd.Close()
	if s := readFile(t, st, l.DiffID, "f"); s != "x" || r.fetches.Load() != 1 {
		t.Errorf("content %q, %d fetches", s, r.fetches.Load())
	}
}

// A build that finds a layer also keeps its blob from a prune.
func TestUnpackKeepsBlobFromPrune(t *testing.T) {
	st, ctx := newStore(t), context.Background()
	l, r := layerOf(t, makeTar(t, map[string]string{"f": "x"}), layer.Gzip)
	must(Unpack(ctx, st, l, r, nil))(t)
	old := time.Now().Add(-time.Hour)
	for _, p := range []string{st.LayerPath(l.DiffID), filepath.Join(st.Root(), "blobs/sha256", l.Blob.Digest.Encoded())} {
		os.Chtimes(p, old, old)
	}
	release := must(st.Use(ctx))(t)
	defer release()
	must(Unpack(ctx, st, l, nil, nil))(t)
	other := must(store.Open(st.Root()))(t)
	must(other.Prune(ctx, store.PruneOptions{}))(t)
	if !st.HasLayer(l.DiffID) || !hasBlob(st, l.Blob) {
		t.Error("prune took what a running build uses")
	}
}
