package engine_test

import (
	"context"
	"strings"
	"sync"
	"testing"

	"github.com/kiln-build/kiln/internal/cachemount"
	"github.com/kiln-build/kiln/internal/engine"
	"github.com/kiln-build/kiln/internal/tree/memtree"
)

// onCache is a graph of one step with a cache mount of nothing at /c.
func onCache(script, id string, sharing cachemount.Sharing, ro bool) *graph {
	g := &graph{}
	m := engine.Mount{Dest: "/c", Input: 1, Source: ".", Writable: !ro, Cache: &engine.CacheMount{ID: id, Sharing: sharing}}
	g.run(script, []engine.Mount{m}, g.root(), nil)
	return g
}

// must solves a graph and returns /out.
func (b *bed) must(t *testing.T, g *graph) string {
	t.Helper()
	fs, _, _, err := b.solve(t, boundFiles(), &g.Graph)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fs.Lstat("c"); err == nil {
		t.Error("the mount point is in the result")
	}
	if _, err := fs.Lstat("out"); err != nil {
		return ""
	}
	return content(t, fs, "out")
}

// TestCacheMount: what a step leaves in a cache is there for the next one that runs, and is no reason to run one.
func TestCacheMount(t *testing.T) {
	b := newBed(t)
	const shared = cachemount.Shared
	look := "stat -c '%a %u' /c > /out; ls /c >> /out; "
	if got := b.must(t, onCache(look+"echo 1 > /c/one; chmod 770 /c; chown 5 /c", "x", shared, false)); got != "755 0\n" {
		t.Errorf("a new one has %q", got)
	}
	if got := b.must(t, onCache(look+"echo 2 > /c/two", "x", shared, false)); got != "770 5\none\n" {
		t.Errorf("the second step sees %q", got)
	}
	// The same step again, and with another cache: known.
	for _, id := range []string{"x", "y"} {
		g := onCache(look+"echo 2 > /c/two", id, cachemount.Locked, false)
		if _, n, _, err := b.solve(t, nil, &g.Graph); err != nil || n != 0 {
			t.Errorf("%d steps; %v", n, err)
		}
	}
	if got := b.must(t, onCache(look+"touch /c/no 2>/dev/null || echo read-only >> /out", "x", shared, true)); got != "770 5\none\ntwo\nread-only\n" {
		t.Errorf("read-only it has %q", got)
	}
	if got := b.must(t, onCache(look+"rm -r /c/*; true", "x", shared, false)); got != "770 5\none\ntwo\n" {
		t.Errorf("the third step sees %q", got)
	}
	if got := b.must(t, onCache(look+": again", "x", shared, false)); got != "770 5\n" {
		t.Errorf("what was removed is there: %q", got)
	}
	if got := b.must(t, onCache(look+": other", "other", shared, false)); got != "755 0\n" {
		t.Errorf("another cache has %q", got)
	}
	infos, err := cachemount.New(b.st).List(t.Context())
	if err != nil || len(infos) != 1 || infos[0].ID != "x" {
		t.Errorf("%+v %v", infos, err)
	}
}

// TestCacheOfFailedStep: it is kept.
func TestCacheOfFailedStep(t *testing.T) {
	b := newBed(t)
	if _, _, _, err := b.solve(t, nil, &onCache("echo 1 > /c/one; exit 1", "x", cachemount.Shared, false).Graph); err == nil {
		t.Fatal("no error")
	}
	if got := b.must(t, onCache("cat /c/one > /out", "x", cachemount.Shared, false)); got != "1\n" {
		t.Errorf("it has %q", got)
	}
}

// TestCacheBase: a cache begins with what it is from, is another one if that is another,
// and two mounts of one show the same.
func TestCacheBase(t *testing.T) {
	b := newBed(t)
	build := func(files map[string]memtree.File, script string) string {
		t.Helper()
		g := &graph{}
		stage := g.copy(g.add(local("context")), "/used", "/s")
		c := &engine.CacheMount{ID: "x", Sharing: cachemount.Locked}
		g.run(script, []engine.Mount{
			{Dest: "/c", Input: 1, Source: ".", Writable: true, Cache: c},
			{Dest: "/d", Input: 1, Source: "s", Writable: true, Cache: c},
		}, g.root(), stage)
		fs, _, _, err := b.solve(t, files, &g.Graph)
		if err != nil {
			t.Fatal(err)
		}
		return content(t, fs, "out")
	}
	if got := build(boundFiles(), "cat /c/s/f > /out; echo new > /c/s/new; cat /d/new >> /out; rm /d/f"); got != "usednew\n" {
		t.Errorf("the first step saw %q", got)
	}
	if got := build(boundFiles(), "ls /d > /out"); got != "link\nnew\n" {
		t.Errorf("the second step saw %q", got)
	}
	if got := build(boundFiles("used/f", "changed"), "ls /d > /out"); got != "f\nlink\n" {
		t.Errorf("one of another base has %q", got)
	}
}

// TestCacheSessions: neither the cache nor what it had in it is in the session of the next step.
func TestCacheSessions(t *testing.T) {
	b := newBed(t)
	g := &graph{}
	m := []engine.Mount{{Dest: "/c", Input: 1, Source: ".", Writable: true, Cache: &engine.CacheMount{ID: "x"}}}
	one := g.run("echo 1 > /c/f", m, g.root(), nil)
	two := g.run("cat /c/f > /two; echo 2 > /c/f", m, one, nil)
	g.run("ls /c > /three 2>&1; cat /proc/mounts > /mounts; true", nil, two)
	fs, steps, starts, err := b.solve(t, nil, &g.Graph)
	if err != nil || steps != 3 || starts != 3 {
		t.Fatalf("%d steps in %d sessions: %v", steps, starts, err)
	}
	if got := content(t, fs, "two") + content(t, fs, "three"); got != "1\nls: /c: No such file or directory\n" {
		t.Errorf("%q", got)
	}
	if strings.Contains(content(t, fs, "mounts"), " /c ") {
		t.Error("the cache is mounted in the next step")
	}
}

// TestCachesAtOnce: steps that run at the same time, each with two caches in its own order, do not
// wait for each other for ever, and lose nothing.
func TestCachesAtOnce(t *testing.T) {
	b := newBed(t)
	for _, sharing := range []cachemount.Sharing{cachemount.Locked, cachemount.Shared} {
		id := string(rune('a' + int(sharing)))
		g := &graph{}
		root := g.root()
		var runs []*engine.Op
		for i, name := range []string{"one", "two", "three", "four"} {
			ms := []engine.Mount{
				{Dest: "/c", Input: 1, Source: ".", Writable: true, Cache: &engine.CacheMount{ID: id + "1", Sharing: sharing}},
				{Dest: "/d", Input: 1, Source: ".", Writable: true, Cache: &engine.CacheMount{ID: id + "2", Sharing: sharing}},
			}
			if i%2 == 1 {
				ms[0], ms[1] = ms[1], ms[0]
			}
			runs = append(runs, g.run("sleep 0.1; echo > /c/"+name+"; echo > /d/"+name+"; : "+id, ms, root, nil))
		}
		g.add(&engine.Merge{}, runs...)
		if _, n, _, err := b.solve(t, nil, &g.Graph); err != nil || n != 4 {
			t.Fatalf("%d steps; %v", n, err)
		}
		for _, which := range []string{"1", "2"} {
			if got := b.must(t, onCache("ls /c > /out; : "+which+id, id+which, sharing, false)); got != "four\none\nthree\ntwo\n" {
				t.Errorf("cache %s of sharing %d has %q", which, sharing, got)
			}
		}
	}
}

// TestCacheOfManyBuilds: builds that run at the same time share a cache.
func TestCacheOfManyBuilds(t *testing.T) {
	b := newBed(t)
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			g := onCache("echo > /c/"+string(rune('a'+i)), "x", cachemount.Sharing(i%2*2), false) // shared and locked
			solver := engine.New(b.config(nil, nil))
			defer solver.Close()
			if _, err := solver.Solve(context.Background(), &g.Graph, engine.Watch{}); err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	if got := b.must(t, onCache("ls /c > /out", "x", cachemount.Shared, false)); got != "a\nb\nc\nd\ne\nf\n" {
		t.Errorf("it has %q", got)
	}
}
