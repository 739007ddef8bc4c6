package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/tree"
)

// ent is one entry of a tar under test.
type ent struct {
	tar.Header
	body string
}

func reg(name, body string) ent {
	return ent{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, body}
}

func dir(name string, mode int64) ent {
	return ent{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode}, ""}
}

func symlink(name, target string) ent {
	return ent{tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, ""}
}

func hardlink(name, target string) ent {
	return ent{tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}, ""}
}

func dev(name string, typ byte, major, minor int64) ent {
	return ent{tar.Header{Typeflag: typ, Name: name, Devmajor: major, Devminor: minor, Mode: 0o600}, ""}
}

func (e ent) with(fn func(*ent)) ent { fn(&e); return e }

func mktar(t testing.TB, es ...ent) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range es {
		h := e.Header
		h.Size = int64(len(e.body))
		if h.ModTime.IsZero() && h.Typeflag != tar.TypeXGlobalHeader {
			h.ModTime = time.Unix(1700000000, 0)
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// convert makes a layer file of a tar and checks what Convert says of it.
func convert(t testing.TB, b []byte) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "layer")
	info, err := convertTo(p, bytes.NewReader(b), Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if want := digest.FromBytes(b); info.DiffID != want || info.TarSize != int64(len(b)) {
		t.Fatalf("info %+v, want %v, %d bytes", info, want, len(b))
	}
	return p
}

func convertTo(p string, r io.Reader, lim Limits) (Info, error) {
	f, err := os.Create(p)
	if err != nil {
		return Info{}, err
	}
	defer f.Close()
	return Convert(context.Background(), r, f, lim)
}

func open(t testing.TB, p string) *Reader {
	t.Helper()
	r, err := Open(p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// dump writes a tree as one line a path, hard links by the first name's number.
func dump(t testing.TB, tr tree.Tree) []string {
	t.Helper()
	var out []string
	first := map[uint64]string{}
	err := tree.Walk(tr, ".", func(p string, n tree.Node) error {
		l, err := tr.Lstat(p)
		if err != nil {
			return err
		}
		if fmt.Sprint(l) != fmt.Sprint(n) {
			t.Errorf("%q: Lstat says %v, ReadDir %v", p, l, n)
		}
		s := fmt.Sprintf("%s %#o %d:%d %d.%09d", p, n.Mode, n.UID, n.GID, n.MTime.Unix(), n.MTime.Nanosecond())
		switch n.Mode & tree.ModeType {
		case tree.ModeRegular:
			f, err := tr.Open(p)
			if err != nil {
				return err
			}
			defer f.Close()
			b, err := io.ReadAll(f)
			if err != nil {
				return err
			}
			if int64(len(b)) != n.Size {
				t.Errorf("%q has %d bytes, and its size is %d", p, len(b), n.Size)
			}
			s += fmt.Sprintf(" %d %x", n.Size, sha256.Sum256(b))
		case tree.ModeSymlink:
			target, err := tr.Readlink(p)
			if err != nil {
				return err
			}
			s += " -> " + target
		case tree.ModeChar, tree.ModeBlock:
			s += fmt.Sprintf(" %d,%d", n.Major, n.Minor)
		}
		if n.Nlink > 1 {
			if first[n.Inode] == "" {
				first[n.Inode] = p
			}
			s += fmt.Sprintf(" %d=%s", n.Nlink, first[n.Inode])
		}
		for _, k := range slices.Sorted(maps.Keys(n.Xattr)) {
			s += fmt.Sprintf(" %s=%q", k, n.Xattr[k])
		}
		out = append(out, s)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// brief leaves of dump's lines what most tests are about.
func brief(t testing.TB, tr tree.Tree) string {
	t.Helper()
	var out []string
	first := map[uint64]string{}
	err := tree.Walk(tr, ".", func(p string, n tree.Node) error {
		s := p
		switch {
		case n.IsWhiteout():
			s += " whiteout"
		case n.IsDir():
			s += fmt.Sprintf("/ %o", n.Mode&tree.ModePerm)
		case n.IsSymlink():
			target, err := tr.Readlink(p)
			if err != nil {
				return err
			}
			s += " -> " + target
		case n.IsRegular():
			f, err := tr.Open(p)
			if err != nil {
				return err
			}
			b, err := io.ReadAll(f)
			if err != nil {
				return err
			}
			s += fmt.Sprintf(" %q", b)
		default:
			s += fmt.Sprintf(" %#o %d,%d", n.Mode, n.Major, n.Minor)
		}
		if n.Nlink > 1 {
			if first[n.Inode] == "" {
				first[n.Inode] = p
			}
			s += " =" + first[n.Inode]
		}
		for _, k := range slices.Sorted(maps.Keys(n.Xattr)) {
			s += fmt.Sprintf(" %s=%q", strings.TrimPrefix(k, xattrPrivate), n.Xattr[k])
		}
		out = append(out, s)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(out, "\n")
}

// memTree is a tree in memory, for canonical tars of anything.
type memTree struct {
	nodes map[string]*memNode
}

type memNode struct {
	tree.Node
	body, target string
}

func (m *memTree) tar(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	w := NewTarWriter(&b)
	kids := map[string][]string{}
	for p := range m.nodes {
		if p != "." {
			kids[filepath.Dir(p)] = append(kids[filepath.Dir(p)], filepath.Base(p))
		}
	}
	var walk func(p string)
	walk = func(p string) {
		n := m.nodes[p]
		err := w.Add(p, n.Node, n.target, func() (io.ReadCloser, error) {
			return io.NopCloser(strings.NewReader(n.body)), nil
		})
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(kids[p])
		for _, k := range kids[p] {
			walk(filepath.Join(p, k))
		}
	}
	walk(".")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func randomName(rnd *rand.Rand) string {
	for {
		var b []byte
		switch rnd.IntN(8) {
		case 0: // any bytes
			for range 1 + rnd.IntN(20) {
				b = append(b, byte(1+rnd.IntN(255)))
			}
		case 1: // long
			b = bytes.Repeat([]byte{byte('a' + rnd.IntN(26))}, 90+rnd.IntN(166))
		case 2:
			b = []byte([]string{"…ü", "a b", "=", "...", "-", ".a", "a.", " ", "PaxHeaders.0", "\n", "+", "!"}[rnd.IntN(12)])
		default:
			b = fmt.Appendf(nil, "f%d", rnd.IntN(1000))
		}
		if checkComponent(string(b)) == nil {
			return string(b)
		}
	}
}

// randomTree has about n paths of every kind, with files of up to maxBody bytes.
func randomTree(rnd *rand.Rand, n, maxBody int) *memTree {
	m := &memTree{nodes: map[string]*memNode{".": {Node: tree.Node{Mode: tree.ModeDir | 0o755, MTime: time.Unix(0, 0)}}}}
	if rnd.IntN(4) == 0 {
		m.nodes["."].Xattr = map[string]string{tree.XattrOpaque: "y"}
	}
	dirs := []string{"."}
	var files []*memNode
	for i := range n {
		p := filepath.Join(dirs[rnd.IntN(len(dirs))], randomName(rnd))
		if m.nodes[p] != nil || len(p) > maxPath {
			continue
		}
		x := &memNode{Node: tree.Node{Mode: rnd.Uint32() & 0o7777, Inode: uint64(i + 1), Nlink: 1}}
		x.UID, x.GID = uint32(rnd.IntN(3)), rnd.Uint32()>>rnd.IntN(32)
		x.MTime = time.Unix(rnd.Int64N(4e9)-2e9, []int64{0, 1, 999999999, 120000000}[rnd.IntN(4)])
		if rnd.IntN(20) == 0 {
			x.MTime = time.Unix([]int64{1 << 33, 1<<33 - 1, 253402300800, -62135596801, 1 << 50}[rnd.IntN(5)], 1)
		}
		for range max(0, rnd.IntN(6)-3) {
			if x.Xattr == nil {
				x.Xattr = map[string]string{}
			}
			k := []string{"user.a", "security.capability", "user.=", "user.a=b", "user.%3D", "system.posix_acl_access", "user.ü\xff\n"}[rnd.IntN(7)]
			x.Xattr[k] = []string{"", "\x00\x01\xff", "v", "a=b\n", strings.Repeat("x", rnd.IntN(5000))}[rnd.IntN(5)]
		}
		switch rnd.IntN(10) {
		case 0, 1:
			x.Mode |= tree.ModeDir
			if rnd.IntN(4) == 0 {
				x.Xattr = maps.Clone(x.Xattr)
				if x.Xattr == nil {
					x.Xattr = map[string]string{}
				}
				x.Xattr[tree.XattrOpaque] = "y"
			}
			dirs = append(dirs, p)
		case 2:
			x.Mode |= tree.ModeSymlink
			x.target = strings.Repeat(randomName(rnd), 1+rnd.IntN(15))
		case 3:
			x.Mode |= tree.ModeFIFO
		case 4:
			x.Mode |= []uint32{tree.ModeChar, tree.ModeBlock}[rnd.IntN(2)]
			x.Major, x.Minor = 1+rnd.Uint32N(maxMajor), rnd.Uint32N(maxMinor+1)
		case 5:
			x.Node = tree.Node{Mode: tree.ModeChar}
		case 6:
			if len(files) > 0 {
				x = files[rnd.IntN(len(files))]
				x.Nlink++
				break
			}
			fallthrough
		default:
			x.Mode |= tree.ModeRegular
			b := make([]byte, min(maxBody, []int{0, 1, 4095, 4096, 4097, 300000, 100}[rnd.IntN(7)]))
			if rnd.IntN(3) > 0 {
				for j := range b {
					b[j] = byte(rnd.Uint32())
				}
			}
			x.body = string(b)
			x.Size = int64(len(b))
			files = append(files, x)
		}
		m.nodes[p] = x
	}
	return m
}

// A layer file gives back the canonical tar that it was made from.
func TestCanonicalTarComesBack(t *testing.T) {
	for seed := range uint64(60) {
		rnd := rand.New(rand.NewPCG(seed, 7))
		b := randomTree(rnd, 1+rnd.IntN(300), 300_000).tar(t)
		r := open(t, convert(t, b))
		var got bytes.Buffer
		if err := r.WriteTar(context.Background(), &got); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if !bytes.Equal(got.Bytes(), b) {
			t.Fatalf("seed %d: another tar: %d bytes, want %d", seed, got.Len(), len(b))
		}
		dump(t, r)
	}
}
