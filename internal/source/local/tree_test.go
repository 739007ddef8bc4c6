package local

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/internal/tree"
)

// each runs a test with every way there is to look up a path.
func each(t *testing.T, dir string, fn func(t *testing.T, l *Tree)) {
	t.Helper()
	for _, openat2 := range []bool{true, false} {
		t.Run(fmt.Sprintf("openat2=%v", openat2), func(t *testing.T) {
			l := open(t, dir)
			if openat2 && !l.openat2 {
				t.Skip("no openat2 here")
			}
			l.openat2 = openat2
			fn(t, l)
		})
	}
}

func open(t testing.TB, dir string, opts ...Option) *Tree {
	t.Helper()
	l, err := Open(dir, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func write(t testing.TB, dir, p, content string) {
	t.Helper()
	host := filepath.Join(dir, p)
	must(t, os.MkdirAll(filepath.Dir(host), 0o755))
	must(t, os.WriteFile(host, []byte(content), 0o644))
}

func read(l *Tree, p string) (string, error) {
	r, err := l.Open(p)
	if err != nil {
		return "", err
	}
	b, err := io.ReadAll(r)
	return string(b), errors.Join(err, r.Close())
}

func TestMetadata(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o700))
	write(t, dir, "d/file", "content")
	file := filepath.Join(dir, "d/file")
	must(t, os.Chmod(file, 0o4751|os.ModeSetuid))
	when := time.Unix(1234567890, 987654321)
	must(t, os.Chtimes(file, when, when))
	must(t, os.Symlink("/etc/passwd", filepath.Join(dir, "link")))
	must(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	must(t, os.Link(file, filepath.Join(dir, "hard")))
	must(t, os.Symlink("d/file", filepath.Join(dir, "non-\xff-utf8\nline")))
	if os.Getuid() == 0 {
		must(t, os.Chown(file, 1000, 1001))
		must(t, os.Chmod(file, 0o751|os.ModeSetuid))
		must(t, unix.Mknod(filepath.Join(dir, "dev"), unix.S_IFCHR|0o620, int(unix.Mkdev(5, 300))))
		must(t, os.Chmod(filepath.Join(dir, "dev"), 0o620))
		must(t, unix.Mknod(filepath.Join(dir, "whiteout"), unix.S_IFCHR, 0))
	}
	s, err := net.Listen("unix", filepath.Join(dir, "sock"))
	must(t, err)
	defer s.Close()

	each(t, dir, func(t *testing.T, l *Tree) {
		got := map[string]tree.Node{}
		must(t, tree.Walk(l, ".", func(p string, n tree.Node) error {
			again, err := l.Lstat(p)
			if err != nil || fmt.Sprint(again) != fmt.Sprint(n) {
				t.Errorf("Lstat(%q) = %+v, %v; ReadDir said %+v", p, again, err, n)
			}
			if n.UID != 0 || n.GID != 0 {
				t.Errorf("%q belongs to %d:%d", p, n.UID, n.GID)
			}
			got[p] = n
			return nil
		}))
		if n := got["."]; n.Mode != tree.ModeDir|0o755 || n.Xattr != nil {
			t.Errorf("root is %+v", n)
		}
		n := got["d/file"]
		if n.Mode != tree.ModeRegular|0o4751 || n.Size != 7 || !n.MTime.Equal(when) {
			t.Errorf("d/file is %+v", n)
		}
		if h := got["hard"]; h.Inode == 0 || h.Inode != n.Inode || h.Nlink != 2 {
			t.Errorf("hard is %+v, not a link of %+v", h, n)
		}
		if n := got["link"]; !n.IsSymlink() || n.Size != 0 || n.Nlink > 1 {
			t.Errorf("link is %+v", n)
		}
		if n := got["fifo"]; n.Mode != tree.ModeFIFO|0o600 {
			t.Errorf("fifo is %+v", n)
		}
		if target, err := l.Readlink("non-\xff-utf8\nline"); target != "d/file" || err != nil {
			t.Errorf("link with an odd name: %q, %v", target, err)
		}
		for _, p := range []string{"sock", "whiteout"} {
			if _, ok := got[p]; ok {
				t.Errorf("%s is in the tree", p)
			}
			if _, err := l.Lstat(p); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("Lstat(%s): %v", p, err)
			}
		}
		if os.Getuid() == 0 {
			if n := got["dev"]; n.Mode != tree.ModeChar|0o620 || n.Major != 5 || n.Minor != 300 {
				t.Errorf("dev is %+v", n)
			}
		}
	})
}

func TestXattrs(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "f", "")
	f := filepath.Join(dir, "f")
	big := strings.Repeat("x", 3000)
	if err := unix.Lsetxattr(f, "user.big", []byte(big), 0); errors.Is(err, unix.ENOTSUP) {
		t.Skip("no user attributes here")
	}
	must(t, unix.Lsetxattr(f, "user.empty", nil, 0))
	must(t, unix.Lsetxattr(dir, "user.root", []byte("no"), 0))
	want := 2
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	if os.Getuid() == 0 {
		must(t, unix.Lsetxattr(f, "security.capability", []byte(capability), 0))
		must(t, unix.Lsetxattr(f, "trusted.kiln", []byte("no"), 0))
		must(t, os.Symlink("f", filepath.Join(dir, "link")))
		must(t, unix.Lsetxattr(filepath.Join(dir, "link"), "trusted.kiln", []byte("no"), 0))
		want++
	}
	l := open(t, dir)
	es, err := l.ReadDir(".")
	must(t, err)
	one, err := l.Lstat("f")
	must(t, err)
	for _, n := range []tree.Node{es[0].Node, one} {
		x := n.Xattr
		if v, ok := x["user.empty"]; len(x) != want || x["user.big"] != big || v != "" || !ok {
			t.Errorf("attributes are %.100q", x)
		}
		if want == 3 && x["security.capability"] != capability {
			t.Errorf("capability is %q", x["security.capability"])
		}
	}
	if len(es) > 1 && es[1].Node.Xattr != nil {
		t.Errorf("the link has %q", es[1].Node.Xattr)
	}
	root, err := l.Lstat(".")
	if err != nil || root.Xattr != nil {
		t.Errorf("root has %q, %v", root.Xattr, err)
	}
}

func TestNoWayOut(t *testing.T) {
	outside := t.TempDir()
	write(t, outside, "secret", "secret")
	dir := t.TempDir()
	write(t, dir, "in/file", "x")
	must(t, os.Symlink(outside, filepath.Join(dir, "out")))
	must(t, os.Symlink("in", filepath.Join(dir, "inner")))
	must(t, os.Symlink("loop", filepath.Join(dir, "loop")))
	must(t, os.Symlink("..", filepath.Join(dir, "in/up")))
	must(t, os.Symlink("/proc/self/root", filepath.Join(dir, "magic")))
	each(t, dir, func(t *testing.T, l *Tree) {
		for _, p := range []string{
			"out/secret", "inner/file", "loop/x", "in/up/in/file", "magic/etc/passwd", "in/file/x", "in/file/x/y",
			"nowhere", "nowhere/x", "in/nowhere",
		} {
			if _, err := l.Lstat(p); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("Lstat(%q): %v", p, err)
			}
			if _, err := l.ReadDir(p); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("ReadDir(%q): %v", p, err)
			}
			if _, err := l.Readlink(p); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("Readlink(%q): %v", p, err)
			}
			if _, err := l.Open(p); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("Open(%q): %v", p, err)
			}
			if _, err := l.ContentDigest(p); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("ContentDigest(%q): %v", p, err)
			}
		}
		for _, p := range []string{"", "/", "/etc", "..", "../x", "in/../in/file", "./in", "in//file", "in/", "a\x00b", "in/.."} {
			if _, err := l.Lstat(p); err == nil {
				t.Errorf("Lstat(%q) works", p)
			}
			if _, err := l.Open(p); err == nil {
				t.Errorf("Open(%q) works", p)
			}
		}
		for _, p := range []string{".", "in", "out", "inner", "loop"} {
			if _, err := l.Open(p); err == nil {
				t.Errorf("Open(%q) works", p)
			}
			if _, err := l.ContentDigest(p); err == nil {
				t.Errorf("ContentDigest(%q) works", p)
			}
		}
		for _, p := range []string{"in/file", "out", "loop"} {
			if _, err := l.ReadDir(p); err == nil || !strings.Contains(err.Error(), "not a directory") {
				t.Errorf("ReadDir(%q): %v", p, err)
			}
		}
		for _, p := range []string{".", "in", "in/file"} {
			if s, err := l.Readlink(p); err == nil {
				t.Errorf("Readlink(%q) = %q", p, s)
			}
		}
	})
}

// TestSwappedDirectory swaps a directory with a link out of the tree while the
// tree is being read: what lies outside must never be seen.
func TestSwappedDirectory(t *testing.T) {
	outside := t.TempDir()
	write(t, outside, "f", "secret")
	dir := t.TempDir()
	write(t, dir, "d/f", "inside")
	must(t, os.Symlink(outside, filepath.Join(dir, "evil")))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			_ = unix.Renameat2(unix.AT_FDCWD, filepath.Join(dir, "d"), unix.AT_FDCWD, filepath.Join(dir, "evil"), unix.RENAME_EXCHANGE)
		}
	})
	defer wg.Wait()
	defer close(stop)
	each(t, dir, func(t *testing.T, l *Tree) {
		inside := 0
		for end := time.Now().Add(300 * time.Millisecond); time.Now().Before(end); {
			if s, err := read(l, "d/f"); err == nil && s != "inside" {
				t.Fatalf("read %q", s)
			} else if err == nil {
				inside++
			}
			if n, err := l.Lstat("d/f"); err == nil && n.Size != 6 {
				t.Fatalf("saw %+v", n)
			}
		}
		if inside == 0 {
			t.Error("the directory was never seen: nothing was tested")
		}
	})
}

func TestSpecialFilesDoNotBlock(t *testing.T) {
	dir := t.TempDir()
	must(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	each(t, dir, func(t *testing.T, l *Tree) {
		done := make(chan error, 2)
		go func() {
			_, err := l.Open("fifo")
			done <- err
			_, err = l.ContentDigest("fifo")
			done <- err
		}()
		for range 2 {
			select {
			case err := <-done:
				if err == nil || !strings.Contains(err.Error(), "not a regular file") {
					t.Errorf("got %v", err)
				}
			case <-time.After(5 * time.Second):
				t.Fatal("blocked")
			}
		}
	})
}

func TestDeepTree(t *testing.T) {
	dir := t.TempDir()
	// Made relative to descriptors: its path is longer than any path may be.
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must(t, err)
	const depth = 5000
	for range depth {
		must(t, unix.Mkdirat(fd, "d", 0o755))
		next, err := unix.Openat(fd, "d", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		must(t, err)
		unix.Close(fd)
		fd = next
	}
	unix.Close(fd)
	each(t, dir, func(t *testing.T, l *Tree) {
		seen := 0
		err := tree.Walk(l, ".", func(string, tree.Node) error { seen++; return nil })
		if !errors.Is(err, unix.ENAMETOOLONG) {
			t.Errorf("walking ended with %v", err)
		}
		if seen < 2000 || len(err.Error()) > 1000 {
			t.Errorf("saw %d directories, error %v", seen, err)
		}
	})
}

func TestManyLevels(t *testing.T) {
	dir := t.TempDir()
	p := strings.TrimSuffix(strings.Repeat("level/", 200), "/")
	write(t, dir, path.Join(p, "f"), "deep")
	each(t, dir, func(t *testing.T, l *Tree) {
		if s, err := read(l, path.Join(p, "f")); s != "deep" || err != nil {
			t.Errorf("got %q, %v", s, err)
		}
	})
}

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "f", "")
	if _, err := Open(filepath.Join(dir, "nowhere")); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "nowhere") {
		t.Errorf("missing: %v", err)
	}
	if _, err := Open(filepath.Join(dir, "f")); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("file: %v", err)
	}
	must(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	if _, err := Open(filepath.Join(dir, "fifo")); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("fifo: %v", err)
	}
	must(t, os.Symlink(dir, filepath.Join(dir, "self")))
	open(t, filepath.Join(dir, "self"))
}

func TestChangedWhileInUse(t *testing.T) {
	old := time.Now().Add(-time.Hour)
	body := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	tests := []struct {
		name   string
		change func(t *testing.T, name string)
		ok     bool
	}{
		{"not at all", func(*testing.T, string) {}, true},
		{"permissions", func(t *testing.T, name string) { must(t, os.Chmod(name, 0o600)) }, true},
		{"touched", func(t *testing.T, name string) { must(t, os.Chtimes(name, time.Now(), time.Now())) }, true},
		{"replaced by the same", func(t *testing.T, name string) {
			must(t, os.WriteFile(name+".new", body, 0o644))
			must(t, os.Rename(name+".new", name))
		}, true},
		{"grown", func(t *testing.T, name string) { must(t, os.WriteFile(name, append(body, 'x'), 0o644)) }, false},
		{"shrunk", func(t *testing.T, name string) { must(t, os.Truncate(name, 100)) }, false},
		{"other content, same size and mtime", func(t *testing.T, name string) {
			b := bytes.Clone(body)
			b[5000] ^= 1
			must(t, os.WriteFile(name, b, 0o644))
			must(t, os.Chtimes(name, old, old))
		}, false},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			name := filepath.Join(dir, "f")
			must(t, os.WriteFile(name, body, 0o644))
			must(t, os.Chtimes(name, old, old))
			l := open(t, dir)
			d, err := l.ContentDigest("f")
			must(t, err)
			if want := fmt.Sprintf("sha256:%x", sha256.Sum256(body)); d.String() != want {
				t.Fatalf("digest is %s, want %s", d, want)
			}
			tc.change(t, name)
			// As a tar writer does: exactly as many bytes as were promised.
			r, err := l.Open("f")
			if err == nil {
				_, err = io.CopyN(io.Discard, r, int64(len(body)))
				r.Close()
			}
			if (err == nil) != tc.ok || err != nil && !errors.Is(err, ErrChanged) {
				t.Errorf("got %v", err)
			}
			if err != nil && !strings.Contains(err.Error(), `"f"`) {
				t.Errorf("%v does not name the file", err)
			}
		})
	}
}

func TestChangedWhileRead(t *testing.T) {
	for _, size := range []int64{10, 1 << 20} {
		dir := t.TempDir()
		name := filepath.Join(dir, "f")
		must(t, os.WriteFile(name, make([]byte, size), 0o644))
		l := open(t, dir)
		r, err := l.Open("f")
		must(t, err)
		_, err = io.CopyN(io.Discard, r, 5)
		must(t, err)
		must(t, os.Truncate(name, size+1))
		if _, err := io.Copy(io.Discard, r); !errors.Is(err, ErrChanged) {
			t.Errorf("size %d: got %v", size, err)
		}
		r.Close()
	}
}

func TestVanished(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "d/f", "x")
	l := open(t, dir)
	es, err := l.ReadDir("d")
	if err != nil || len(es) != 1 {
		t.Fatal(es, err)
	}
	must(t, os.RemoveAll(filepath.Join(dir, "d")))
	if _, err := l.Open("d/f"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

func TestEmptyFile(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "f", "")
	l := open(t, dir)
	d, err := l.ContentDigest("f")
	if err != nil || d != "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" {
		t.Errorf("%s, %v", d, err)
	}
	if s, err := read(l, "f"); s != "" || err != nil {
		t.Errorf("%q, %v", s, err)
	}
}
