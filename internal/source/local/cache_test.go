package local

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/source/statcache"
	"github.com/kiln-build/kiln/internal/tree"
)

// TestStatCache plants a wrong sum for a file: it comes back as long as the
// file is as it was, which shows that the cache is used, and never after.
func TestStatCache(t *testing.T) {
	dir, cache := t.TempDir(), t.TempDir()
	write(t, dir, "f", "content")
	write(t, dir, "g", "other")
	sig := func(p string) statcache.Sig {
		st, err := open(t, dir).stat(p)
		must(t, err)
		return sigOf(&st)
	}
	c := statcache.Open(cache)
	planted := statcache.Sum{1, 2, 3}
	c.Put(sig("f"), planted, time.Now().Add(time.Hour))
	must(t, c.Flush())

	real := func(p string) string { d, err := open(t, dir).ContentDigest(p); must(t, err); return d.String() }
	with := func(p string) string {
		d, err := open(t, dir, WithStatCache(cache)).ContentDigest(p)
		must(t, err)
		return d.String()
	}
	if with("f") != asDigest(planted).String() {
		t.Error("the cache is not used")
	}
	if with("g") != real("g") {
		t.Error("the cache is used for another file")
	}
	must(t, os.Chtimes(filepath.Join(dir, "f"), time.Now(), time.Now()))
	if with("f") != real("f") {
		t.Error("the cache is used for a file that was touched")
	}
}

// TestRacilyClean changes a file twice within what may be one tick of the
// clock, with the same size and modification time.
func TestRacilyClean(t *testing.T) {
	dir, cache := t.TempDir(), t.TempDir()
	name := filepath.Join(dir, "f")
	past := time.Now().Add(-time.Hour)
	digest := func() string {
		l := open(t, dir, WithStatCache(cache))
		d, err := l.ContentDigest("f")
		must(t, err)
		must(t, l.cache.Flush())
		return d.String()
	}
	for i := range 200 {
		must(t, os.WriteFile(name, fmt.Appendf(nil, "%04d", i), 0o644))
		must(t, os.Chtimes(name, past, past))
		first := digest()
		must(t, os.WriteFile(name, fmt.Appendf(nil, "%04x", i+1000), 0o644))
		must(t, os.Chtimes(name, past, past))
		if digest() == first {
			t.Fatal("the digest of the former content came back")
		}
	}
	if len(mustRead(t, cache)) != 0 {
		t.Error("a file that had just changed was recorded")
	}
}

func mustRead(t *testing.T, dir string) []os.DirEntry {
	t.Helper()
	es, err := os.ReadDir(dir)
	must(t, err)
	return es
}

func TestConcurrentUse(t *testing.T) {
	dir, cache := t.TempDir(), t.TempDir()
	for i := range 50 {
		write(t, dir, fmt.Sprintf("d%d/f%d", i%7, i), fmt.Sprint(i))
	}
	var wg sync.WaitGroup
	shared := open(t, dir, WithStatCache(cache))
	for i := range 6 {
		wg.Go(func() {
			l := shared
			if i%2 == 0 {
				l = open(t, dir, WithStatCache(cache))
			}
			if _, err := digestAll(l); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// digestAll is the pass that a build makes over a context.
func digestAll(l *Tree) (files int, err error) {
	err = tree.Walk(l, ".", func(p string, n tree.Node) error {
		if !n.IsRegular() {
			return nil
		}
		files++
		_, err := l.ContentDigest(p)
		return err
	})
	return files, err
}

// BenchmarkDigest is the digest pass over 20,000 files and one of 500 MB,
// with the stat cache and without.
func BenchmarkDigest(b *testing.B) {
	dir, cache := b.TempDir(), b.TempDir()
	body := make([]byte, 2000)
	for i := range 20000 {
		d := filepath.Join(dir, "node_modules", fmt.Sprintf("p%03d", i/100), "lib")
		if i%100 == 0 {
			must(b, os.MkdirAll(d, 0o755))
		}
		copy(body, fmt.Sprint(i))
		must(b, os.WriteFile(filepath.Join(d, fmt.Sprintf("f%d.js", i%100)), body, 0o644))
	}
	f, err := os.Create(filepath.Join(dir, "big"))
	must(b, err)
	for range 500 {
		_, err := f.Write(make([]byte, 1<<20))
		must(b, err)
	}
	must(b, f.Close())
	time.Sleep(statcache.Young + 100*time.Millisecond)
	run := func(opts ...Option) {
		l, err := Open(dir, opts...)
		must(b, err)
		n, err := digestAll(l)
		must(b, err)
		if n != 20001 {
			b.Fatal(n, "files")
		}
		must(b, l.Close())
	}
	b.Run("cold", func(b *testing.B) {
		for b.Loop() {
			run()
		}
	})
	run(WithStatCache(cache))
	b.Run("warm", func(b *testing.B) {
		for b.Loop() {
			run(WithStatCache(cache))
		}
	})
	b.Run("warm without openat2", func(b *testing.B) {
		for b.Loop() {
			run(WithStatCache(cache), func(t *Tree) { t.openat2 = false })
		}
	})
	b.Run("walk", func(b *testing.B) {
		for b.Loop() {
			l, err := Open(dir)
			must(b, err)
			must(b, tree.Walk(l, ".", func(string, tree.Node) error { return nil }))
			must(b, l.Close())
		}
	})
}
