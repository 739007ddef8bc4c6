package inline

import (
	"errors"
	"io"
	"io/fs"
	"slices"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/tree"
)

func TestTree(t *testing.T) {
	when := time.Unix(5, 0)
	in := Tree{"a/b/c": {Content: []byte("C"), Mode: 0o600, MTime: when}, "a/d": {}, "a.txt": {}, "z": {}}
	var got []string
	if err := tree.Walk(in, ".", func(p string, n tree.Node) error {
		got = append(got, p)
		if again, err := in.Lstat(p); err != nil || again.Mode != n.Mode || again.Size != n.Size {
			t.Errorf("Lstat(%s) = %+v, %v; ReadDir said %+v", p, again, err, n)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if want := []string{".", "a", "a/b", "a/b/c", "a/d", "a.txt", "z"}; !slices.Equal(got, want) {
		t.Errorf("paths are %q, want %q", got, want)
	}
	if n, err := in.Lstat("a/b/c"); err != nil || n.Mode != tree.ModeRegular|0o600 || n.Size != 1 || !n.MTime.Equal(when) {
		t.Errorf("%+v, %v", n, err)
	}
	r, err := in.Open("a/b/c")
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); string(b) != "C" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	for _, p := range []string{"b", "a/x", "z/x", "a/b/c/d"} {
		_, err1 := in.Lstat(p)
		_, err2 := in.ReadDir(p)
		_, err3 := in.Open(p)
		_, err4 := in.Readlink(p)
		for _, err := range []error{err1, err2, err3, err4} {
			if !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s: %v", p, err)
			}
		}
	}
	if _, err := in.Open("a"); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Open of a directory: %v", err)
	}
	if _, err := in.ReadDir("z"); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("ReadDir of a file: %v", err)
	}
	if es, err := (Tree{}).ReadDir("."); len(es) != 0 || err != nil {
		t.Errorf("empty tree: %v, %v", es, err)
	}
}
