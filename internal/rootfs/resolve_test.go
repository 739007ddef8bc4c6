package rootfs

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/tree"
	"github.com/kiln-build/kiln/internal/tree/memtree"
	"golang.org/x/sys/unix"
)

func resolveTree() *memtree.Tree {
	files := map[string]memtree.File{
		"usr/lib/x":   {Data: "x"},
		"lib":         memtree.Symlink("usr/lib"),
		"abs":         memtree.Symlink("/usr/lib"),
		"up":          memtree.Symlink("../../../../usr"),
		"usr/self":    memtree.Symlink("."),
		"loop":        memtree.Symlink("loop2"),
		"loop2":       memtree.Symlink("loop"),
		"dangling":    memtree.Symlink("/var/new/place"),
		"through":     memtree.Symlink("lib/../x"),
		"usr/x":       {Data: "kernel's way"},
		"x":           {Data: "the lexical way"},
		"file":        {Data: "f"},
		"slash":       memtree.Symlink("usr/lib/"),
		"chain0":      memtree.Symlink("file"),
		"doubledot":   memtree.Symlink("usr/lib/../../etc/../lib/x"),
		"etc/a/b/c/d": {},
	}
	for i := 1; i <= 41; i++ {
		files[fmt.Sprint("chain", i)] = memtree.Symlink(fmt.Sprint("chain", i-1))
	}
	return memtree.New(files)
}

func TestResolve(t *testing.T) {
	m := resolveTree()
	for _, c := range []struct {
		path string
		last bool
		want string // "!" and an error of the system
		new  string // the same for ResolveNew, "" if it is
	}{
		{"/", true, ".", ""},
		{"", true, ".", ""},
		{".", false, ".", ""},
		{"../..", true, ".", ""},
		{"lib/x", true, "usr/lib/x", ""},
		{"//lib//./x/", true, "usr/lib/x", ""},
		{"abs/x", true, "usr/lib/x", ""},
		{"lib", true, "usr/lib", ""},
		{"lib", false, "lib", ""},
		{"lib/", false, "lib", ""},
		{"lib/.", false, "usr/lib", "usr/lib"},
		{"slash/x", true, "usr/lib/x", ""},
		{"up/lib", true, "usr/lib", ""},
		{"usr/self/self/self/lib", true, "usr/lib", ""},
		{"through", true, "usr/x", ""},
		{"lib/../x", true, "usr/x", ""},
		{"doubledot", true, "usr/lib/x", ""},
		{"file", true, "file", ""},
		{"file/x", true, "!not a directory", ""},
		{"loop", true, "!too many levels", ""},
		{"loop", false, "loop", ""},
		{"loop/x", false, "!too many levels", ""},
		{"chain39", true, "file", ""},
		{"chain40", true, "!too many levels", ""},
		{"missing", true, "!no such file", "missing"},
		{"missing/a/../b", true, "!no such file", "missing/b"},
		{"missing/../../file", true, "!no such file", "file"},
		{"dangling", true, "!no such file", "var/new/place"},
		{"dangling/x", true, "!no such file", "var/new/place/x"},
		{"dangling", false, "dangling", ""},
		{"lib/new", true, "!no such file", "usr/lib/new"},
		{strings.Repeat("a/", 9000), true, "!file name too long", ""},
	} {
		check := func(what, want, got string, err error) {
			t.Helper()
			if msg, bad := strings.CutPrefix(want, "!"); bad {
				var pe *fs.PathError
				if err == nil || !strings.Contains(err.Error(), msg) || !errors.As(err, &pe) {
					t.Errorf("%s(%.40q, %v) = %q, %v; want %s", what, c.path, c.last, got, err, msg)
				}
			} else if err != nil || got != want {
				t.Errorf("%s(%q, %v) = %q, %v; want %q", what, c.path, c.last, got, err, want)
			}
		}
		got, err := Resolve(m, c.path, c.last)
		check("Resolve", c.want, got, err)
		want := c.new
		if want == "" {
			want = c.want
		}
		got, err = ResolveNew(m, c.path, c.last)
		check("ResolveNew", want, got, err)
	}
}

func TestResolveBelow(t *testing.T) {
	m := memtree.New(map[string]memtree.File{
		"opt/root/link":  memtree.Symlink("/a/b"),
		"opt/root/a/b/f": {},
		"opt/root/out":   memtree.Symlink("../../../../a"),
		"a/b/secret":     {},
	})
	for p, want := range map[string]string{
		"link/f": "opt/root/a/b/f", "out/b": "opt/root/a/b", "../../a": "opt/root/a", "link/secret": "opt/root/a/b/secret", "/": "opt/root",
	} {
		if got, err := ResolveBelow(m, "opt/root", p, true); err != nil || got != want {
			t.Errorf("ResolveBelow(%q) = %q, %v; want %q", p, got, err, want)
		}
	}
}

// TestResolveAsKernel compares with openat2's RESOLVE_IN_ROOT.
func TestResolveAsKernel(t *testing.T) {
	names := []string{"a", "b", "c", ".", ".."}
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 4))
		random := func(n int) string {
			p := ""
			for range 1 + r.IntN(n) {
				p += names[r.IntN(5)] + "/"
			}
			if r.IntN(2) == 0 {
				p = "/" + p
			}
			return strings.TrimSuffix(p, []string{"/", ""}[r.IntN(2)])
		}
		files := map[string]memtree.File{}
		dirs := []string{"."}
		for range 12 {
			p := path.Join(dirs[r.IntN(len(dirs))], names[r.IntN(3)])
			if _, ok := files[p]; ok {
				continue
			}
			switch r.IntN(5) {
			case 0, 1:
				files[p] = memtree.Dir(0o755)
				dirs = append(dirs, p)
			case 2:
				files[p] = memtree.File{Data: "x"}
			default:
				// A slash at the end would ask the kernel for a directory.
				l := random(4)
				files[p] = memtree.Symlink(l[:1] + strings.TrimRight(l[1:], "/"))
			}
		}
		m := memtree.New(files)
		dir := t.TempDir()
		root := filepath.Join(dir, "root")
		if err := materialize(m, root); err != nil {
			t.Fatal(err)
		}
		fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		for range 40 {
			p, last := random(5), r.IntN(2) == 0
			want, werr := kernelResolve(fd, root, p, last)
			if errors.Is(werr, syscall.ENOSYS) || errors.Is(werr, syscall.EPERM) {
				t.Skipf("openat2: %v", werr)
			}
			got, gerr := Resolve(m, p, last)
			// A slash at the end asks the kernel for a directory, and follows a
			// link; here it says nothing.
			if strings.HasSuffix(p, "/") {
				continue
			}
			var pe *fs.PathError
			if gerr != nil && (!errors.As(gerr, &pe) || !errors.Is(werr, pe.Err)) || gerr == nil && got != want {
				t.Fatalf("seed %d: Resolve(%q, %v) = %q, %v; kernel: %q, %v\n%v", seed, p, last, got, gerr, want, werr, files)
			}
		}
		unix.Close(fd)
	}
}

func kernelResolve(root int, dir, p string, last bool) (string, error) {
	how := unix.OpenHow{Flags: unix.O_PATH, Resolve: unix.RESOLVE_IN_ROOT}
	if !last {
		how.Flags |= unix.O_NOFOLLOW
	}
	fd, err := unix.Openat2(root, p, &how)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	full, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return "", err
	}
	return filepath.Rel(dir, full)
}

func FuzzResolve(f *testing.F) {
	f.Add("a/b", "/c", "../..", "a/../b")
	f.Add("b", "a", "b", "a/a/a")
	f.Add("..//./", "", "/", "c")
	f.Fuzz(func(t *testing.T, p, a, b, c string) {
		files := map[string]memtree.File{"d/e/f": {}, "d/l": memtree.Symlink(c), "d/e/g/": {}}
		for name, target := range map[string]string{"a": a, "b": b, "c": c} {
			if target != "" {
				files[name] = memtree.Symlink(target)
			}
		}
		m := memtree.New(files)
		for _, last := range []bool{true, false} {
			start := time.Now()
			for i, resolve := range []func(string, bool) (string, error){
				func(p string, l bool) (string, error) { return Resolve(m, p, l) },
				func(p string, l bool) (string, error) { return ResolveNew(m, p, l) },
				func(p string, l bool) (string, error) { return ResolveBelow(m, "d", p, l) },
			} {
				got, err := resolve(p, last)
				if err != nil {
					continue
				}
				if tree.Clean(got) != got {
					t.Fatalf("%d: %q gave %q", i, p, got)
				}
				if i == 2 && got != "d" && !strings.HasPrefix(got, "d/") {
					t.Fatalf("%q left its root: %q", p, got)
				}
				n, err := m.Lstat(got)
				if i == 0 && err != nil {
					t.Fatalf("%q gave %q: %v", p, got, err)
				}
				if err == nil && last && n.Mode&tree.ModeType == tree.ModeSymlink {
					t.Fatalf("%q gave the link %q", p, got)
				}
			}
			if d := time.Since(start); d > 5*time.Second {
				t.Fatalf("took %v", d)
			}
		}
	})
}
