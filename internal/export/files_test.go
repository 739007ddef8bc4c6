package export

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/tree"
	"github.com/kiln-build/kiln/internal/tree/memtree"
)

func files() map[string]memtree.File {
	return map[string]memtree.File{
		"bin/sh": {Data: "#!", Mode: 0o4755, MTime: time.Unix(1e9, 5)}, "bin/also": {HardLink: "bin/sh"},
		"etc/": {Mode: tree.ModeDir | 0o555, MTime: time.Unix(1e9, 0)}, "etc/passwd": {Data: "p"},
		"abs": {Link: "/etc/passwd"}, "up": {Link: "../../../outside"}, "tmp/": {Mode: tree.ModeDir | 0o1777},
		"dev/null": {Mode: tree.ModeChar | 0o666, Major: 1, Minor: 3}, "dev/null2": {HardLink: "dev/null"},
		"pipe": {Mode: tree.ModeFIFO | 0o600}, "secret": {NoPerm: true, Data: "s"},
	}
}

func export(t *testing.T, dir string) []string {
	t.Helper()
	t.Cleanup(func() { _ = os.Chmod(filepath.Join(dir, "etc"), 0o700) }) // or it cannot be removed
	skipped, err := WriteDir(context.Background(), memtree.New(files()), dir)
	if err != nil {
		t.Fatal(err)
	}
	return skipped
}

func check(t *testing.T, dir string) {
	t.Helper()
	for name, want := range map[string]string{"bin/sh": "#!", "bin/also": "#!", "etc/passwd": "p"} {
		if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	lstat := func(name string) fs.FileInfo {
		fi, err := os.Lstat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return fi
	}
	sh := lstat("bin/sh")
	setuid := sh.Mode()&fs.ModeSetuid != 0
	if setuid != (os.Geteuid() == 0) || sh.Mode().Perm() != 0o755 || !sh.ModTime().Equal(time.Unix(1e9, 5)) || !os.SameFile(sh, lstat("bin/also")) {
		t.Errorf("bin/sh: %v %v", sh.Mode(), sh.ModTime())
	}
	if m := lstat("etc"); m.Mode() != fs.ModeDir|0o555 || !m.ModTime().Equal(time.Unix(1e9, 0)) {
		t.Errorf("etc: %v %v", m.Mode(), m.ModTime())
	}
	if m := lstat("tmp").Mode(); m != fs.ModeDir|fs.ModeSticky|0o777 {
		t.Errorf("tmp: %v", m)
	}
	if m := lstat("secret").Mode(); m != 0 {
		t.Errorf("secret: %v", m)
	}
	for name, want := range map[string]string{"abs": "/etc/passwd", "up": "../../../outside"} {
		if to, err := os.Readlink(filepath.Join(dir, name)); err != nil || to != want {
			t.Errorf("%s: %q, %v", name, to, err)
		}
	}
}

func TestWriteDir(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "out")
	skipped := export(t, dir)
	if !slices.Equal(skipped, []string{"dev/null", "dev/null2", "pipe"}) {
		t.Errorf("skipped %q", skipped)
	}
	check(t, dir)
	export(t, dir) // again, over what is there
	check(t, dir)
}

// TestWriteDirHostile: nothing that is in the directory leads out of it.
func TestWriteDirHostile(t *testing.T) {
	outside := t.TempDir()
	precious := map[string]string{"passwd": "mine", "sh": "mine", "also": "mine"}
	for n, d := range precious {
		if err := os.WriteFile(filepath.Join(outside, n), []byte(d), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, prepare := range map[string]func(dir string) error{
		"link in a directory's place": func(dir string) error { return os.Symlink(outside, filepath.Join(dir, "etc")) },
		"relative link":               func(dir string) error { return os.Symlink("../"+filepath.Base(outside), filepath.Join(dir, "bin")) },
		"link to nothing":             func(dir string) error { return os.Symlink(filepath.Join(outside, "new"), filepath.Join(dir, "etc")) },
		"link in a file's place": func(dir string) error {
			return errors.Join(os.Mkdir(filepath.Join(dir, "etc"), 0o700), os.Symlink(filepath.Join(outside, "passwd"), filepath.Join(dir, "etc/passwd")))
		},
		"hard link in a file's place": func(dir string) error {
			return errors.Join(os.Mkdir(filepath.Join(dir, "etc"), 0o700), os.Link(filepath.Join(outside, "passwd"), filepath.Join(dir, "etc/passwd")))
		},
		"link within":                    func(dir string) error { return os.Symlink("bin", filepath.Join(dir, "etc")) },
		"file in a directory's place":    func(dir string) error { return os.WriteFile(filepath.Join(dir, "etc"), nil, 0o600) },
		"directory in a file's place":    func(dir string) error { return os.MkdirAll(filepath.Join(dir, "secret/x/y"), 0o700) },
		"pipe in a file's place":         func(dir string) error { return syscall.Mkfifo(filepath.Join(dir, "secret"), 0o600) },
		"directory that cannot be used":  func(dir string) error { return os.Mkdir(filepath.Join(dir, "etc"), 0) },
		"directory in a symlink's place": func(dir string) error { return os.Mkdir(filepath.Join(dir, "abs"), 0o700) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := prepare(dir); err != nil {
				t.Fatal(err)
			}
			export(t, dir)
			check(t, dir)
			left := map[string]string{}
			es, err := os.ReadDir(outside)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range es {
				b, err := os.ReadFile(filepath.Join(outside, e.Name()))
				if err != nil {
					t.Fatal(err)
				}
				left[e.Name()] = string(b)
			}
			if !maps.Equal(left, precious) {
				t.Errorf("outside is %v", left)
			}
		})
	}
}

func TestWriteTar(t *testing.T) {
	epoch := time.Unix(1000, 0)
	var b bytes.Buffer
	if err := WriteTar(context.Background(), Clamp(memtree.New(files()), &epoch), &b); err != nil {
		t.Fatal(err)
	}
	var names []string
	for tr := tar.NewReader(&b); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
		if h.ModTime.After(epoch) {
			t.Errorf("%s is of %v", h.Name, h.ModTime)
		}
	}
	if want := "abs bin/ bin/also bin/sh dev/ dev/null dev/null2 etc/ etc/passwd pipe secret tmp/ up"; strings.Join(names, " ") != want {
		t.Errorf("%q", names)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(errors.New("enough"))
	if err := WriteTar(ctx, memtree.New(files()), &b); err == nil || !strings.Contains(err.Error(), "enough") {
		t.Error(err)
	}
}

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	write := func(s string, err error) func(io.Writer) error {
		return func(w io.Writer) error {
			_, werr := io.WriteString(w, s)
			return errors.Join(werr, err)
		}
	}
	p, link := filepath.Join(dir, "f"), filepath.Join(dir, "l")
	if err := os.Symlink("f", link); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(p, write("one", nil)); err != nil {
		t.Fatal(err)
	}
	boom := errors.New("boom")
	if err := WriteFile(p, write("half", boom)); !errors.Is(err, boom) {
		t.Error(err)
	}
	read := func() string {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if got := read(); got != "one" {
		t.Errorf("after a failure: %q", got)
	}
	if err := WriteFile(link, write("two", nil)); err != nil || read() != "two" {
		t.Errorf("through a link: %q %v", read(), err)
	}
	if fi, err := os.Lstat(link); err != nil || fi.Mode()&fs.ModeSymlink == 0 {
		t.Error("the link is gone")
	}
	if err := WriteFile("/dev/null", write("x", nil)); err != nil {
		t.Error(err)
	}
	if fi, err := os.Stat("/dev/null"); err != nil || fi.Mode().IsRegular() {
		t.Fatal("/dev/null was replaced")
	}
	for _, bad := range []string{dir, filepath.Join(dir, "no", "f"), filepath.Join(p, "f")} {
		if err := WriteFile(bad, write("x", nil)); err == nil {
			t.Errorf("%s was written", bad)
		}
	}
	if es, err := os.ReadDir(dir); err != nil || len(es) != 2 {
		t.Errorf("left %v", es)
	}
}
