package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	goerofs "github.com/erofs/go-erofs"

	"github.com/kiln-build/kiln/internal/tree"
)

// bigTar writes a tar of n files of size bytes, 100 in a directory.
func bigTar(t testing.TB, w io.Writer, n, size int) {
	t.Helper()
	tw := tar.NewWriter(w)
	body := make([]byte, size)
	for i := range body {
		body[i] = byte(i*7 + i>>8)
	}
	at := time.Unix(1700000000, 123456789)
	for i := range n {
		d := fmt.Sprintf("usr/lib/node_modules/package-%05d/", i/100)
		if i%100 == 0 {
			if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d, Mode: 0o755, ModTime: at, Format: tar.FormatPAX}); err != nil {
				t.Error(err)
			}
		}
		h := &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("%sdist/module-%05d.js", d, i), Mode: 0o644, Size: int64(size), ModTime: at, Format: tar.FormatPAX}
		if err := tw.WriteHeader(h); err != nil {
			t.Error(err)
		}
		if _, err := tw.Write(body); err != nil {
			t.Error(err)
			return
		}
	}
	if err := tw.Close(); err != nil {
		t.Error(err)
	}
}

// peakReader calls at when the stream ends.
type peakReader struct {
	io.Reader
	at func()
}

func (r *peakReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if err == io.EOF && r.at != nil {
		r.at()
		r.at = nil
	}
	return n, err
}

// Convert's memory is a few hundred bytes an entry, whatever the files' sizes.
func TestConvertMemory(t *testing.T) {
	const files = 60_000
	pr, pw := io.Pipe()
	go func() {
		bigTar(t, pw, files, 100)
		pw.Close()
	}()
	base := heap()
	var live, allocated uint64
	var m runtime.MemStats
	src := &peakReader{pr, func() {
		live = heap() - base
		runtime.ReadMemStats(&m)
		allocated = m.TotalAlloc
	}}
	p := filepath.Join(t.TempDir(), "layer")
	info, err := convertTo(p, src, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&m)
	n := uint64(info.Entries)
	// Even if nothing of what the image's writing allocates were freed.
	t.Logf("%d entries: %d bytes an entry when the tar has ended, at most %d after", n, live/n, (live+m.TotalAlloc-allocated)/n)
	if per := (live + m.TotalAlloc - allocated) / n; per > 500 {
		t.Errorf("%d bytes an entry", per)
	}
}

func BenchmarkConvert(b *testing.B) {
	for _, bb := range []struct{ files, size int }{{1, 256 << 20}, {20_000, 4000}, {60_000, 100}} {
		b.Run(fmt.Sprintf("%dx%d", bb.files, bb.size), func(b *testing.B) {
			var buf bytes.Buffer
			bigTar(b, &buf, bb.files, bb.size)
			p := filepath.Join(b.TempDir(), "layer")
			b.SetBytes(int64(buf.Len()))
			cpu(b)
			for b.Loop() {
				if _, err := convertTo(p, bytes.NewReader(buf.Bytes()), Limits{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func benchFile(b *testing.B, files, size int) string {
	b.Helper()
	var buf bytes.Buffer
	bigTar(b, &buf, files, size)
	p := filepath.Join(b.TempDir(), "layer")
	if _, err := convertTo(p, &buf, Limits{}); err != nil {
		b.Fatal(err)
	}
	return p
}

func BenchmarkOpen(b *testing.B) {
	for _, files := range []int{1000, 10_000, 60_000} {
		b.Run(fmt.Sprint(files), func(b *testing.B) {
			p := benchFile(b, files, 1)
			cpu(b)
			for b.Loop() {
				r, err := Open(p)
				if err != nil {
					b.Fatal(err)
				}
				r.Close()
			}
		})
	}
}

// Every path's metadata, by Lstat and by ReadDir, of Reader and of go-erofs.
func BenchmarkRead(b *testing.B) {
	p := benchFile(b, 20_000, 1)
	r, err := Open(p)
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	var paths []string
	walk := func() {
		paths = paths[:0]
		if err := tree.Walk(r, ".", func(p string, _ tree.Node) error { paths = append(paths, p); return nil }); err != nil {
			b.Fatal(err)
		}
	}
	walk()
	f, err := os.Open(p)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	img, err := goerofs.Open(f)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("walk", func(b *testing.B) {
		cpu(b)
		for b.Loop() {
			walk()
		}
	})
	b.Run("lstat", func(b *testing.B) {
		cpu(b)
		for b.Loop() {
			for _, p := range paths {
				if _, err := r.Lstat(p); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
	b.Run("go-erofs walk", func(b *testing.B) {
		cpu(b)
		for b.Loop() {
			err := fs.WalkDir(img, ".", func(_ string, d fs.DirEntry, err error) error {
				if err == nil {
					_, err = d.Info()
				}
				return err
			})
			if err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("go-erofs lstat", func(b *testing.B) {
		cpu(b)
		for b.Loop() {
			for _, p := range paths {
				if _, err := fs.Lstat(img, p); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
}

func BenchmarkWriteTar(b *testing.B) {
	p := benchFile(b, 20_000, 4000)
	r, err := Open(p)
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	b.SetBytes(20_000 * 4000)
	cpu(b)
	for b.Loop() {
		if err := r.WriteTar(context.Background(), io.Discard); err != nil {
			b.Fatal(err)
		}
	}
}
