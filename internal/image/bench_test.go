package image

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/kiln-build/kiln/internal/layer"
)

// writeSome writes a tar of n files of 64 KiB that compress to about half.
func writeSome(n int) func(w io.Writer) error {
	return func(w io.Writer) error {
		tw := tar.NewWriter(w)
		rnd := rand.New(rand.NewPCG(1, 2))
		b := make([]byte, 64<<10)
		for j := range b {
			b[j] = byte(rnd.Uint32()) & 0xf
		}
		for i := range n {
			copy(b[rnd.IntN(len(b)-8):], fmt.Sprintf("%8d", i))
			if err := tw.WriteHeader(&tar.Header{Name: fmt.Sprintf("dir%d/file%d", i%100, i), Mode: 0o644, Size: int64(len(b))}); err != nil {
				return err
			}
			if _, err := tw.Write(b); err != nil {
				return err
			}
		}
		return tw.Close()
	}
}

const someFiles = 1600 // 100 MiB

func BenchmarkCommit(b *testing.B) {
	for _, c := range []layer.Compression{"", layer.Gzip, layer.Zstd} {
		b.Run("compression="+string(c), func(b *testing.B) {
			st := newStore(b)
			b.SetBytes(someFiles * 64 << 10)
			b.ReportAllocs()
			for b.Loop() {
				must(Commit(context.Background(), st, CommitOptions{Compression: c}, writeSome(someFiles)))(b)
			}
		})
	}
}

func BenchmarkUnpack(b *testing.B) {
	st, ctx := newStore(b), context.Background()
	l := must(Commit(ctx, st, CommitOptions{Compression: layer.Gzip}, writeSome(someFiles)))(b)
	b.SetBytes(someFiles * 64 << 10)
	for b.Loop() {
		if err := st.DropLayer(l.DiffID); err != nil {
			b.Fatal(err)
		}
		must(Unpack(ctx, st, l, nil, nil))(b)
	}
}

// Memory must not grow with what a layer contains.
func TestMemoryIsBounded(t *testing.T) {
	if testing.Short() {
		t.Skip("writes 200 MiB")
	}
	st, ctx := newStore(t), context.Background()
	grow := func(n int) uint64 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		l := must(Commit(ctx, st, CommitOptions{Compression: layer.Zstd}, writeSome(n)))(t)
		if err := st.DropLayer(l.DiffID); err != nil {
			t.Fatal(err)
		}
		must(Unpack(ctx, st, l, nil, nil))(t)
		runtime.ReadMemStats(&after)
		return after.TotalAlloc - before.TotalAlloc
	}
	small := grow(100)
	large := grow(3200)
	if large > small+64<<20 {
		t.Errorf("a layer of 6 MiB allocates %d MiB in all, one of 200 MiB %d", small>>20, large>>20)
	}
}
