package cachemount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/tree"
	"github.com/kiln-build/kiln/internal/tree/memtree"
)

// describe is all that can be seen of a tree, a line for each path.
func describe(t *testing.T, tr tree.Tree) string {
	t.Helper()
	var b strings.Builder
	if err := tree.Walk(tr, ".", func(p string, n tree.Node) error {
		fmt.Fprintf(&b, "%s %o %d %d %d", p, n.Mode, n.UID, n.MTime.Unix(), len(n.Xattr))
		if n.IsRegular() {
			f, err := tr.Open(p)
			if err != nil {
				return err
			}
			defer f.Close()
			c, err := io.ReadAll(f)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %q", c)
		}
		b.WriteByte('\n')
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// layerOf makes a layer file of what w writes and opens it.
func layerOf(t *testing.T, w *squasher) *layer.Reader {
	t.Helper()
	w.ctx = context.Background()
	var tar bytes.Buffer
	if err := w.write(&tar); err != nil {
		t.Fatal(err)
	}
	f, err := os.CreateTemp(t.TempDir(), "layer")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := layer.Convert(context.Background(), &tar, f, layer.DefaultLimits()); err != nil {
		t.Fatal(err)
	}
	r, err := layer.Open(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// world makes random layers, each of which a step could have left on those below it.
type world struct {
	rnd    *rand.Rand
	layers []tree.Tree
	n      int
}

func (w *world) names() []string {
	var all []string
	dirs := []string{""}
	for range 3 {
		d := dirs[w.rnd.IntN(len(dirs))] + string(rune('a'+w.rnd.IntN(3)))
		all, dirs = append(all, d), append(dirs, d+"/")
	}
	return all
}

// step adds a layer.
func (w *world) step() {
	below := rootfs.New(w.layers...)
	files := map[string]memtree.File{}
	for range 1 + w.rnd.IntN(5) {
		for _, p := range w.names() {
			if _, ok := files[p]; ok || hasFileAbove(files, p) || hasChild(files, p) {
				continue
			}
			w.n++
			f := memtree.File{UID: uint32(w.n), MTime: time.Unix(int64(w.n), 0)}
			was, err := below.Lstat(p)
			switch k := w.rnd.IntN(8); {
			case k < 2 && err == nil:
				f = memtree.Whiteout()
			case k == 2:
				f.Data = fmt.Sprint(w.n)
			case k == 3:
				f.Link = fmt.Sprint("to ", w.n)
			case k == 4 && err == nil && was.IsDir():
				f.Mode, f.Xattr = tree.ModeDir|0o711, map[string]string{tree.XattrOpaque: "y"}
			default:
				f.Mode, f.Xattr = tree.ModeDir|0o750, map[string]string{"user.a": "b"}
			}
			files[p] = f
		}
	}
	// A canonical layer has an entry for every directory.
	for p := range maps.Clone(files) {
		for d := path.Dir(p); d != "."; d = path.Dir(d) {
			if _, ok := files[d]; !ok {
				w.n++
				files[d] = memtree.File{Mode: tree.ModeDir | 0o700, UID: uint32(w.n)}
			}
		}
	}
	w.layers = append(w.layers, memtree.New(files))
}

func hasFileAbove(files map[string]memtree.File, p string) bool {
	for d := path.Dir(p); d != "."; d = path.Dir(d) {
		if f, ok := files[d]; ok && f.Mode&tree.ModeType != tree.ModeDir {
			return true
		}
	}
	return false
}

func hasChild(files map[string]memtree.File, p string) bool {
	for q := range files {
		if strings.HasPrefix(q, p+"/") {
			return true
		}
	}
	return false
}

// TestSquash: layers merged into one change what is below as they did one by one.
func TestSquash(t *testing.T) {
	for seed := range uint64(400) {
		w := &world{rnd: rand.New(rand.NewPCG(seed, 1))}
		for range 2 + w.rnd.IntN(5) {
			w.step()
		}
		for n := range w.layers {
			top := slices.Clone(w.layers[n:])
			slices.Reverse(top)
			one := layerOf(t, &squasher{below: rootfs.New(w.layers[:n]...), layers: top})
			got := describe(t, rootfs.New(append(slices.Clone(w.layers[:n]), one)...))
			if want := describe(t, rootfs.New(w.layers...)); got != want {
				t.Fatalf("seed %d, from layer %d: merged\n%s\nwant\n%s", seed, n, got, want)
			}
			// Nothing is hidden where there is nothing.
			below := rootfs.New(w.layers[:n]...)
			if err := tree.Walk(one, ".", func(p string, node tree.Node) error {
				if _, err := below.Lstat(p); (node.IsWhiteout() || node.IsOpaque()) && errors.Is(err, fs.ErrNotExist) {
					t.Errorf("seed %d: %s hides nothing", seed, p)
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestRebase: the changes of one step on top of those of another, which it did not see: what
// it wrote and removed is so, and whatever else the other wrote is still there.
func TestRebase(t *testing.T) {
	moved := 0
	for seed := range uint64(400) {
		w := &world{rnd: rand.New(rand.NewPCG(seed, 2))}
		w.step()
		w.step()
		base := slices.Clone(w.layers)
		w.step()
		other := w.layers[2]
		w.layers = slices.Clone(base)
		w.step()
		mine := w.layers[2]
		one := layerOf(t, &squasher{below: rootfs.New(base...), layers: []tree.Tree{mine}, byName: true})
		alone := describe(t, rootfs.New(append(slices.Clone(base), one)...))
		if want := describe(t, rootfs.New(append(slices.Clone(base), mine)...)); alone != want {
			t.Fatalf("seed %d: on its own base it is\n%s\nwant\n%s", seed, alone, want)
		}
		now := rootfs.New(append(slices.Clone(base), other, one)...)
		if err := tree.Walk(one, ".", func(p string, n tree.Node) error {
			m, err := now.Lstat(p)
			if n.IsOpaque() {
				t.Errorf("seed %d: %s is opaque", seed, p)
			}
			if gone := errors.Is(err, fs.ErrNotExist); gone != n.IsWhiteout() || !gone && (m.Mode != n.Mode || m.UID != n.UID) {
				t.Errorf("seed %d: %s is %+v (%v), want %+v", seed, p, m, err, n)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		// What the other made is there unless this one has a file or whiteout at or above it.
		if err := tree.Walk(other, ".", func(p string, n tree.Node) error {
			if n.IsWhiteout() || n.IsDir() {
				return nil
			}
			for d := p; d != "."; d = path.Dir(d) {
				if m, err := one.Lstat(d); err == nil && (d == p || !m.IsDir()) {
					return nil
				}
			}
			if _, err := now.Lstat(p); err != nil {
				t.Errorf("seed %d: %s of the other is lost", seed, p)
			}
			moved++
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	if moved == 0 {
		t.Error("nothing was tested")
	}
}

// TestSquashHardLinks: links of a file stay links, and those of different layers are not mixed up.
func TestSquashHardLinks(t *testing.T) {
	low := memtree.New(map[string]memtree.File{"a": {Data: "low"}, "b": {HardLink: "a"}, "c": {HardLink: "a"}})
	top := memtree.New(map[string]memtree.File{"b": {Data: "top"}, "d": {HardLink: "b"}})
	one := layerOf(t, &squasher{below: rootfs.New(), layers: []tree.Tree{top, low}})
	inode := map[string]uint64{}
	for _, name := range []string{"a", "b", "c", "d"} {
		n, err := one.Lstat(name)
		if err != nil || n.Nlink != 2 {
			t.Errorf("%s: %+v %v", name, n, err)
		}
		inode[name] = n.Inode
	}
	if inode["a"] != inode["c"] || inode["b"] != inode["d"] || inode["a"] == inode["b"] {
		t.Errorf("inodes %v", inode)
	}
}
