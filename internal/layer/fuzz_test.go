package layer

import (
	"bytes"
	"context"
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/internal/tree"
)

var errEnough = errors.New("enough")

// visitAll reads everything that a tree has to tell, up to a bound.
func visitAll(t *testing.T, r *Reader, f func(p string, n tree.Node)) error {
	left := 5000
	return tree.Walk(r, ".", func(p string, n tree.Node) error {
		if left--; left < 0 {
			return errEnough
		}
		if f != nil {
			f(p, n)
		}
		if _, err := r.Lstat(p); err != nil && !errors.Is(err, ErrDamaged) {
			return err
		}
		switch {
		case n.IsSymlink():
			_, err := r.Readlink(p)
			return err
		case n.IsRegular():
			f, err := r.Open(p)
			if err != nil {
				return err
			}
			_, err = io.Copy(io.Discard, io.LimitReader(f, 1<<20))
			return err
		}
		return nil
	})
}

func FuzzConvert(f *testing.F) {
	rnd := rand.New(rand.NewPCG(2, 2))
	f.Add(randomTree(rnd, 8, 10).tar(f))
	f.Add(mktar(f, hardlink("a", "b"), reg("b", "x"), reg("d/.wh.e", ""), reg("d/.wh..wh..opq", ""), symlink("s", "d"), reg("s/f", "1")))
	f.Add(mktar(f, reg("a", "x").with(pax("SCHILY.xattr.user.a", "1")), dev("n", '3', 1, 3), dir("d/", 0o700), reg("d", "2"), reg("../x", "3")))
	f.Add(mktar(f, reg(strings.Repeat("long/", 60)+"x", "")))
	f.Add([]byte("garbage"))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		p := filepath.Join(dir, "layer")
		lim := Limits{MaxBytes: 4 << 20, MaxFileSize: 2 << 20, MaxEntries: 1000, MaxXattrBytes: 1 << 20}
		info, err := convertTo(p, bytes.NewReader(b), lim)
		if es, rerr := os.ReadDir(dir); rerr != nil || len(es) != 1 {
			t.Fatalf("other files: %v, %v", es, rerr)
		}
		if err != nil {
			return
		}
		if info.TarSize != int64(len(b)) {
			t.Fatalf("read %d of %d bytes", info.TarSize, len(b))
		}
		first := canonical(t, p, lim)
		// What comes out is canonical: it comes back as itself.
		if _, err := convertTo(p, bytes.NewReader(first), Limits{}); err != nil {
			t.Fatalf("own tar: %v", err)
		}
		if again := canonical(t, p, lim); !bytes.Equal(first, again) {
			t.Fatalf("canonical tars of %d and %d bytes", len(first), len(again))
		}
	})
}

func canonical(t *testing.T, p string, lim Limits) []byte {
	t.Helper()
	r, err := Open(p)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	err = visitAll(t, r, func(p string, n tree.Node) {
		if p != "." && checkPath(p) != nil {
			t.Errorf("the path %q came to be", p)
		}
		if n.Size > lim.MaxFileSize {
			t.Errorf("%q has %d bytes", p, n.Size)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := r.WriteTar(context.Background(), &out); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// reseal makes the checksums of a layer file right again.
func reseal(b []byte) {
	if len(b) < footerSize {
		return
	}
	ft, err := decodeFooter(sealFooter(b), int64(len(b)))
	if err != nil {
		return
	}
	le := leBytes(crc32.Update(crc32.Checksum(b[:blockSize], crcTable()), crcTable(), b[ft.metaOff:ft.tableOff]))
	foot := b[len(b)-footerSize:]
	copy(foot[12:], le)
	copy(foot[16:], leBytes(crc32.Checksum(b[ft.tableOff:ft.tableOff+ft.tableLen], crcTable())))
	sealFooter(b)
}

func sealFooter(b []byte) []byte {
	foot := b[len(b)-footerSize:]
	copy(foot[footerSize-4:], leBytes(crc32.Checksum(foot[:footerSize-4], crcTable())))
	return foot
}

func leBytes(v uint32) []byte { return []byte{byte(v), byte(v >> 8), byte(v >> 16), byte(v >> 24)} }

// FuzzOpen patches a layer file: four bytes of patch are an offset, counted
// from the metadata's start, and a value. The checksums are made right, so that
// what is behind them is what is tested.
func FuzzOpen(f *testing.F) {
	rnd := rand.New(rand.NewPCG(4, 2))
	base, err := os.ReadFile(convert(f, randomTree(rnd, 60, 10).tar(f)))
	if err != nil {
		f.Fatal(err)
	}
	ft, err := decodeFooter(base[len(base)-footerSize:], int64(len(base)))
	if err != nil {
		f.Fatal(err)
	}
	meta := len(base) - int(ft.metaOff)
	f.Add([]byte{}, true)
	f.Add([]byte{0, 0, 70, 255}, true)
	f.Add([]byte{0, 0, 8, 13, 0, 0, 9, 1}, true)
	f.Add([]byte{0, 0, 4, 0xff}, false)
	for range 50 {
		p := make([]byte, 4*(1+rnd.IntN(4)))
		for i := range p {
			p[i] = byte(rnd.Uint32())
		}
		f.Add(p, true)
	}
	f.Fuzz(func(t *testing.T, patch []byte, seal bool) {
		b := bytes.Clone(base)
		for len(patch) >= 4 {
			off := (int(patch[0])<<16 | int(patch[1])<<8 | int(patch[2])) % meta
			b[int(ft.metaOff)+off] = patch[3]
			patch = patch[4:]
		}
		if seal {
			reseal(b)
		}
		openHostile(t, b)
	})
}

// openHostile opens b and reads all of it. It may fail, and must not panic or hang.
func openHostile(t *testing.T, b []byte) {
	t.Helper()
	p := filepath.Join(t.TempDir(), "layer")
	if err := os.WriteFile(p, b, 0o600); err != nil {
		t.Fatal(err)
	}
	_, _ = ReadXattrs(bytes.NewReader(b), int64(len(b)))
	_, _ = ReadDevices(bytes.NewReader(b), int64(len(b)))
	r, err := Open(p)
	if err != nil {
		return
	}
	defer r.Close()
	_ = visitAll(t, r, nil)
	_ = r.WriteTar(context.Background(), &limitedWriter{left: 8 << 20})
	for _, p := range []string{"a/b/c", "x", "...", "\xff", "/a", "", "a/", "f1/f2"} {
		_, _ = r.Lstat(p)
		_, _ = r.ReadDir(p)
	}
}

type limitedWriter struct{ left int }

func (w *limitedWriter) Write(p []byte) (int, error) {
	if w.left -= len(p); w.left < 0 {
		return 0, errEnough
	}
	return len(p), nil
}

func FuzzWhiteoutNames(f *testing.F) {
	for _, s := range []string{
		".wh.a", "d/.wh.a", ".wh.", ".wh..", ".wh...", ".wh..wh..opq", "d/.wh..wh..opq", ".wh..wh.plnk/x", "d/.wh..wh.x",
		"/", ".", "..", "", "../../.wh.x", ".wh.x/y", "a\x00b", ".wh.\x00", strings.Repeat("x", 300), ".wh./x", "./.wh.a/", ".WH.a",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		dir, base, kind, err := parseName(name)
		if err != nil || kind == kindIgnored {
			return
		}
		if tree.Clean(dir) != dir && dir != "" || strings.HasPrefix(dir, "..") && (dir == ".." || strings.HasPrefix(dir, "../")) {
			t.Errorf("%q: directory %q", name, dir)
		}
		if kind == kindOpaque {
			if base != "" {
				t.Errorf("%q: base %q", name, base)
			}
			return
		}
		if err := checkComponent(base); err != nil {
			t.Errorf("%q: %v", name, err)
		}
		// It is what the name says: written the canonical way, it comes out again.
		p := strings.TrimPrefix(dir+"/"+base, "/")
		if kind == kindWhiteout {
			p = strings.TrimPrefix(dir+"/"+whiteoutPrefix+base, "/")
		}
		dir2, base2, kind2, err := parseName(p)
		if dir2 != dir || base2 != base || kind2 != kind || err != nil {
			t.Errorf("%q is %q, %q, %v; %q is %q, %q, %v, %v", name, dir, base, kind, p, dir2, base2, kind2, err)
		}
	})
}
