package layer

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
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/kiln-build/kiln/internal/tree"
)

func sample(t testing.TB) *Reader {
	t.Helper()
	return open(t, convert(t, mktar(t,
		dir("d/", 0o755), reg("d/f", "content"), symlink("d/l", "f"), symlink("s", "d"), dir("e/", 0o755), dev("n", '3', 1, 3),
		reg("big", strings.Repeat("0123456789", 10_000)),
		hardlink("h", "d/f"), reg(".wh.w", ""), reg("d/\xff", "x"),
	)))
}

func TestReaderErrors(t *testing.T) {
	r := sample(t)
	for p, want := range map[string]error{
		"x": fs.ErrNotExist, "d/x": fs.ErrNotExist, "x/y/z": fs.ErrNotExist, "d/f/x": fs.ErrNotExist,
		"s/f": fs.ErrNotExist, "d/\x00": fs.ErrNotExist, "w/x": fs.ErrNotExist,
		"": fs.ErrInvalid, "/d": fs.ErrInvalid, "d/": fs.ErrInvalid, "d/../d": fs.ErrInvalid, "./d": fs.ErrInvalid, "..": fs.ErrInvalid,
	} {
		for range 2 { // the second time from the remembered directory
			_, err := r.Lstat(p)
			_, err2 := r.ReadDir(p)
			_, err3 := r.Readlink(p)
			_, err4 := r.Open(p)
			for _, err := range []error{err, err2, err3, err4} {
				if !errors.Is(err, want) {
					t.Errorf("%q: %v", p, err)
				}
			}
		}
	}
	if _, err := r.ReadDir("s"); !errors.Is(err, syscall.ENOTDIR) {
		t.Error(err)
	}
	if _, err := r.ReadDir("d/f"); !errors.Is(err, syscall.ENOTDIR) {
		t.Error(err)
	}
	for _, p := range []string{"d/f", "d", "n"} {
		if _, err := r.Readlink(p); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("%q: %v", p, err)
		}
	}
	for _, p := range []string{"s", "d", "n", "w"} {
		if _, err := r.Open(p); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("%q: %v", p, err)
		}
	}
	if n, err := r.Lstat("d/\xff"); err != nil || n.Size != 1 {
		t.Errorf("%+v, %v", n, err)
	}
}

func TestReaderFiles(t *testing.T) {
	r := sample(t)
	f, err := r.Open("big")
	if err != nil {
		t.Fatal(err)
	}
	ra := f.(io.ReaderAt)
	b := make([]byte, 10)
	if _, err := ra.ReadAt(b, 99_990); err != nil || string(b) != "0123456789" {
		t.Errorf("%q, %v", b, err)
	}
	if n, err := ra.ReadAt(b, 99_995); n != 5 || err != io.EOF {
		t.Errorf("%d, %v", n, err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	info := r.Info()
	if info.Entries != 10 {
		t.Errorf("%+v", info)
	}
}

func TestReaderIsConcurrent(t *testing.T) {
	rnd := rand.New(rand.NewPCG(9, 9))
	r := open(t, convert(t, randomTree(rnd, 200, 5000).tar(t)))
	want := strings.Join(dump(t, r), "\n")
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if got := strings.Join(dump(t, r), "\n"); got != want {
				t.Error("another tree")
			}
		})
	}
	wg.Wait()
}

// One directory of many blocks: every name is found, and no other.
func TestBigDirectory(t *testing.T) {
	var es []ent
	for i := range 20_000 {
		es = append(es, reg(fmt.Sprintf("d/file-%d%s", i*7, strings.Repeat("x", i%200)), ""))
	}
	r := open(t, convert(t, mktar(t, es...)))
	got, err := r.ReadDir("d")
	if err != nil || len(got) != len(es) {
		t.Fatalf("%d entries, %v", len(got), err)
	}
	have := map[string]bool{}
	for _, e := range es {
		have[e.Name] = true
	}
	for _, e := range es {
		for _, p := range []string{e.Name, e.Name + "a", e.Name + "x", e.Name[:len(e.Name)-1], "d/a", "d/z"} {
			if _, err := r.Lstat(p); have[p] && err != nil || !have[p] && !errors.Is(err, fs.ErrNotExist) {
				t.Fatalf("%q: %v", p, err)
			}
		}
	}
}

func TestReadXattrsAndDevices(t *testing.T) {
	p := convert(t, mktar(t,
		reg("a", "x").with(pax("SCHILY.xattr.security.capability", "\x01\x00")), hardlink("b", "a"),
		dir("d/", 0o755), reg("d/.wh..wh..opq", ""), reg("i/f", ""), dev("null", '3', 1, 3), dev("sda", '4', 8, 1), reg(".wh.w", ""),
	))
	r := open(t, p)
	b, err := os.ReadFile(p)
	if err != nil {
		t.Fatal(err)
	}
	xattrs, err := ReadXattrs(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	devices, err := ReadDevices(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	ino := func(p string) uint64 {
		n, err := r.Lstat(p)
		if err != nil {
			t.Fatal(err)
		}
		return n.Inode
	}
	if ino("a") != ino("b") {
		t.Error("a and b are two files")
	}
	wantX := map[uint64]map[string]string{
		ino("a"): {"security.capability": "\x01\x00"}, ino("d"): {tree.XattrOpaque: "y"}, ino("i"): {XattrImplied: "y"},
	}
	if !maps.EqualFunc(xattrs, wantX, maps.Equal) {
		t.Errorf("%v, want %v", xattrs, wantX)
	}
	if want := (map[uint64]Device{ino("null"): {1, 3}, ino("sda"): {8, 1}}); !maps.Equal(devices, want) {
		t.Errorf("%v, want %v", devices, want)
	}
}

func TestDeviceNumbers(t *testing.T) {
	for _, d := range []Device{{0, 0}, {0, 1}, {1, 0}, {4095, 1048575}, {259, 256}, {8, 255}} {
		if major, minor := decodeDev(encodeDev(d.Major, d.Minor)); major != d.Major || minor != d.Minor {
			t.Errorf("%v comes back as %d:%d", d, major, minor)
		}
	}
}

// A layer file of which anything but content was changed, or that was cut off, is not read.
func TestDamage(t *testing.T) {
	p := convert(t, mktar(t, reg("a", strings.Repeat("x", 5000)), dir("d/", 0o755).with(pax("SCHILY.xattr.user.a", "1")), symlink("d/s", "x")))
	good, err := os.ReadFile(p)
	if err != nil {
		t.Fatal(err)
	}
	ft, err := decodeFooter(good[len(good)-footerSize:], int64(len(good)))
	if err != nil {
		t.Fatal(err)
	}
	q := filepath.Join(t.TempDir(), "damaged")
	read := func(b []byte) error {
		if err := os.WriteFile(q, b, 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := Open(q)
		if err != nil {
			return err
		}
		defer r.Close()
		_, err = r.Lstat("a")
		return err
	}
	if err := read(good); err != nil {
		t.Fatal(err)
	}
	for i := range good {
		if i >= blockSize && int64(i) < ft.metaOff {
			continue
		}
		b := bytes.Clone(good)
		b[i] ^= 1
		err := read(b)
		if !errors.Is(err, ErrDamaged) {
			t.Fatalf("byte %d changed: %v", i, err)
		}
		if int64(i) >= ft.tableOff {
			if _, err := ReadXattrs(bytes.NewReader(b), int64(len(b))); !errors.Is(err, ErrDamaged) {
				t.Fatalf("byte %d changed: ReadXattrs says %v", i, err)
			}
		}
	}
	for n := 0; n < len(good); n += 1 + n/50 {
		if err := read(good[:n]); !errors.Is(err, ErrDamaged) {
			t.Fatalf("cut off at %d: %v", n, err)
		}
		if _, err := ReadXattrs(bytes.NewReader(good[:n]), int64(n)); !errors.Is(err, ErrDamaged) {
			t.Fatalf("cut off at %d: ReadXattrs says %v", n, err)
		}
	}
	if err := read(append(bytes.Clone(good), 0)); !errors.Is(err, ErrDamaged) {
		t.Errorf("one byte more: %v", err)
	}
	// The footer is there, and one block of metadata never reached the disk.
	b := bytes.Clone(good)
	clear(b[ft.inodeOff : ft.inodeOff+blockSize])
	if err := read(b); !errors.Is(err, ErrDamaged) {
		t.Errorf("torn: %v", err)
	}
	if _, err := Open(t.TempDir()); !errors.Is(err, ErrDamaged) {
		t.Errorf("a directory: %v", err)
	}
	if _, err := Open(q + "x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nothing: %v", err)
	}
	b = bytes.Clone(good)
	b[len(b)-footerSize+8] = 2
	sealFooter(b)
	if err := read(b); err == nil || errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "format version 2") {
		t.Errorf("another version: %v", err)
	}
}

func TestWriteTarCancelled(t *testing.T) {
	r := sample(t)
	ctx, cancel := context.WithCancelCause(context.Background())
	why := errors.New("because")
	cancel(why)
	if err := r.WriteTar(ctx, io.Discard); !errors.Is(err, why) {
		t.Error(err)
	}
	if err := r.WriteTar(context.Background(), &limitedWriter{left: 2000}); !errors.Is(err, errEnough) {
		t.Error(err)
	}
}

// Directories that a tar did not have do not come into being by a round trip.
func TestImpliedDirectoriesStayImplied(t *testing.T) {
	in := mktar(t, reg("a/b/c", "1"), reg("x/.wh..wh..opq", ""), reg("x/y", ""))
	r := open(t, convert(t, in))
	var out bytes.Buffer
	if err := r.WriteTar(context.Background(), &out); err != nil {
		t.Fatal(err)
	}
	again := open(t, convert(t, out.Bytes()))
	if a, b := brief(t, r), brief(t, again); a != b {
		t.Errorf("was\n%s\nis\n%s", a, b)
	}
	if strings.Contains(out.String(), "a/b/\x00") {
		t.Error("the tar has an entry for a/b")
	}
}

func TestTarWriterRefuses(t *testing.T) {
	file := tree.Node{Mode: tree.ModeRegular}
	for _, tt := range []struct {
		p      string
		n      tree.Node
		target string
		want   string
	}{
		{"d/.wh.x", file, "", "reserve for deletions"},
		{".wh..wh..opq", file, "", "reserve for deletions"},
		{"d/.wh.x/y", file, "", "reserve for deletions"},
		{"../x", file, "", "not possible"},
		{"/x", file, "", "not possible"},
		{"a\x00b", file, "", "no file name"},
		{strings.Repeat("n", 256), file, "", "longer than 255"},
		{strings.Repeat("n/", 2050) + "n", file, "", "not possible"},
		{"s", tree.Node{Mode: tree.ModeSymlink}, "", "target of 0 bytes"},
		{"n", tree.Node{Mode: tree.ModeChar, Major: 5000}, "", "out of range"},
		{"t", tree.Node{Mode: 0o644}, "", "unknown file type"},
		{"x", tree.Node{Mode: tree.ModeDir, Xattr: map[string]string{"user.\x00": ""}}, "", "not possible"},
	} {
		w := NewTarWriter(io.Discard)
		err := w.Add(tt.p, tt.n, tt.target, func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("")), nil })
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%.40q: error %v, want %q", tt.p, err, tt.want)
		}
	}
	w := NewTarWriter(io.Discard)
	short := func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("abc")), nil }
	if err := w.Add("f", tree.Node{Mode: tree.ModeRegular, Size: 5}, "", short); err == nil || !strings.Contains(err.Error(), "3 of 5 bytes") {
		t.Errorf("a file that shrank: %v", err)
	}
	if err := w.Add("sock", tree.Node{Mode: tree.ModeSocket}, "", nil); err != nil {
		t.Errorf("a socket: %v", err)
	}
}
