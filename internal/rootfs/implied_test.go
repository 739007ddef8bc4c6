package rootfs_test

import (
	"testing"

	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/tree"
	"github.com/kiln-build/kiln/internal/tree/memtree"
)

// TestImpliedDirectories: a layer whose tar has no entry for a directory says nothing about it.
func TestImpliedDirectories(t *testing.T) {
	imp := memtree.File{Mode: tree.ModeDir | 0o755, Xattr: map[string]string{layer.XattrImplied: "y"}}
	both := memtree.File{Mode: tree.ModeDir | 0o755, Xattr: map[string]string{layer.XattrImplied: "y", tree.XattrOpaque: "y"}}
	low := memtree.File{Mode: tree.ModeDir | 0o711, UID: 7, Xattr: map[string]string{"user.a": "b"}}
	for _, c := range []struct {
		name   string
		layers []map[string]memtree.File // the bottom first
		mode   uint32
		uid    uint32
		xattrs int
		kids   int
	}{
		{"only implied", []map[string]memtree.File{{"d/": imp, "d/a": {}}}, 0o755, 0, 0, 1},
		{"below is an entry", []map[string]memtree.File{{"d/": low, "d/a": {}}, {"d/": imp, "d/b": {}}}, 0o711, 7, 1, 2},
		{"twice implied", []map[string]memtree.File{{"d/": low}, {"d/": imp, "d/a": {}}, {"d/": imp, "d/b": {}}}, 0o711, 7, 1, 2},
		{"an entry on top", []map[string]memtree.File{{"d/": imp}, {"d/": {Mode: tree.ModeDir | 0o700}}}, 0o700, 0, 0, 0},
		{"an entry between", []map[string]memtree.File{{"d/": low}, {"d/": {Mode: tree.ModeDir | 0o700}}, {"d/": imp}}, 0o700, 0, 0, 0},
		{"opaque", []map[string]memtree.File{{"d/": low, "d/a": {}}, {"d/": both, "d/b": {}}}, 0o711, 7, 1, 1},
		{"opaque below", []map[string]memtree.File{{"d/": low, "d/a": {}}, {"d/": memtree.Opaque(), "d/c": {}}, {"d/": imp, "d/b": {}}}, 0o755, 0, 0, 2},
		{"a file below", []map[string]memtree.File{{"d": {UID: 7}}, {"d/": imp, "d/b": {}}}, 0o755, 0, 0, 1},
		{"a whiteout between", []map[string]memtree.File{{"d/": low, "d/a": {}}, {"d": memtree.Whiteout()}, {"d/": imp, "d/b": {}}}, 0o755, 0, 0, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			var ls []tree.Tree
			for _, l := range c.layers {
				ls = append(ls, memtree.New(l))
			}
			f := rootfs.New(ls...)
			n, err := f.Lstat("d")
			if err != nil {
				t.Fatal(err)
			}
			es, err := f.ReadDir(".")
			if err != nil || len(es) != 1 {
				t.Fatal(es, err)
			}
			for _, n := range []tree.Node{n, es[0].Node} {
				if n.Mode != tree.ModeDir|c.mode || n.UID != c.uid || len(n.Xattr) != c.xattrs {
					t.Errorf("mode %o uid %d attributes %v, want %o %d and %d", n.Mode, n.UID, n.Xattr, c.mode, c.uid, c.xattrs)
				}
			}
			if es, err = f.ReadDir("d"); err != nil || len(es) != c.kids {
				t.Errorf("entries: %v %v, want %d", es, err, c.kids)
			}
		})
	}
}
