package layer

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/tree"
)

// everything is a tree with one of each thing that the canonical tar has a rule for.
func everything() *memTree {
	at := func(sec, nsec int64) time.Time { return time.Unix(sec, nsec) }
	n := map[string]*memNode{
		".":        {Node: tree.Node{Mode: tree.ModeDir | 0o755, Xattr: map[string]string{tree.XattrOpaque: "y"}}},
		"dir":      {Node: tree.Node{Mode: tree.ModeDir | 0o1777, MTime: at(1700000000, 0), Xattr: map[string]string{tree.XattrOpaque: "y", "user.a": "1"}}},
		"dir/file": {Node: tree.Node{Mode: tree.ModeRegular | 0o4755, UID: 1000, GID: 1 << 31, Size: 5, MTime: at(1700000000, 120000000), Inode: 9, Nlink: 2}, body: "hello"},
		"dir.link": {},
		"dir/gone": {Node: tree.Node{Mode: tree.ModeChar}},
		"null":     {Node: tree.Node{Mode: tree.ModeChar | 0o666, Major: 1, Minor: 3}},
		"disk":     {Node: tree.Node{Mode: tree.ModeBlock | 0o660, Major: 259, Minor: 70000, MTime: at(-1, 500000000)}},
		"fifo":     {Node: tree.Node{Mode: tree.ModeFIFO | 0o600, MTime: at(1<<34, 0)}},
		"link":     {Node: tree.Node{Mode: tree.ModeSymlink | 0o777}, target: "dir/" + strings.Repeat("t", 120)},
		"\xff\n":   {Node: tree.Node{Mode: tree.ModeRegular | 0o644}},
		"ümlaut":   {Node: tree.Node{Mode: tree.ModeRegular | 0o644, Xattr: map[string]string{"user.a=b": "\x00=", "security.capability": "\x01\x00"}}},

		strings.Repeat("n", 120): {Node: tree.Node{Mode: tree.ModeDir | 0o700}},

		strings.Repeat("n", 120) + "/" + strings.Repeat("f", 99):  {Node: tree.Node{Mode: tree.ModeRegular}},
		strings.Repeat("n", 120) + "/" + strings.Repeat("f", 101): {Node: tree.Node{Mode: tree.ModeRegular}},
	}
	n["dir.link"] = n["dir/file"]
	return &memTree{nodes: n}
}

// The bytes of the canonical tar and of the layer file are a promise: diff IDs
// and caches of older versions hang on them. If this fails, the library below
// or the format has changed; see docs/design/layer-format.md.
func TestFormatsGolden(t *testing.T) {
	b := everything().tar(t)
	const wantTar, wantFile = "40c857ded34571b2", "c329349f7c3ce3e1"
	if got := digestOf(b); got != wantTar {
		t.Errorf("the canonical tar has the digest %s, want %s", got, wantTar)
	}
	p := convert(t, b)
	file, err := os.ReadFile(p)
	if err != nil {
		t.Fatal(err)
	}
	if got := digestOf(file); got != wantFile {
		t.Errorf("the layer file has the digest %s, want %s", got, wantFile)
	}
	// Over a file that has something else in it.
	q := filepath.Join(t.TempDir(), "used")
	if err := os.WriteFile(q, bytes.Repeat([]byte("x"), 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(q, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := Convert(t.Context(), bytes.NewReader(b), f, Limits{}); err != nil {
		t.Fatal(err)
	}
	if again, err := os.ReadFile(q); err != nil || !bytes.Equal(again, file) {
		t.Errorf("another file the second time: %v", err)
	}
}

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:8])
}
