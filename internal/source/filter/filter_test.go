package filter_test

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
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/moby/patternmatcher/ignorefile"
	"github.com/opencontainers/go-digest"
	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"

	"github.com/kiln-build/kiln/internal/source/filter"
	"github.com/kiln-build/kiln/internal/source/local"
	"github.com/kiln-build/kiln/internal/tree"
)

// oracle is what BuildKit's client would send of dir.
func oracle(dir string, include, exclude, follow []string) (map[string]*types.Stat, error) {
	base, err := fsutil.NewFS(dir)
	if err != nil {
		return nil, err
	}
	f, err := fsutil.NewFilterFS(base, &fsutil.FilterOpt{IncludePatterns: include, ExcludePatterns: exclude, FollowPaths: follow})
	if err != nil {
		return nil, err
	}
	out := map[string]*types.Stat{}
	err = f.Walk(context.Background(), "/", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		out[p] = fi.Sys().(*types.Stat)
		return nil
	})
	return out, err
}

func nodes(t tree.Tree) (map[string]tree.Node, error) {
	out := map[string]tree.Node{}
	err := tree.Walk(t, ".", func(p string, n tree.Node) error {
		if p != "." {
			out[p] = n
		}
		return nil
	})
	return out, err
}

func keys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

func openLocal(t testing.TB, dir string) *local.Tree {
	t.Helper()
	l, err := local.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// compare checks a filter against the oracle in every way one can look at a tree.
func compare(t *testing.T, dir string, l tree.Tree, all []string, include, exclude, follow []string) {
	t.Helper()
	desc := fmt.Sprintf("include %q exclude %q follow %q", include, exclude, follow)
	want, werr := oracle(dir, include, exclude, follow)
	got, gerr := nodes(filter.Filter(l, include, exclude, follow))
	if (werr != nil) != (gerr != nil) {
		t.Fatalf("%s: oracle's error is %v, ours %v", desc, werr, gerr)
	}
	if werr != nil {
		return
	}
	if !slices.Equal(keys(want), keys(got)) {
		t.Fatalf("%s:\nwant %q\ngot  %q", desc, keys(want), keys(got))
	}
	for p, st := range want {
		n := got[p]
		fm := fs.FileMode(st.Mode)
		if n.IsDir() != fm.IsDir() || n.IsSymlink() != (fm&fs.ModeSymlink != 0) || n.Mode&0o777 != uint32(fm.Perm()) {
			t.Fatalf("%s: %s has mode %o, want %v", desc, p, n.Mode, fm)
		}
		if n.MTime.UnixNano() != st.ModTime || n.UID != 0 || n.GID != 0 {
			t.Fatalf("%s: %s is %+v, want %+v", desc, p, n, st)
		}
	}
	// A tree that was not walked must say the same of each path on its own.
	f := filter.Filter(l, include, exclude, follow)
	for _, p := range all {
		_, err := f.Lstat(p)
		if _, ok := want[p]; ok != (err == nil) {
			t.Fatalf("%s: Lstat(%q) gives %v, walking found it: %v", desc, p, err, ok)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("%s: Lstat(%q): %v is not fs.ErrNotExist", desc, p, err)
		}
		if _, rerr := f.ReadDir(p); err != nil && rerr == nil {
			t.Fatalf("%s: ReadDir(%q) works, Lstat does not", desc, p)
		}
	}
}

var words = []string{"a", "b", "c", "ab", "foo", "foo.txt", "bar.go", ".git", "B", "x y", "[q]", "ü"}

func randomTree(t *testing.T, r *rand.Rand) (dir string, all []string) {
	t.Helper()
	dir = t.TempDir()
	var fill func(at string, depth int)
	fill = func(at string, depth int) {
		for range 1 + r.IntN(5) {
			p := path.Join(at, words[r.IntN(len(words))])
			host := filepath.Join(dir, p)
			if _, err := os.Lstat(host); err == nil {
				continue
			}
			all = append(all, p)
			switch k := r.IntN(10); {
			case k < 5 && depth < 4:
				if err := os.Mkdir(host, 0o755); err != nil {
					t.Fatal(err)
				}
				fill(p, depth+1)
			case k < 7:
				target := words[r.IntN(len(words))]
				switch r.IntN(4) {
				case 0:
					target = "/" + target
				case 1:
					target = "../" + target
				case 2:
					target = path.Join(target, words[r.IntN(len(words))])
				}
				if err := os.Symlink(target, host); err != nil {
					t.Fatal(err)
				}
			default:
				if err := os.WriteFile(host, []byte(p), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	fill("", 0)
	return dir, all
}

func randomPattern(r *rand.Rand, bang bool) string {
	var cs []string
	for range 1 + r.IntN(3) {
		c := words[r.IntN(len(words))]
		switch r.IntN(12) {
		case 0:
			c = "*"
		case 1:
			c = "**"
		case 2:
			c = "*" + c
		case 3:
			c = c[:1] + "*"
		case 4:
			c = "?"
		case 5:
			c = "[a-c]"
		case 6:
			c = strings.Replace(c, "[", `\[`, 1)
		}
		cs = append(cs, c)
	}
	p := strings.Join(cs, "/")
	switch r.IntN(12) {
	case 0:
		p += "/"
	case 1:
		p = "./" + p
	case 2:
		p += "/**"
	case 3:
		p += "/*"
	case 4:
		p = " " + p + " "
	}
	if bang && r.IntN(3) == 0 {
		p = "!" + p
	}
	return p
}

func randomPatterns(r *rand.Rand, most int, bang bool) []string {
	var ps []string
	for range r.IntN(most + 1) {
		ps = append(ps, randomPattern(r, bang))
	}
	return ps
}

// TestSameAsFsutil compares random patterns on random directories with the
// filter that BuildKit's client uses.
func TestSameAsFsutil(t *testing.T) {
	trees, rounds := 60, 60
	if testing.Short() {
		trees = 10
	}
	for seed := range trees {
		r := rand.New(rand.NewPCG(uint64(seed), 7))
		dir, all := randomTree(t, r)
		l := openLocal(t, dir)
		for range rounds {
			var follow []string
			if r.IntN(3) == 0 {
				follow = append([]string{}, randomPatterns(r, 3, false)...)
			}
			compare(t, dir, l, all, randomPatterns(r, 3, true), randomPatterns(r, 4, true), follow)
		}
	}
}

func mk(t testing.TB, paths ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, p := range paths {
		host := filepath.Join(dir, p)
		if err := os.MkdirAll(filepath.Dir(host), 0o755); err != nil {
			t.Fatal(err)
		}
		if link, target, ok := strings.Cut(p, " -> "); ok {
			if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := os.WriteFile(host, []byte(p), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestDockerignore has the corners of .dockerignore files, as text.
func TestDockerignore(t *testing.T) {
	files := []string{
		"Dockerfile", "README.md", "README-secret.md", "docs/a.md", "docs/b.txt", "docs/deep/c.md",
		"node_modules/x/index.js", "src/main.go", "src/node_modules/y.js", "SRC2/A", "#odd", "!bang", "tmp.log", "dir with space/f",
	}
	tests := []struct {
		name, ignore string
		want         []string // files left; directories are their parents
	}{
		{"empty", "", files},
		{"comments and blank lines", "# README.md\n\n   \n#odd\n", files},
		{"everything", "*", nil},
		{"everything, deeply", "**", nil},
		{"exceptions", "*\n!src\n!README.md\n", []string{"README.md", "src/main.go", "src/node_modules/y.js"}},
		{"exception below an excluded directory", "docs\n!docs/deep/c.md", without(files, "docs/a.md", "docs/b.txt")},
		{"exception that is taken back", "*.md\n!README*.md\nREADME-secret.md", without(files, "README-secret.md")},
		{"no exception after all", "*.md\nREADME-secret.md\n!README*.md", files},
		{"leading slash", "/docs", without(files, "docs/a.md", "docs/b.txt", "docs/deep/c.md")},
		{"leading slash after bang", "*\n!/src/main.go", []string{"src/main.go"}},
		{"trailing slash", "docs/", without(files, "docs/a.md", "docs/b.txt", "docs/deep/c.md")},
		{"trailing spaces", "docs  \t\n", without(files, "docs/a.md", "docs/b.txt", "docs/deep/c.md")},
		{"carriage returns", "docs\r\nsrc\r\n", without(files, "docs/a.md", "docs/b.txt", "docs/deep/c.md", "src/main.go", "src/node_modules/y.js")},
		{"byte order mark", "\ufeffdocs\n", without(files, "docs/a.md", "docs/b.txt", "docs/deep/c.md")},
		{"dot", ".", files},
		{"dot dot", "../docs", files},
		{"cleaned", "./src/../docs", without(files, "docs/a.md", "docs/b.txt", "docs/deep/c.md")},
		{"case", "readme.md\nsrc2\n", files},
		{"star does not cross directories", "*.md", without(files, "README.md", "README-secret.md")},
		{"two stars do", "**/*.md", without(files, "README.md", "README-secret.md", "docs/a.md", "docs/deep/c.md")},
		{"anywhere", "**/node_modules", without(files, "node_modules/x/index.js", "src/node_modules/y.js")},
		{"anywhere, with a way back", "**/node_modules\n!src/node_modules/y.js", without(files, "node_modules/x/index.js")},
		{"spaces inside", "dir with space", without(files, "dir with space/f")},
		{"contents but not the directory", "docs/*", without(files, "docs/a.md", "docs/b.txt", "docs/deep/c.md")},
		{"escaped", `\!bang`, without(files, "!bang")},
		{"character class", "[Rt]*", without(files, "README.md", "README-secret.md", "tmp.log")},
	}
	dir := mk(t, files...)
	l := openLocal(t, dir)
	all, err := nodes(l)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			patterns, err := ignorefile.ReadAll(strings.NewReader(tc.ignore))
			if err != nil {
				t.Fatal(err)
			}
			got, err := nodes(filter.Filter(l, nil, patterns, nil))
			if err != nil {
				t.Fatal(err)
			}
			maps.DeleteFunc(got, func(_ string, n tree.Node) bool { return n.IsDir() })
			want := slices.Sorted(slices.Values(tc.want))
			if !slices.Equal(keys(got), want) {
				t.Errorf("patterns %q leave\n%q, want\n%q", patterns, keys(got), want)
			}
			compare(t, dir, l, keys(all), nil, patterns, nil)
		})
	}
}

func without(all []string, gone ...string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(s string) bool { return slices.Contains(gone, s) })
}

func TestFollowPaths(t *testing.T) {
	dir := mk(t, "real/file", "real/other", "l1 -> l2", "l2 -> real", "abs -> /real/file", "up/link -> ../real/other",
		"loop1 -> loop2", "loop2 -> loop1", "self -> self/x", "out -> ../../../etc/passwd", "gone -> nowhere", "d/k -> /l1/file")
	l := openLocal(t, dir)
	all, err := nodes(l)
	if err != nil {
		t.Fatal(err)
	}
	for _, follow := range [][]string{
		{},
		{"."},
		{"/"},
		{"l1"},
		{"l1/file"},
		{"abs"},
		{"up/link"},
		{"up/*"},
		{"l*"},
		{"*"},
		{"*/*"},
		{"loop1"},
		{"self"},
		{"out"},
		{"gone"},
		{"nowhere"},
		{"d/k"},
		{"/d/../l1"},
		{"real/file/x"},
		{"real", "abs"},
		{"[l]1"},
		{"real/[f"},
	} {
		compare(t, dir, l, keys(all), nil, nil, follow)
		compare(t, dir, l, keys(all), []string{"up"}, []string{"real/other"}, follow)
	}
}

// counting counts what is read of the tree below, and can refuse directories.
type counting struct {
	tree.Tree
	mu   sync.Mutex
	read []string
	deny string
}

func (c *counting) ReadDir(p string) ([]tree.Entry, error) {
	c.mu.Lock()
	c.read = append(c.read, p)
	c.mu.Unlock()
	if c.deny != "" && p == c.deny {
		return nil, &fs.PathError{Op: "open", Path: p, Err: fs.ErrPermission}
	}
	return c.Tree.ReadDir(p)
}

func TestExcludedDirectoriesAreNotRead(t *testing.T) {
	dir := mk(t, "node_modules/a/b/c", ".git/objects/00/x", "src/a.go", "vendor/keep/x", "vendor/drop/y")
	c := &counting{Tree: openLocal(t, dir)}
	f := filter.Filter(c, nil, []string{"node_modules", ".git", "vendor", "!vendor/keep"}, nil)
	if _, err := nodes(f); err != nil {
		t.Fatal(err)
	}
	for _, p := range c.read {
		if strings.HasPrefix(p, "node_modules") || strings.HasPrefix(p, ".git") || p == "vendor/drop" {
			t.Errorf("%s was read", p)
		}
	}
	c.read = nil
	f = filter.Filter(c, []string{"src"}, nil, nil)
	if _, err := nodes(f); err != nil {
		t.Fatal(err)
	}
	if want := []string{".", "src"}; !slices.Equal(c.read, want) {
		t.Errorf("%q were read, want %q", c.read, want)
	}
}

func TestUnreadableDirectory(t *testing.T) {
	dir := mk(t, "secret/x", "a")
	// Not pruned, because the exception has a wildcard; read in vain.
	c := &counting{Tree: openLocal(t, dir), deny: "secret"}
	got, err := nodes(filter.Filter(c, nil, []string{"secret", "!*/y"}, nil))
	if err != nil || !slices.Equal(keys(got), []string{"a"}) {
		t.Errorf("excluded: got %q, %v", keys(got), err)
	}
	_, err = nodes(filter.Filter(c, nil, []string{"a"}, nil))
	if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "secret") {
		t.Errorf("included: got %v, want a permission error that names the directory", err)
	}
}

func TestBadPatterns(t *testing.T) {
	l := openLocal(t, mk(t, "a"))
	for _, p := range []string{"[", "!", `a[`, "[]a]"} {
		_, werr := oracle(l1dir(t), nil, []string{p}, nil)
		_, err := filter.Filter(l, nil, []string{p}, nil).ReadDir(".")
		if (err != nil) != (werr != nil) {
			t.Errorf("pattern %q: got %v, fsutil says %v", p, err, werr)
		}
		if err != nil && !strings.Contains(err.Error(), "exclude pattern") {
			t.Errorf("pattern %q: %v does not say what was wrong", p, err)
		}
	}
}

func l1dir(t *testing.T) string { return mk(t, "a") }

func TestContentAndLinks(t *testing.T) {
	f := filter.Filter(openLocal(t, mk(t, "d/a", "d/b", "l -> d/a", "m -> d/b")), nil, []string{"d/b", "m"}, nil)
	r, err := f.Open("d/a")
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil || !bytes.Equal(b, []byte("d/a")) {
		t.Errorf("content %q, %v", b, err)
	}
	knows := openLocal(t, mk(t, "d/a", "d/b"))
	for _, under := range []tree.Tree{knows, struct{ tree.Tree }{knows}} { // the second hides that
		f := filter.Filter(under, nil, []string{"d/b"}, nil)
		d, err := tree.ContentDigest(f, "d/a")
		if known := under == knows; known && (err != nil || d != digest.FromString("d/a")) || !known && !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("digest %s, %v", d, err)
		}
		if _, err := tree.ContentDigest(f, "d/b"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("digest of a file that is left out: %v", err)
		}
	}
	if s, err := f.Readlink("l"); s != "d/a" || err != nil {
		t.Errorf("Readlink(l) = %q, %v", s, err)
	}
	if _, err := f.Open("d/b"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Open of a file that is left out: %v", err)
	}
	if _, err := f.Readlink("m"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Readlink of a link that is left out: %v", err)
	}
}

func TestConcurrentUse(t *testing.T) {
	dir, all := randomTree(t, rand.New(rand.NewPCG(3, 3)))
	f := filter.Filter(openLocal(t, dir), nil, []string{"**/foo", "!a/**/c", "b*"}, []string{"*"})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := nodes(f); err != nil {
				t.Error(err)
			}
			for _, p := range all {
				_, _ = f.Lstat(p)
			}
		})
	}
	wg.Wait()
}

// BenchmarkWalk walks 20,000 files through the patterns of a usual .dockerignore.
func BenchmarkWalk(b *testing.B) {
	dir := b.TempDir()
	for i := range 20000 {
		p := filepath.Join(dir, fmt.Sprintf("pkg%d/lib%d", i/1000, i/50))
		if i%50 == 0 {
			if err := os.MkdirAll(p, 0o755); err != nil {
				b.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(p, fmt.Sprint(i, ".js")), nil, 0o644); err != nil {
			b.Fatal(err)
		}
	}
	l := openLocal(b, dir)
	patterns := []string{".git", "**/node_modules", "*.md", "!README.md", "**/*.log", "dist/**", "**/.env*", "build/*"}
	for name, t := range map[string]tree.Tree{"bare": l, "filtered": filter.Filter(l, nil, patterns, nil)} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if _, err := nodes(t); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("fsutil", func(b *testing.B) {
		for b.Loop() {
			if _, err := oracle(dir, nil, patterns, nil); err != nil {
				b.Fatal(err)
			}
		}
	})
}
