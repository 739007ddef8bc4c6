package rootfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/internal/tree"
	"github.com/kiln-build/kiln/internal/tree/memtree"
	"golang.org/x/sys/unix"
)

func TestMerge(t *testing.T) {
	lower := memtree.New(map[string]memtree.File{
		"etc/passwd": {Data: "lower", UID: 1},
		"etc/group":  {Data: "g"},
		"bin/sh":     {Data: "sh"},
		"bin/bash":   {HardLink: "bin/sh"},
		"old/x":      {Data: "x"},
		"gone/y":     {Data: "y"},
		"dir/file":   {Data: "hidden by a file"},
		"link":       memtree.Symlink("etc"),
		"made":       {Data: "hidden by a directory"},
	})
	upper := memtree.New(map[string]memtree.File{
		"etc":        {Mode: tree.ModeDir | 0o700, UID: 7},
		"etc/passwd": {Data: "upper"},
		"etc/group":  memtree.Whiteout(),
		"old":        memtree.Opaque(),
		"old/z":      {Data: "z"},
		"gone":       memtree.Whiteout(),
		"dir":        {Data: "file"},
		"made/a":     {Data: "a"},
		"new":        {Data: "n", Xattr: map[string]string{"user.k": "v", "trusted.overlay.x": "y"}},
		"new2":       {HardLink: "new"},
	})
	f := New(lower, upper)
	got := list(t, f)
	want := []string{
		"040755 .", "040755 bin", "0100644 bin/bash sh", "0100644 bin/sh sh", "0100644 dir file", "040700 etc",
		"0100644 etc/passwd upper", "0120777 link -> etc", "040755 made", "0100644 made/a a", "0100644 new n", "0100644 new2 n",
		"040755 old", "0100644 old/z z",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if n, _ := f.Lstat("old"); n.IsOpaque() {
		t.Error("the mark of an opaque directory shows")
	}
	if n, _ := f.Lstat("new"); len(n.Xattr) != 1 || n.Xattr["user.k"] != "v" {
		t.Errorf("attributes are %v", n.Xattr)
	}
	sh, _ := f.Lstat("bin/sh")
	bash, _ := f.Lstat("bin/bash")
	made, _ := f.Lstat("new")
	if sh.Inode != bash.Inode || sh.Inode == made.Inode || sh.Inode == 0 {
		t.Errorf("inodes: sh %d, bash %d, new %d", sh.Inode, bash.Inode, made.Inode)
	}
	for _, p := range []string{"gone", "gone/y", "old/x", "etc/group", "dir/file", "made/b", "link/passwd", "nothing/at/all"} {
		if _, err := f.Lstat(p); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Lstat(%q): %v", p, err)
		}
	}
}

func TestNoLayers(t *testing.T) {
	f := New()
	n, err := f.Lstat(".")
	if err != nil || n.Mode != tree.ModeDir|0o755 || n.UID != 0 {
		t.Errorf("got %+v, %v", n, err)
	}
	if es, err := f.ReadDir("."); err != nil || len(es) != 0 {
		t.Errorf("got %v, %v", es, err)
	}
	if _, err := f.Lstat("x"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// counting counts what is asked of a tree.
type counting struct {
	tree.Tree
	lstats, readdirs int
}

func (c *counting) Lstat(p string) (tree.Node, error) { c.lstats++; return c.Tree.Lstat(p) }

func (c *counting) ReadDir(p string) ([]tree.Entry, error) { c.readdirs++; return c.Tree.ReadDir(p) }

// TestLstatListsNothing, and a second look-up in a directory costs one question
// to each layer that has the directory.
func TestLstatListsNothing(t *testing.T) {
	a := &counting{Tree: memtree.New(map[string]memtree.File{"a/b/c/d": {}, "a/b/c/e": {}})}
	b := &counting{Tree: memtree.New(map[string]memtree.File{"a/b/x": {}})}
	f := New(a, b)
	if _, err := f.Lstat("a/b/c/d"); err != nil {
		t.Fatal(err)
	}
	a.lstats, b.lstats = 0, 0
	if _, err := f.Lstat("a/b/c/e"); err != nil {
		t.Fatal(err)
	}
	if a.lstats != 1 || b.lstats != 0 || a.readdirs+b.readdirs != 0 {
		t.Errorf("asked %d and %d times, listed %d", a.lstats, b.lstats, a.readdirs+b.readdirs)
	}
}

// TestMergeAsOverlayfs compares with the kernel.
func TestMergeAsOverlayfs(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	old := unix.Umask(0)
	defer unix.Umask(old)
	for seed := range uint64(100) {
		r := rand.New(rand.NewPCG(seed, 3))
		dir := t.TempDir()
		var layers []tree.Tree
		var lower []string
		for i := range 2 + r.IntN(3) {
			l := randomLayer(r)
			layers = append(layers, l)
			d := filepath.Join(dir, fmt.Sprint("layer", i))
			if err := materialize(l, d); err != nil {
				t.Fatal(err)
			}
			lower = append([]string{d}, lower...)
		}
		m := filepath.Join(dir, "merged")
		if err := os.Mkdir(m, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("overlay", m, "overlay", 0, "lowerdir="+strings.Join(lower, ":")); err != nil {
			t.Skipf("cannot mount overlayfs: %v", err)
		}
		want, err := listReal(m)
		if uerr := unix.Unmount(m, 0); uerr != nil {
			t.Fatal(uerr)
		}
		if err != nil {
			t.Fatal(err)
		}
		if got := list(t, New(layers...)); !slices.Equal(got, want) {
			t.Fatalf("seed %d: got\n%s\nwant\n%s", seed, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

func randomLayer(r *rand.Rand) *memtree.Tree {
	names := []string{"a", "b", "c"}
	files := map[string]memtree.File{}
	dirs := []string{"."}
	for range r.IntN(12) {
		p := path.Join(dirs[r.IntN(len(dirs))], names[r.IntN(3)])
		if _, ok := files[p]; ok {
			continue
		}
		switch r.IntN(8) {
		case 0, 1, 2:
			files[p] = memtree.Dir([]uint32{0o755, 0o700, 0o711}[r.IntN(3)])
			dirs = append(dirs, p)
		case 3:
			files[p] = memtree.Opaque()
			dirs = append(dirs, p)
		case 4:
			files[p] = memtree.Whiteout()
		case 5:
			files[p] = memtree.Symlink(names[r.IntN(3)])
		default:
			files[p] = memtree.File{Data: fmt.Sprint(r.IntN(100))}
		}
	}
	return memtree.New(files)
}

// list describes all of a tree, as listReal does.
func list(t *testing.T, f tree.Tree) []string {
	var out []string
	err := tree.Walk(f, ".", func(p string, n tree.Node) error {
		again, err := f.Lstat(p)
		if err != nil || again.Mode != n.Mode || again.Inode != n.Inode {
			t.Errorf("%s: ReadDir says %+v, Lstat %+v, %v", p, n, again, err)
		}
		s := fmt.Sprintf("%#o %s", n.Mode, p)
		switch {
		case n.IsRegular():
			r, err := f.Open(p)
			if err != nil {
				return err
			}
			defer r.Close()
			b, _ := io.ReadAll(r)
			s += " " + string(b)
		case n.IsSymlink():
			l, err := f.Readlink(p)
			if err != nil {
				return err
			}
			s += " -> " + l
		}
		out = append(out, s)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	return out
}

func listReal(dir string) ([]string, error) {
	var out []string
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err == unix.ENOENT {
			// overlayfs lists whiteouts of a directory that one layer alone
			// has, and then does not find them.
			return nil
		} else if err != nil {
			return err
		}
		s := fmt.Sprintf("%#o %s", st.Mode, rel)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			s += " " + string(b)
		case unix.S_IFLNK:
			l, _ := os.Readlink(p)
			s += " -> " + l
		}
		out = append(out, s)
		return nil
	})
	return out, err
}

// materialize writes a raw layer to a real directory.
func materialize(t tree.Tree, dir string) error {
	return tree.Walk(t, ".", func(p string, n tree.Node) error {
		to := filepath.Join(dir, p)
		switch {
		case n.IsDir():
			if err := os.Mkdir(to, os.FileMode(n.Mode&0o777)); err != nil {
				return err
			}
		case n.IsSymlink():
			l, _ := t.Readlink(p)
			return os.Symlink(l, to)
		case n.IsRegular():
			r, err := t.Open(p)
			if err != nil {
				return err
			}
			b, _ := io.ReadAll(r)
			return os.WriteFile(to, b, os.FileMode(n.Mode&0o777))
		default:
			return unix.Mknod(to, n.Mode, int(unix.Mkdev(n.Major, n.Minor)))
		}
		for _, k := range slices.Sorted(maps.Keys(n.Xattr)) {
			if err := unix.Lsetxattr(to, k, []byte(n.Xattr[k]), 0); err != nil {
				return err
			}
		}
		return nil
	})
}

// TestMemtree: the tree that other packages test with keeps to the contract.
func TestMemtree(t *testing.T) {
	m := memtree.New(map[string]memtree.File{"a/b": {Data: "x"}, "a.b": {}, "a/": {}, "l": memtree.Symlink("a")})
	if got, want := list(t, m), []string{"040755 .", "040755 a", "0100644 a/b x", "0100644 a.b ", "0120777 l -> a"}; !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
	for _, p := range []string{"/a", "a/", "", "../a", "a//b"} {
		if _, err := m.Lstat(p); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("Lstat(%q): %v", p, err)
		}
	}
	if _, err := m.Lstat("l/b"); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a link was followed")
	}
}
