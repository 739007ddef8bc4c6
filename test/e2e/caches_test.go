package e2e

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/kiln-build/kiln/internal/registry/registrytest"
	"github.com/kiln-build/kiln/test/kilnrun"
)

// downloads notes which blobs a registry is asked for.
type downloads struct {
	mu    sync.Mutex
	blobs map[string]int
}

func (b cachedBed) downloads(t *testing.T) *downloads {
	d := &downloads{blobs: map[string]int{}}
	b.reg.Fail(registrytest.Fault{Method: http.MethodGet, Path: "/blobs/", Serve: func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		d.mu.Lock()
		d.blobs[r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]]++
		d.mu.Unlock()
		next.ServeHTTP(w, r)
	}})
	t.Cleanup(b.reg.Heal)
	return d
}

// layers is how many layers of the documents named were downloaded since the last call.
func (d *downloads) layers(t *testing.T, refs ...string) (n int) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	seen := map[string]bool{}
	for _, r := range refs {
		for _, l := range manifestOf(t, r).Layers {
			if s := l.Digest.String(); !seen[s] && d.blobs[s] > 0 {
				seen[s] = true
				n++
			}
		}
	}
	clear(d.blobs)
	return n
}

// manifestOf reads a manifest, an image's or a cache's.
func manifestOf(t *testing.T, ref string) *v1.Manifest {
	t.Helper()
	r, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	d, err := remote.Get(r)
	if err != nil {
		t.Fatal(err)
	}
	var m v1.Manifest
	if err := json.Unmarshal(d.Manifest, &m); err != nil {
		t.Fatal(err)
	}
	return &m
}

// emptyStore is the option for a store of its own.
func (b cachedBed) emptyStore(t *testing.T) []string {
	t.Helper()
	dir, err := os.MkdirTemp(b.Work, "store-*")
	if err == nil {
		err = kilnrun.Own(dir)
	}
	if err != nil {
		t.Fatal(err)
	}
	return []string{"--root", filepath.Join(dir, "store")}
}

// TestCacheInAnEmptyStore: a build with another's cache does nothing and downloads no layer; with
// one file changed, it does what depends on it, and downloads what that starts from.
func TestCacheInAnEmptyStore(t *testing.T) {
	guard(t)
	for _, c := range []struct {
		name, to, from string
		needs          int // layers that are downloaded for a change of a.txt
		ran            []string
	}{
		// The base image's and that of the step before the COPYs, and, unless stage b is run, its two.
		{"registry", "type=registry,ref=REG/cache:1,mode=max", "REG/cache:1", 4, []string{"ran-a", "ran-last"}},
		{"registry min", "type=registry,ref=REG/cache:1", "type=registry,ref=REG/cache:1", 2, []string{"ran-a", "ran-b", "ran-last"}},
		{"inline", "type=inline", "type=registry,ref=REG/rebuilt", 2, []string{"ran-a", "ran-b", "ran-last"}},
		{"directory", "type=local,dest=DIR,mode=max", "type=local,src=DIR", 1, []string{"ran-a", "ran-last"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newCachedBed(t)
			names := strings.NewReplacer("REG", b.Host, "DIR", filepath.Join(b.Work, "cache"))
			first, ran, _, out := b.rebuild(t, append(b.emptyStore(t), "--cache-to", names.Replace(c.to))...)
			if len(ran) != 3 {
				t.Fatalf("the first build ran %v:\n%s", ran, out)
			}
			d := b.downloads(t)
			refs := []string{b.Host + "/rebuilt", b.Host + "/" + busybox}
			if c.name[0] == 'r' {
				refs = append(refs, b.Host+"/cache:1")
			}
			args := append(b.emptyStore(t), "--cache-from", names.Replace(c.from))
			if c.to == "type=inline" {
				args = append(args, "--cache-to", c.to)
			}
			second, ran, n, out := b.rebuild(t, args...)
			if did := notDone(out); second != first || len(ran)+len(did) > 0 {
				t.Errorf("with the cache it is %s, not %s; did %q:\n%s", second, first, did, out)
			}
			if got := d.layers(t, refs...); got > 0 || n.BlobPuts > 0 {
				t.Errorf("downloaded %d layers; %+v", got, n)
			}
			if c.name == "registry" && n.BlobGets > 2 {
				t.Errorf("read %d blobs; the base image's config and the cache's records are two", n.BlobGets)
			}
			files{"a.txt": "second\n"}.write(t, b.context)
			changed := append(b.emptyStore(t), args[2:]...)
			third, ran, _, out := b.rebuild(t, changed...)
			if third == first || !slices.Equal(ran, c.ran) {
				t.Errorf("with a changed file ran %v:\n%s", ran, out)
			}
			if got := d.layers(t, refs...); got != c.needs {
				t.Errorf("with a changed file downloaded %d layers, not %d:\n%s", got, c.needs, out)
			}
			if fs := rootfs(t, b.Host+"/rebuilt"); fs["/all"].Data != "SECOND\none\ntwo\n" {
				t.Errorf("/all is %q", fs["/all"].Data)
			}
		})
	}
}

// TestTwoWriteOneCache at the same time, as processes with stores of their own.
func TestTwoWriteOneCache(t *testing.T) {
	guard(t)
	b := newCachedBed(t)
	spec := "type=registry,ref=" + b.Host + "/cache:1,mode=max"
	variants := []string{"one", "two", "three"}
	var wg sync.WaitGroup
	for _, v := range variants {
		args := append(b.emptyStore(t), "--cache-to", spec, "--build-arg", "LATE="+v)
		wg.Go(func() { b.Build(t, b.context, "rebuilt-"+v, args...) })
	}
	wg.Wait()
	for _, v := range variants {
		if _, ran, _, out := b.rebuild(t, append(b.emptyStore(t), "--cache-from", b.Host+"/cache:1", "--build-arg", "LATE="+v)...); len(ran) > 0 {
			t.Errorf("%s ran %v:\n%s", v, ran, out)
		}
	}
}

// TestKilledWhileWritingACache: with SIGKILL, at any moment. The cache is what it was or
// what it should become, the next build reads it, and writes it.
func TestKilledWhileWritingACache(t *testing.T) {
	guard(t)
	seed := uint64(time.Now().UnixNano())
	rnd := rand.New(rand.NewPCG(seed, 1))
	t.Logf("seed %d", seed)
	for _, kind := range []string{"registry", "local"} {
		t.Run(kind, func(t *testing.T) {
			b := newCachedBed(t)
			to, from := "type=registry,ref="+b.Host+"/cache:1,mode=max", "type=registry,ref="+b.Host+"/cache:1"
			if dir := filepath.Join(b.Work, "cache"); kind == "local" {
				to, from = "type=local,mode=max,dest="+dir, "type=local,src="+dir
			}
			arguments := func(v string, store []string, more ...string) []string {
				return append(append(append([]string{"build", "--progress", "plain", "--push", "--build-arg", "REGISTRY=" + b.Host, "--build-arg", "LATE=" + v, "-t", b.Host + "/killed:" + v},
					store...), more...), b.context)
			}
			store := b.emptyStore(t)
			start := time.Now()
			if out, code := run(t, b.Runner, arguments("first", store, "--cache-to", to)...); code != 0 {
				t.Fatal(out)
			}
			whole := time.Since(start)
			killed := 0
			for i := range 12 {
				v := fmt.Sprint(i)
				if i%4 == 0 {
					store = b.emptyStore(t)
				}
				cmd := b.Command(t.Context(), arguments(v, store, "--cache-to", to, "--cache-from", from)...)
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Duration(rnd.Float64() * float64(whole)))
				_ = cmd.Process.Kill()
				if cmd.Wait() != nil {
					killed++
				}
				out, code := run(t, b.Runner, arguments(v, store, "--cache-from", from, "--cache-to", to)...)
				if code != 0 || strings.Contains(out, "is written anew") || strings.Contains(out, "nothing is used of the cache") {
					t.Fatalf("time %d: exit code %d:\n%s", i, code, out)
				}
			}
			t.Logf("%d of 12 were killed", killed)
			for _, v := range []string{"first", "0", "11"} {
				out, code := run(t, b.Runner, arguments(v, b.emptyStore(t), "--cache-from", from)...)
				if code != 0 || len(executed(out)) > 0 {
					t.Errorf("%s: exit code %d, and it was not in the cache:\n%s", v, code, out)
				}
			}
			if left, _ := filepath.Glob(filepath.Join(b.Work, "cache", "blobs", "sha256", ".kiln*")); len(left) > 0 {
				t.Errorf("temporary files are left: %v", left)
			}
		})
	}
}

// TestPrivateCache: with a user and a password, as for images; no step sees them.
func TestPrivateCache(t *testing.T) {
	guard(t)
	b := newCachedBed(t)
	private := registrytest.New(t, registrytest.Options{User: "robot", Password: "s3cret-cache-password", Token: true})
	config := files{"config.json": `{"auths":{"` + private.Host() + `":{"auth":"cm9ib3Q6czNjcmV0LWNhY2hlLXBhc3N3b3Jk"}}}`}.write(t, filepath.Join(b.Work, "docker"))
	if err := kilnrun.Own(config); err != nil {
		t.Fatal(err)
	}
	b.Env = append(b.Env, "DOCKER_CONFIG="+config)
	ref := private.Host() + "/team/cache:1"
	files{"Dockerfile": rebuilt + "RUN (env; cat /proc/*/environ /proc/*/cmdline; find / -xdev -name config.json) 2>/dev/null > /seen; true\n"}.write(t, b.context)
	first, _, _, _ := b.rebuild(t, append(b.emptyStore(t), "--cache-to", "type=registry,ref="+ref+",mode=max")...)
	second, ran, _, out := b.rebuild(t, append(b.emptyStore(t), "--cache-from", ref)...)
	if first != second || len(ran) > 0 {
		t.Errorf("ran %v, and it is %s, not %s:\n%s", ran, second, first, out)
	}
	if seen := rootfs(t, b.Host+"/rebuilt")["/seen"].Data; strings.Contains(seen, "s3cret") || strings.Contains(seen, "cm9ib3Q6") || strings.Contains(seen, "/config.json") {
		t.Errorf("a step saw %q", seen)
	}
	if strings.Contains(out, "s3cret") {
		t.Errorf("the password is printed:\n%s", out)
	}
	b.Env = nil
	third, ran, _, out := b.rebuild(t, append(b.emptyStore(t), "--cache-from", ref)...)
	if third == "" || len(ran) != 3 || !strings.Contains(out, "nothing is used of the cache "+ref) {
		t.Errorf("without the password ran %v:\n%s", ran, out)
	}
}
