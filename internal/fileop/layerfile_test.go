package fileop

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/tree"
	"github.com/kiln-build/kiln/internal/tree/memtree"
)

// TestThroughLayerFile: a copy onto an image of layer files, written as a layer and
// read back on top of them, is what the changes showed.
func TestThroughLayerFile(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	layers := 0
	asLayer := func(c *Changes) tree.Tree {
		t.Helper()
		var buf bytes.Buffer
		if err := c.WriteTar(ctx, &buf); err != nil {
			t.Fatal(err)
		}
		layers++
		p := filepath.Join(dir, fmt.Sprint(layers))
		f, err := os.Create(p)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := layer.Convert(ctx, &buf, f, layer.Limits{}); err != nil {
			t.Fatal(err)
		}
		l, err := layer.Open(p)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	for seed := range uint64(150) {
		r := rand.New(rand.NewPCG(seed, 6))
		src := memtree.New(randomFiles(r))
		b := New(nil, Options{Now: time.Unix(9, 0)})
		if err := b.Copy(ctx, memtree.New(randomFiles(r)), fromDockerfile("/", "/")); err != nil {
			t.Fatal(err)
		}
		bottom := asLayer(b)
		c := New(rootfs.New(bottom), Options{Now: time.Unix(9, 0)})
		if err := c.Remove(ctx, RemoveAction{Path: names[r.IntN(len(names))], AllowNotFound: true}); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if c.Copy(ctx, src, randomCopy(r)) != nil {
				break // what it did until then is there
			}
		}
		want, err := listing(c)
		if err != nil {
			t.Fatal(err)
		}
		got, err := listing(rootfs.New(bottom, asLayer(c)))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(got[1:], want[1:]) {
			t.Fatalf("seed %d: got\n%s\nwant\n%s", seed, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}
