package archive

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/tree"
)

func mkTar(t testing.TB, hs ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range hs {
		body := ""
		if h.Typeflag == 0 || h.Typeflag == tar.TypeReg {
			h.Typeflag, body = tar.TypeReg, "content of "+h.Name
			h.Size = int64(len(body))
		}
		if h.Mode == 0 && h.Typeflag != tar.TypeXGlobalHeader {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func open(t testing.TB, b []byte, lim layer.Limits) (*Tree, error) {
	t.Helper()
	dir := t.TempDir()
	a, err := Read(context.Background(), bytes.NewReader(b), dir, lim)
	if es, _ := os.ReadDir(dir); len(es) != 0 {
		t.Errorf("%s was left behind", es[0].Name())
	}
	if err == nil {
		t.Cleanup(func() { a.Close() })
	}
	return a, err
}

func list(t testing.TB, a tree.Tree) (paths []string) {
	t.Helper()
	if err := tree.Walk(a, ".", func(p string, n tree.Node) error {
		for k := range n.Xattr {
			if strings.HasPrefix(k, "trusted.") {
				t.Errorf("%s has %s", p, k)
			}
		}
		paths = append(paths, p)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return paths
}

func read(a tree.Tree, p string) (string, error) {
	r, err := a.Open(p)
	if err != nil {
		return "", err
	}
	b, err := io.ReadAll(r)
	return string(b), errors.Join(err, r.Close())
}

func TestContent(t *testing.T) {
	when := time.Unix(1234567890, 0)
	a, err := open(t, mkTar(t,
		tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "0123"}},
		tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o700, Uid: 5},
		tar.Header{Name: "./Dockerfile", Uid: 1000, Gid: 1001, ModTime: when},
		tar.Header{Name: "dir/implied/file", Mode: 0o4755},
		tar.Header{Name: ".wh.file"}, tar.Header{Name: ".wh..wh..opq"}, tar.Header{Name: ".wh..wh.aufs"}, tar.Header{Name: "dir/.wh.x/.wh.y"},
		tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"},
		tar.Header{Name: "hard", Typeflag: tar.TypeLink, Linkname: "Dockerfile", Uid: 1000, Gid: 1001, ModTime: when},
		tar.Header{Name: "hard2", Typeflag: tar.TypeLink, Linkname: ".wh.file"},
		tar.Header{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3},
		tar.Header{Name: "gone", Typeflag: tar.TypeChar},
		tar.Header{Name: "fifo", Typeflag: tar.TypeFifo},
	), layer.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		".", ".wh..wh..opq", ".wh..wh.aufs", ".wh.file", "Dockerfile", "dir", "dir/.wh.x", "dir/.wh.x/.wh.y", "dir/implied",
		"dir/implied/file", "fifo", "hard", "hard2", "link", "null",
	}
	if got := list(t, a); !slices.Equal(got, want) {
		t.Errorf("paths are\n%q, want\n%q", got, want)
	}
	if s, err := read(a, "dir/.wh.x/.wh.y"); s != "content of dir/.wh.x/.wh.y" || err != nil {
		t.Errorf("got %q, %v", s, err)
	}
	if n, err := a.Lstat("Dockerfile"); err != nil || n.UID != 1000 || n.GID != 1001 || !n.MTime.Equal(when) || n.Nlink != 2 {
		t.Errorf("Dockerfile is %+v, %v", n, err)
	}
	if n, err := a.Lstat("dir/implied/file"); err != nil || n.Mode != tree.ModeRegular|0o4755 {
		t.Errorf("file is %+v, %v", n, err)
	}
	if n, err := a.Lstat("dir/implied"); err != nil || n.Mode != tree.ModeDir|0o755 || n.Xattr != nil {
		t.Errorf("implied directory is %+v, %v", n, err)
	}
	if n, err := a.Lstat("."); err != nil || n.Mode != tree.ModeDir|0o755 || n.UID != 0 {
		t.Errorf("root is %+v, %v", n, err)
	}
	if s, err := a.Readlink("link"); s != "/etc/passwd" || err != nil {
		t.Errorf("link leads to %q, %v", s, err)
	}
	if _, err := a.Lstat("gone"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("device 0:0 is there: %v", err)
	}
}

func TestCompressions(t *testing.T) {
	plain := mkTar(t, tar.Header{Name: "Dockerfile"}, tar.Header{Name: "other"})
	var gzb bytes.Buffer
	// Two members, as parallel gzip programs write.
	for _, part := range [][]byte{plain[:700], plain[700:]} {
		w := gzip.NewWriter(&gzb)
		_, _ = w.Write(part)
		w.Close()
	}
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	zst := enc.EncodeAll(plain, nil)
	streams := map[string][]byte{
		"none": plain, "gzip": gzb.Bytes(), "zstd": zst,
		"zstd after a skippable frame": append([]byte{0x53, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 1, 2}, zst...),
	}
	for name, args := range map[string][]string{"bzip2": {"bzip2", "-c"}, "xz": {"xz", "-c"}, "xz -9": {"xz", "-9c"}, "xz without check": {"xz", "-c", "--check=none"}} {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Stdin = bytes.NewReader(plain)
		out, err := cmd.Output()
		if err != nil {
			t.Logf("no %s here: %v", name, err)
			continue
		}
		streams[name] = out
	}
	for name, b := range streams {
		t.Run(name, func(t *testing.T) {
			if !Detect(b[:min(len(b), HeaderSize)]) {
				t.Error("not detected as an archive")
			}
			a, err := open(t, b, layer.Limits{})
			if err != nil {
				t.Fatal(err)
			}
			if got := list(t, a); !slices.Equal(got, []string{".", "Dockerfile", "other"}) {
				t.Errorf("got %q", got)
			}
			for _, cut := range []int{len(b) / 3, len(b) * 2 / 3} {
				if name == "none" {
					cut = 515 // within a file's content
				}
				if _, err := open(t, b[:cut], layer.Limits{}); err == nil {
					t.Errorf("an archive that ends after %d bytes of %d was taken", cut, len(b))
				}
			}
		})
	}
}

func TestDetect(t *testing.T) {
	pax := mkTar(t, tar.Header{Name: strings.Repeat("long/", 100) + "name", Format: tar.FormatPAX})
	gnu := mkTar(t, tar.Header{Name: strings.Repeat("long/", 400) + "name", Format: tar.FormatGNU})
	for _, tc := range []struct {
		name string
		head []byte
		want bool
	}{
		{"pax name first", pax, true},
		{"gnu name beyond the header", gnu, true},
		{"empty tar", mkTar(t), true},
		{"dockerfile", []byte("FROM scratch\nCOPY a /\n"), false},
		{"long dockerfile", []byte("FROM scratch\n" + strings.Repeat("# a comment\n", 100)), false},
		{"syntax line", []byte("# syntax=docker/dockerfile:1\nFROM scratch\n"), false},
		{"byte order mark", []byte("\ufeffFROM scratch\n"), false},
		{"nothing", nil, false},
		{"BZ but no bzip2", []byte("BZ"), false},
		{"few zeros", make([]byte, 100), false},
		{"text of a block and more", bytes.Repeat([]byte("x"), 1024), false},
	} {
		if got := Detect(tc.head[:min(len(tc.head), HeaderSize)]); got != tc.want {
			t.Errorf("%s: %v", tc.name, got)
		}
	}
}

func TestNamesStayInside(t *testing.T) {
	a, err := open(t, mkTar(t,
		tar.Header{Name: "../../up"}, tar.Header{Name: "/abs"}, tar.Header{Name: "a/../../b"},
		tar.Header{Name: "out", Typeflag: tar.TypeSymlink, Linkname: "/"},
		tar.Header{Name: "out/through"},
	), layer.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := list(t, a), []string{".", "abs", "b", "out", "through", "up"}; !slices.Equal(got, want) {
		t.Errorf("paths are %q, want %q", got, want)
	}
}

func TestLimits(t *testing.T) {
	var many []tar.Header
	for i := range 200 {
		many = append(many, tar.Header{Name: fmt.Sprint(i)})
	}
	var le *layer.LimitError
	if _, err := open(t, mkTar(t, many...), layer.Limits{MaxEntries: 100}); !errors.As(err, &le) {
		t.Errorf("too many entries: %v", err)
	}
	var bomb bytes.Buffer
	w := gzip.NewWriter(&bomb)
	tw := tar.NewWriter(w)
	_ = tw.WriteHeader(&tar.Header{Name: "zeros", Typeflag: tar.TypeReg, Size: 1 << 30})
	for range 64 {
		_, _ = tw.Write(make([]byte, 1<<20))
	}
	w.Close()
	if _, err := open(t, bomb.Bytes(), layer.Limits{MaxBytes: 1 << 20}); !errors.As(err, &le) {
		t.Errorf("gzip bomb: %v", err)
	}
}

func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	pr, pw := io.Pipe()
	go func() {
		tw := tar.NewWriter(pw)
		_ = tw.WriteHeader(&tar.Header{Name: "f", Typeflag: tar.TypeReg, Size: 1 << 36})
		cancel()
		for {
			if _, err := tw.Write(make([]byte, 1<<16)); err != nil {
				return
			}
		}
	}()
	_, err := Read(ctx, pr, t.TempDir(), layer.Limits{})
	pr.Close()
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
