package build_test

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/registry/registrytest"
)

// cached is a Dockerfile with two stages that depend on one file each, and steps on both.
const cached = `FROM BASE AS build
WORKDIR /src
COPY in .
RUN tr a-z A-Z < in > /out && head -c 100000 /dev/urandom > /noise
FROM BASE AS other
COPY dir /dir
RUN cat /dir/* > /other
FROM BASE
RUN echo first > /first
COPY --from=build /out /app/out
COPY --link --from=other /other /app/other
RUN cat /app/* > /all
`

// gets remembers which blobs were asked for.
type gets struct {
	mu    sync.Mutex
	blobs []digest.Digest
}

// watch notes the blobs that are downloaded from now on.
func (w *world) watch() *gets {
	g := &gets{}
	w.reg.Fail(registrytest.Fault{Method: http.MethodGet, Path: "/blobs/", Serve: func(rw http.ResponseWriter, r *http.Request, next http.Handler) {
		g.mu.Lock()
		g.blobs = append(g.blobs, digest.Digest(filepath.Base(r.URL.Path)))
		g.mu.Unlock()
		next.ServeHTTP(rw, r)
	}})
	w.t.Cleanup(w.reg.Heal)
	return g
}

// layers are those of the blobs that were downloaded which a manifest of ours names as a layer.
func (w *world) layers(g *gets, refs ...string) (n int) {
	w.t.Helper()
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, ref := range refs {
		raw, _, err := w.env.Registry.Document(context.Background(), ref)
		if err != nil {
			w.t.Fatal(err)
		}
		var m ocispec.Manifest
		if err := json.Unmarshal(raw, &m); err != nil {
			w.t.Fatal(err)
		}
		for _, l := range m.Layers {
			if slices.Contains(g.blobs, l.Digest) {
				n++
			}
		}
	}
	return n
}

func from(t *testing.T, s string) []cache.Spec {
	t.Helper()
	sp, err := cache.ParseFrom(s)
	if err != nil {
		t.Fatal(err)
	}
	return sp
}

func to(t *testing.T, s string) []cache.Spec {
	t.Helper()
	sp, err := cache.ParseTo(s)
	if err != nil {
		t.Fatal(err)
	}
	return []cache.Spec{sp}
}

// cachedRequest builds the Dockerfile above and pushes it.
func (w *world) cachedRequest(t *testing.T, dockerfile string) build.Request {
	t.Helper()
	put(t, w.dir, "in", "in")
	put(t, w.dir, "dir/a", "a")
	req := w.request(dockerfile, w.reg.Host()+"/team/app:1")
	req.Outputs = []export.Spec{{Type: export.Registry}}
	return req
}

func (e *events) warnings() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return strings.Join(e.warned, "\n")
}

// TestWarm: a build in an empty store with another's cache does nothing, downloads
// no layer, and makes the same image; with a file changed it does what depends on it.
func TestWarm(t *testing.T) {
	runs(t)
	for _, c := range []struct {
		name, to, from string
		epoch          string
		ran            []string // after a change of dir/a
	}{
		{"registry max", "type=registry,ref=REG/cache:a,mode=max", "REG/cache:a", "", []string{"COPY --link --from=other /other /app/other", "COPY dir /dir", "LINK COPY --link --from=other /other /app/other", "RUN cat /app/* > /all", "RUN cat /dir/* > /other"}},
		{"registry, same repository", "type=registry,ref=REG/team/app:cache,mode=max", "type=registry,ref=REG/team/app:cache", "", nil},
		{"registry min", "type=registry,ref=REG/cache:b", "REG/nosuch,REG/cache:b", "", nil},
		{"registry zstd", "type=registry,ref=REG/cache:c,mode=max,compression=zstd", "REG/cache:c", "", nil},
		{"directory", "type=local,dest=DIR/cache,mode=max", "type=local,src=DIR/cache", "", nil},
		{"inline", "type=inline", "REG/team/app:1", "", nil},
		{"epoch", "type=registry,ref=REG/cache:d,mode=max", "REG/cache:d", "1500000000", nil},
		{"inline with an epoch", "type=inline", "REG/team/app:1", "1500000000", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			quiet(t)
			dir := t.TempDir()
			real := strings.NewReplacer("REG", w.reg.Host(), "DIR", dir)
			req := w.cachedRequest(t, cached)
			if c.epoch != "" {
				req.BuildArgs["SOURCE_DATE_EPOCH"] = c.epoch
			}
			if strings.Contains(c.to, "zstd") {
				req.Compression = layer.Zstd
			}
			req.CacheTo = to(t, real.Replace(c.to))
			first := w.mustRun(req)
			w.fresh()
			g := w.watch()
			w.reg.ResetCounts()
			warm := req
			warm.CacheFrom = from(t, real.Replace(c.from))
			if c.to != "type=inline" {
				warm.CacheTo = nil
			}
			second := w.mustRun(warm)
			n := w.reg.Counts()
			if ran := w.events.steps(); len(ran) > 0 || second.Digest != first.Digest {
				t.Errorf("ran %q, and made %s, not %s; %s", ran, second.Digest, first.Digest, w.events.warnings())
			}
			seen := []string{w.base, w.reg.Host() + "/team/app:1"}
			if strings.Contains(c.to, "registry") {
				seen = append(seen, c2ref(w, real.Replace(c.to)))
			}
			if got := w.layers(g, seen...); c.to != "type=local,dest=DIR/cache,mode=max" && got > 0 {
				t.Errorf("downloaded %d layers: %v", got, g.blobs)
			}
			if n.BlobPuts > 0 || n.BlobBytesSent > 0 {
				t.Errorf("sent %+v", n)
			}
			// Into another repository: by mounting.
			w.fresh()
			elsewhere := warm
			elsewhere.Tags = []string{w.reg.Host() + "/elsewhere:1"}
			w.reg.ResetCounts()
			if third := w.mustRun(elsewhere); third.Digest != first.Digest || len(w.events.steps()) > 0 {
				t.Errorf("elsewhere it is %s; ran %q", third.Digest, w.events.steps())
			}
			if n := w.reg.Counts(); strings.Contains(c.from, "REG") && (n.BlobPuts > 1 || n.BlobMounts == 0) { // the config
				t.Errorf("elsewhere: %+v", n)
			}
			if c.ran != nil {
				w.fresh()
				put(t, w.dir, "dir/a", "changed")
				w.mustRun(warm)
				if ran := w.events.steps(); !slices.Equal(ran, c.ran) {
					t.Errorf("after a change ran %q, want %q", ran, c.ran)
				}
			}
		})
	}
}

// TestOtherCompression: the image is what it is without the cache, whose layers are compressed otherwise.
func TestOtherCompression(t *testing.T) {
	runs(t)
	w := newWorld(t)
	req := w.cachedRequest(t, "FROM BASE\nCOPY in /in\nRUN cat /in > /out\n")
	req.BuildArgs["SOURCE_DATE_EPOCH"] = "1500000000"
	cold := w.mustRun(req)
	ref := w.reg.Host() + "/cache:1"
	req.CacheTo = to(t, "type=registry,ref="+ref+",compression=zstd,compression-level=7")
	if res := w.mustRun(req); res.Digest != cold.Digest {
		t.Errorf("writing a cache makes it %s, not %s", res.Digest, cold.Digest)
	}
	w.fresh()
	req.CacheFrom, req.CacheTo = from(t, ref), nil
	if res := w.mustRun(req); res.Digest != cold.Digest || len(w.events.steps()) > 0 {
		t.Errorf("with the cache it is %s, not %s; ran %q", res.Digest, cold.Digest, w.events.steps())
	}
}

// c2ref is the name in a --cache-to.
func c2ref(w *world, s string) string {
	_, s, _ = strings.Cut(s, "ref=")
	s, _, _ = strings.Cut(s, ",")
	return s
}

// TestNeededLayers: what a changed step starts from is fetched, and nothing else.
func TestNeededLayers(t *testing.T) {
	runs(t)
	w := newWorld(t)
	ref := w.reg.Host() + "/cache:1"
	dockerfile := "FROM BASE AS big\nRUN head -c 500000 /dev/urandom > /big\nFROM BASE\nCOPY --from=big /big /one\nCOPY dir /dir\nRUN cat /dir/a > /b\n"
	req := w.cachedRequest(t, dockerfile)
	req.CacheTo = to(t, "type=registry,ref="+ref+",mode=max")
	w.mustRun(req)
	w.fresh()
	put(t, w.dir, "dir/a", "other")
	g := w.watch()
	req.CacheFrom, req.CacheTo = from(t, ref), nil
	w.mustRun(req)
	if ran := w.events.steps(); !slices.Equal(ran, []string{"COPY dir /dir", "RUN cat /dir/a > /b"}) {
		t.Errorf("ran %q", ran)
	}
	// The base image's and the one of the COPY before; not the stage's.
	if n := w.layers(g, ref); n != 1 {
		t.Errorf("downloaded %d layers of the cache, want 1: %v", n, g.blobs)
	}
}

// TestCacheOfACachedBuild: all results are written, also those that the build did not look at.
func TestCacheOfACachedBuild(t *testing.T) {
	runs(t)
	w := newWorld(t)
	req := w.cachedRequest(t, cached)
	w.mustRun(req)
	ref := w.reg.Host() + "/cache:1"
	req.CacheTo = to(t, "type=registry,ref="+ref+",mode=max")
	w.mustRun(req)
	if ran := w.events.steps(); len(ran) > 0 {
		t.Fatalf("ran %q", ran)
	}
	w.fresh()
	req.CacheFrom, req.CacheTo = from(t, ref), nil
	// All but the last step, and the other stage alone.
	for _, target := range []string{strings.Replace(cached, "RUN cat /app/*", "RUN cat /app/out", 1), cached} {
		put(t, w.dir, "Dockerfile", strings.ReplaceAll(target, " BASE", " "+w.base))
		w.mustRun(req)
		if ran := w.events.steps(); target == cached && len(ran) > 0 || len(ran) > 1 {
			t.Errorf("ran %q", ran)
		}
	}
	w.fresh()
	req.Target = "other"
	if w.mustRun(req); len(w.events.steps()) > 0 {
		t.Errorf("of the other stage ran %q", w.events.steps())
	}
}

// TestCacheByContent: a stage that is built anew with the same result goes no
// further, by a cache of somebody else's.
func TestCacheByContent(t *testing.T) {
	runs(t)
	w := newWorld(t)
	ref := w.reg.Host() + "/cache:1"
	dockerfile := "FROM BASE AS build\nCOPY in /in\nRUN tr a-z A-Z < /in | head -c 1 > /out\nFROM BASE\nCOPY --from=build /out /out\nRUN cat /out > /copy\n"
	req := w.cachedRequest(t, dockerfile)
	req.CacheTo = to(t, "type=registry,ref="+ref+",mode=max")
	first := w.files(req)["copy"].data
	w.fresh()
	put(t, w.dir, "in", "i and more")
	req.CacheFrom, req.CacheTo = from(t, ref), nil
	if got := w.files(req)["copy"].data; got != first || got == "" {
		t.Errorf("%q, not %q", got, first)
	}
	if ran := w.events.steps(); len(ran) != 2 {
		t.Errorf("ran %q", ran)
	}
}

// TestBrokenCaches: whatever is wrong with a cache is a warning, and the build goes on
// to the right result.
func TestBrokenCaches(t *testing.T) {
	runs(t)
	dockerfile := "FROM BASE\nCOPY in /in\nRUN cat /in > /out\nRUN cat /out > /last\n"
	changed := strings.Replace(dockerfile, "> /last", "> /last2", 1)
	linked := "FROM BASE\nCOPY in /in\nCOPY --link in /out\nRUN cat /in > /last\n"
	layerOf := func(w *world, ref string, n int) digest.Digest {
		raw, _, err := w.env.Registry.Document(context.Background(), ref)
		if err != nil {
			t.Fatal(err)
		}
		var m ocispec.Manifest
		if err := json.Unmarshal(raw, &m); err != nil {
			t.Fatal(err)
		}
		return m.Layers[n].Digest
	}
	for _, c := range []struct {
		name   string
		broken func(w *world, ref string)
		warns  string
		needs  string // Dockerfile; empty: changed
		first  string // Dockerfile that the cache is of; empty: dockerfile
	}{
		{"not there", func(w *world, _ string) {
			w.reg.Fail(registrytest.Fault{Path: "/cache/manifests/", Status: 404})
		}, "there is none yet", "", ""},
		{"forbidden", func(w *world, _ string) {
			w.reg.Fail(registrytest.Fault{Path: "/cache/manifests/", Status: 403})
		}, "403", "", ""},
		{"garbage", func(w *world, _ string) {
			w.reg.Fail(registrytest.Fault{Path: "/cache/manifests/", Status: 200, Body: "{]"})
		}, "not valid JSON", "", ""},
		{"enormous", func(w *world, _ string) {
			w.reg.Fail(registrytest.Fault{Path: "/cache/manifests/", Serve: func(rw http.ResponseWriter, _ *http.Request, _ http.Handler) {
				for range 20 {
					if _, err := rw.Write(make([]byte, 1<<20)); err != nil {
						return
					}
				}
			}})
		}, "more than", "", ""},
		{"records gone", func(w *world, _ string) {
			w.reg.Fail(registrytest.Fault{Method: http.MethodGet, Path: "/cache/blobs/", Status: 404})
		}, "404", "", ""},
		{"a layer gone", func(w *world, ref string) {
			w.reg.Fail(registrytest.Fault{Path: "/blobs/" + layerOf(w, ref, 1).String(), Status: 404})
		}, "404", "", ""},
		{"a layer damaged", func(w *world, ref string) {
			w.reg.Fail(registrytest.Fault{Method: http.MethodGet, Path: "/blobs/" + layerOf(w, ref, 1).String(), Serve: func(rw http.ResponseWriter, r *http.Request, next http.Handler) {
				rw.Header().Set("Content-Type", "application/octet-stream")
				_, _ = io.WriteString(rw, strings.Repeat("x", 200))
			}})
		}, "is not used", "", ""},
		{"a layer gone that is only pushed", func(w *world, ref string) {
			d := layerOf(w, ref, 1).String()
			w.reg.Fail(registrytest.Fault{Method: http.MethodPost, Path: "/blobs/uploads/", Serve: func(rw http.ResponseWriter, r *http.Request, next http.Handler) {
				if r.URL.Query().Get("mount") == d {
					r.URL.RawQuery = "" // no mounts
				}
				next.ServeHTTP(rw, r)
			}})
			w.reg.Fail(registrytest.Fault{Method: http.MethodGet, Path: "/blobs/" + d, Status: 404})
		}, "404", dockerfile, ""},
		{"layers gone on top of one that was made", func(w *world, ref string) {
			for n := range 3 {
				w.reg.Fail(registrytest.Fault{Path: "/blobs/" + layerOf(w, ref, n).String(), Status: 404})
			}
		}, "404", strings.Replace(linked, "COPY in", "COPY --chmod=600 in", 1), linked},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			quiet(t)
			ref := w.reg.Host() + "/cache:1"
			req := w.cachedRequest(t, cmp.Or(c.first, dockerfile))
			req.CacheTo = to(t, "type=registry,ref="+ref+",mode=max")
			w.mustRun(req)
			w.fresh()
			c.broken(w, ref)
			req.CacheFrom, req.CacheTo = from(t, ref), nil
			req.Tags = []string{w.reg.Host() + "/elsewhere:1"}
			put(t, w.dir, "Dockerfile", strings.ReplaceAll(cmp.Or(c.needs, changed), " BASE", " "+w.base))
			w.mustRun(req)
			if got := w.events.warnings(); !strings.Contains(got, c.warns) {
				t.Errorf("warned of %q, want %q", got, c.warns)
			}
			if failed := w.events.failed(); slices.ContainsFunc(failed, func(s string) bool { return !strings.Contains(s, "RUN") && !strings.Contains(s, "COPY") }) {
				t.Errorf("shown as failed: %q", failed)
			}
			w.reg.Heal()
			w.fresh()
			fs := w.files(w.request("FROM " + w.reg.Host() + "/elsewhere:1\nCOPY in /x\n"))
			if fs["out"].data != "in" || fs["last"].data+fs["last2"].data != "in" {
				t.Errorf("the image has %q, %q, %q", fs["out"].data, fs["last"].data, fs["last2"].data)
			}
		})
	}
}

// TestLyingCache: records that name other layers' content. What the build looks into is
// what its diff ID says.
func TestLyingCache(t *testing.T) {
	runs(t)
	w := newWorld(t)
	dir := filepath.Join(t.TempDir(), "cache")
	dockerfile := "FROM BASE\nCOPY in /in\nRUN cat /in > /out\nRUN cat /out > /last\n"
	req := w.cachedRequest(t, dockerfile)
	req.CacheTo = to(t, "type=local,dest="+dir+",mode=max")
	w.mustRun(req)
	edit(t, dir, func(config map[string]any, m *ocispec.Manifest) {
		ls := config["layers"].([]any)
		var built []map[string]any
		for _, l := range ls {
			if l := l.(map[string]any); l["blob"] != nil {
				built = append(built, l)
			}
		}
		built[0]["blob"], built[1]["blob"] = built[1]["blob"], built[0]["blob"]
	})
	w.fresh()
	req.CacheFrom, req.CacheTo = from(t, "type=local,src="+dir), nil
	put(t, w.dir, "Dockerfile", strings.ReplaceAll(dockerfile+"RUN cat /in /out /last > /all\n", " BASE", " "+w.base))
	if got := w.files(req)["all"].data; got != "ininin" {
		t.Errorf("/all is %q", got)
	}
	if got := w.events.warnings(); !strings.Contains(got, "diff ID") {
		t.Errorf("warned of %q", got)
	}
}

// edit changes the cache in a directory.
func edit(t *testing.T, dir string, change func(config map[string]any, m *ocispec.Manifest)) {
	t.Helper()
	var idx ocispec.Index
	readJSON(t, filepath.Join(dir, "index.json"), &idx)
	blob := func(d digest.Digest) string { return filepath.Join(dir, "blobs", "sha256", d.Encoded()) }
	var m ocispec.Manifest
	readJSON(t, blob(idx.Manifests[0].Digest), &m)
	config := map[string]any{}
	readJSON(t, blob(m.Config.Digest), &config)
	change(config, &m)
	write := func(v any) (digest.Digest, int64) {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		d := digest.FromBytes(b)
		if err := os.WriteFile(blob(d), b, 0o644); err != nil {
			t.Fatal(err)
		}
		return d, int64(len(b))
	}
	m.Config.Digest, m.Config.Size = write(config)
	idx.Manifests[0].Digest, idx.Manifests[0].Size = write(m)
	b, err := json.Marshal(idx)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "index.json"), b, 0o644); err != nil {
		t.Fatal(err)
	}
}

func readJSON(t *testing.T, name string, v any) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestCacheThatCannotBeWritten fails the build, before anything has a name; unless that is
// said to be all right.
func TestCacheThatCannotBeWritten(t *testing.T) {
	runs(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, to string
		fault    registrytest.Fault
	}{
		{"no permission", "type=registry,ref=REG/cache:1", registrytest.Fault{Method: http.MethodPost, Path: "/cache/blobs/uploads/", Status: 403}},
		{"no manifest", "type=registry,ref=REG/cache:1", registrytest.Fault{Method: http.MethodPut, Path: "/cache/manifests/", Status: 403}},
		{"no directory", "type=local,dest=" + file + "/x", registrytest.Fault{Path: "/nothing"}},
		{"an image", "type=registry,ref=REG/base:1", registrytest.Fault{Path: "/nothing"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			quiet(t)
			c.fault.Path = strings.ReplaceAll(c.fault.Path, "REG", w.reg.Host())
			if c.fault.Path != "/nothing" {
				w.reg.Fail(c.fault)
			}
			req := w.cachedRequest(t, "FROM BASE\nCOPY in /in\nRUN true\n")
			spec := strings.ReplaceAll(c.to, "REG", w.reg.Host())
			req.CacheTo = to(t, spec)
			_, err := w.run(context.Background(), req)
			if err == nil || w.inRegistry(req.Tags[0]) {
				t.Fatalf("%v; in the registry: %v", err, w.inRegistry(req.Tags[0]))
			}
			if want := diag.ExitRegistry; c.fault.Path != "/nothing" && diag.ExitCode(err) != want {
				t.Errorf("exit code %d: %v", diag.ExitCode(err), err)
			}
			req.CacheTo = to(t, spec+",ignore-error=true")
			w.mustRun(req)
			if !w.inRegistry(req.Tags[0]) || w.events.warnings() == "" {
				t.Errorf("in the registry: %v; warned of %q", w.inRegistry(req.Tags[0]), w.events.warnings())
			}
		})
	}
}

// TestStoreDoesNotDependOnCaches: an image that is kept here is whole, though its steps
// were found in a cache that is gone the next day.
func TestStoreDoesNotDependOnCaches(t *testing.T) {
	runs(t)
	w := newWorld(t)
	ref := w.reg.Host() + "/cache:1"
	req := w.cachedRequest(t, cached)
	req.CacheTo = to(t, "type=registry,ref="+ref)
	w.mustRun(req)
	w.fresh()
	req.CacheFrom, req.CacheTo, req.Outputs, req.Tags = from(t, ref), nil, nil, []string{"kept:1"}
	w.mustRun(req)
	if ran := w.events.steps(); len(ran) > 0 {
		t.Fatalf("ran %q", ran)
	}
	w.reg.Fail(registrytest.Fault{Path: "/cache/", Status: 404})
	archive := filepath.Join(t.TempDir(), "kept.tar")
	again := w.request("FROM kept:1\nCOPY in /more\n", "more:1")
	again.Outputs = []export.Spec{{Type: export.OCI, Dest: archive}}
	w.mustRun(again)
	// And a later build, which finds in the store's cache what it cannot fetch, does it.
	w.fresh()
	w.reg.Heal()
	w.request(cached)
	req.Outputs = []export.Spec{{Type: export.Registry}}
	req.Tags = []string{w.reg.Host() + "/team/app:2"}
	w.mustRun(req)
	w.reg.Fail(registrytest.Fault{Path: "/cache/", Status: 404})
	req.CacheFrom = nil
	req.Outputs = []export.Spec{{Type: export.Tar, Dest: "-"}}
	w.stdout.Reset()
	w.mustRun(req)
	if ran := w.events.steps(); len(ran) == 0 {
		t.Error("nothing ran, though the layers are gone")
	}
}

// TestBuildersWriteOneCache at once: nothing is lost.
func TestBuildersWriteOneCache(t *testing.T) {
	runs(t)
	w := newWorld(t)
	for _, spec := range []string{"type=registry,ref=" + w.reg.Host() + "/cache:1,mode=max", "type=local,dest=" + filepath.Join(t.TempDir(), "c") + ",mode=max"} {
		var wg sync.WaitGroup
		var reqs []build.Request
		const builders = 3
		for i := range builders {
			dir := t.TempDir()
			put(t, dir, "Dockerfile", fmt.Sprintf("FROM %s\nRUN echo %d > /n\nRUN cat /n > /m\n", w.base, i))
			reqs = append(reqs, build.Request{
				Context: dir, Tags: []string{fmt.Sprintf("%s/app:%d", w.reg.Host(), i)}, BuildArgs: map[string]string{},
				Outputs: []export.Spec{{Type: export.Registry}}, CacheTo: to(t, spec), Compression: layer.Gzip,
			})
		}
		for i := range builders {
			w.fresh()
			env := w.env
			wg.Add(1)
			go func() {
				defer wg.Done()
				if _, err := build.Run(context.Background(), env, reqs[i]); err != nil {
					t.Error(err)
				}
			}()
		}
		wg.Wait()
		spec = strings.Replace(strings.TrimSuffix(spec, ",mode=max"), "dest=", "src=", 1)
		for i := range builders {
			w.fresh()
			reqs[i].CacheTo, reqs[i].CacheFrom = nil, from(t, spec)
			w.mustRun(reqs[i])
			if ran := w.events.steps(); len(ran) > 0 {
				t.Errorf("%s: of builder %d ran %q", spec, i, ran)
			}
		}
	}
}

// TestSeveralCaches are written by one build, each as if it were the only one.
func TestSeveralCaches(t *testing.T) {
	runs(t)
	w := newWorld(t)
	quiet(t)
	one, two, max := filepath.Join(t.TempDir(), "c"), filepath.Join(t.TempDir(), "c"), filepath.Join(t.TempDir(), "c")
	ref := w.reg.Host() + "/cache:1"
	req := w.cachedRequest(t, cached)
	for _, s := range []string{
		"type=local,dest=" + one, "type=registry,ref=" + ref + ",compression=uncompressed,force-compression=true", "type=inline",
		"type=local,mode=max,compression=zstd,dest=" + max, "type=local,dest=" + two, "type=registry,ignore-error=true,ref=" + w.base,
	} {
		req.CacheTo = append(req.CacheTo, to(t, s)...)
	}
	first := w.mustRun(req)
	if got := w.events.warnings(); !strings.Contains(got, "something else than a cache") {
		t.Errorf("of what cannot be written it is said %q", got)
	}
	a, err := os.ReadFile(filepath.Join(one, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(two, "index.json")); err != nil || string(a) != string(b) {
		t.Errorf("two directories differ (%v):\n%s\n%s", err, a, b)
	}
	for _, spec := range []string{"type=local,src=" + one, "type=local,src=" + two, "type=local,src=" + max, ref, w.reg.Host() + "/team/app:1"} {
		w.fresh()
		again := req
		again.CacheFrom, again.CacheTo, again.Tags = from(t, spec), to(t, "type=inline"), []string{w.reg.Host() + "/again:1"}
		if got := w.mustRun(again); got.Digest != first.Digest || len(w.events.steps()) > 0 {
			t.Errorf("%s: %s, want %s; ran %q", spec, got.Digest, first.Digest, w.events.steps())
		}
	}
}

// TestCacheMounts go from store to store by a cache: what a step left in one, it finds.
func TestCacheMounts(t *testing.T) {
	runs(t)
	w := newWorld(t)
	for _, spec := range []string{"type=registry,ref=" + w.reg.Host() + "/mounts:1", "type=local,dest=" + filepath.Join(t.TempDir(), "mounts")} {
		w.fresh()
		source := strings.Replace(spec, "dest=", "src=", 1)
		count := "cat /c/n > /before 2>/dev/null; echo -n x >> /c/n; echo "
		step := func(n string, change func(*build.Request)) (before string) {
			t.Helper()
			req := w.request("FROM BASE AS seed\nRUN mkdir /d && echo seeded > /d/f\nFROM BASE\nRUN --mount=type=cache,target=/c,id=one " + count + n +
				"\nRUN --mount=type=cache,target=/c,from=seed,source=/d cat /c/f /c/n > /seeded; echo -n y >> /c/n; echo " + n + "\n")
			change(&req)
			fs := w.files(req)
			return fs["before"].data + " " + strings.TrimSpace(strings.ReplaceAll(fs["seeded"].data, "\n", " "))
		}
		if got := step("1", func(r *build.Request) { r.MountsTo = to(t, spec) }); got != " seeded" {
			t.Fatalf("at first there is %q", got)
		}
		for i, want := range []string{"x seeded y", "xx seeded yy", "xxx seeded yyy"} {
			w.fresh()
			got := step(fmt.Sprint("n", i), func(r *build.Request) { r.MountsFrom, r.MountsTo = from(t, source), to(t, spec) })
			if got != want {
				t.Errorf("%s: in the next store there is %q, want %q; %s", spec, got, want, w.events.warnings())
			}
		}
		// A store's own goes before a cache's.
		if got := step("own", func(r *build.Request) { r.MountsFrom = from(t, source) }); got != "xxxx seeded yyyy" {
			t.Errorf("%s: in the same store there is %q", spec, got)
		}
		w.fresh()
		if got := step("none", func(*build.Request) {}); got != " seeded" {
			t.Errorf("without the cache there is %q", got)
		}
	}
	// A mount that is lost begins anew.
	w.fresh()
	w.reg.Fail(registrytest.Fault{Method: http.MethodGet, Path: "/mounts/blobs/", Skip: 1, Status: 404})
	req := w.request("FROM BASE\nRUN --mount=type=cache,target=/c,id=one cat /c/n > /before 2>/dev/null; true\n")
	req.MountsFrom = from(t, w.reg.Host()+"/mounts:1")
	if fs := w.files(req); fs["before"].data != "" || !strings.Contains(w.events.warnings(), `cache mount "/one" is not imported`) {
		t.Errorf("%q; warned of %q", fs["before"].data, w.events.warnings())
	}
	// Together with the cache of layers, in one.
	w.reg.Heal()
	both := to(t, "type=registry,ref="+w.reg.Host()+"/both:1,mode=max")
	req = w.request("FROM BASE\nRUN --mount=type=cache,target=/c,id=two echo two > /c/n\n", w.reg.Host()+"/app:1")
	req.CacheTo, req.MountsTo, req.Outputs = both, both, []export.Spec{{Type: export.Registry}}
	w.mustRun(req)
	w.fresh()
	req.CacheTo, req.MountsTo, req.CacheFrom = nil, nil, from(t, w.reg.Host()+"/both:1")
	req.MountsFrom = req.CacheFrom
	if w.mustRun(req); len(w.events.steps()) > 0 {
		t.Errorf("ran %q", w.events.steps())
	}
	req = w.request("FROM BASE\nRUN --mount=type=cache,target=/c,id=two cat /c/n > /before\n")
	req.MountsFrom = from(t, w.reg.Host()+"/both:1")
	if got := w.files(req)["before"].data; got != "two\n" {
		t.Errorf("/before is %q", got)
	}
}

// TestCacheRefusals: what a request cannot ask for.
func TestCacheRefusals(t *testing.T) {
	w := newWorld(t)
	for name, change := range map[string]func(*build.Request){
		"one cache twice":    func(r *build.Request) { r.CacheTo = append(to(t, "a.example/x"), to(t, "a.example/x")...) },
		"no name":            func(r *build.Request) { r.CacheFrom = []cache.Spec{{Type: cache.Registry, Ref: "A B"}} },
		"mounts in an image": func(r *build.Request) { r.MountsTo = to(t, "type=inline") },
		"inline to read":     func(r *build.Request) { r.CacheFrom = []cache.Spec{{Type: cache.Inline}} },
	} {
		t.Run(name, func(t *testing.T) {
			quiet(t)
			req := w.request("FROM scratch\n", "a:1")
			change(&req)
			if _, err := w.run(context.Background(), req); diag.ExitCode(err) != diag.ExitUsage {
				t.Error(err)
			}
		})
	}
}
