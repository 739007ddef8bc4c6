package fileop

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"testing"

	"github.com/kiln-build/kiln/internal/tree"
	"github.com/kiln-build/kiln/internal/tree/memtree"
)

// many is like a node_modules.
func many() tree.Tree {
	f := files{}
	for i := range 500 {
		for j := range 100 {
			f[fmt.Sprintf("app/node_modules/package-%d/lib/internal/file-%d.js", i, j)] = memtree.File{Data: "x"}
		}
	}
	return memtree.New(f)
}

func BenchmarkCopy50000(b *testing.B) {
	src := many()
	var before, after runtime.MemStats
	for b.Loop() {
		runtime.GC()
		runtime.ReadMemStats(&before)
		c := New(nil, Options{})
		if err := c.Copy(context.Background(), src, fromDockerfile("app", "/srv/app/")); err != nil {
			b.Fatal(err)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		runtime.KeepAlive(c)
	}
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/50000, "B/file")
}

func BenchmarkDigest50000(b *testing.B) {
	src := many()
	for b.Loop() {
		if _, err := Digest(context.Background(), src, fromDockerfile("app", "/srv/app/")); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkWriteTar50000(b *testing.B) {
	c := New(nil, Options{})
	if err := c.Copy(context.Background(), many(), fromDockerfile("app", "/srv/app/")); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := c.WriteTar(context.Background(), io.Discard); err != nil {
			b.Fatal(err)
		}
	}
}
