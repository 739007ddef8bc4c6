package cachetruth

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/cache/remote"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/registry/registrytest"
	"github.com/kiln-build/kiln/internal/sandbox/gvisor"
	"github.com/kiln-build/kiln/internal/store"
)

func TestMain(m *testing.M) {
	if code, ok := gvisor.Main(os.Args); ok {
		os.Exit(code)
	}
	os.Exit(m.Run())
}

// epoch is older than anything that is built: digests are the same on all days.
const epoch = "1000000000"

// fewCases is how many are run if nobody says.
const fewCases = 30

// TestCacheTruth is the whole test. KILN_CACHETRUTH is the number of cases, and
// KILN_CACHETRUTH_SEED the first one's seed: each case is the next seed.
func TestCacheTruth(t *testing.T) {
	n := number(t, "KILN_CACHETRUTH", fewCases)
	if testing.Short() {
		n = min(n, 5)
	}
	seed := number(t, "KILN_CACHETRUTH_SEED", 0)
	switch {
	case seed == 0 && os.Getenv("KILN_CACHETRUTH") == "":
		seed = 1 // the same cases for everybody who just runs the tests
	case seed == 0:
		seed = int(time.Now().UnixNano() % 1_000_000_000)
	case os.Getenv("KILN_CACHETRUTH") == "":
		n = 1
	}
	b := newBed(t)
	start := time.Now()
	for i := range n {
		if t.Context().Err() != nil {
			break
		}
		b.oneCase(t, uint64(seed+i))
		if i%50 == 49 {
			t.Logf("%d cases in %v: %s", i+1, time.Since(start).Round(time.Second), b.sum())
		}
	}
	t.Logf("seeds %d to %d, %v: %s", seed, seed+n-1, time.Since(start).Round(time.Second), b.sum())
	if n >= fewCases && (b.warm.ran == 0 || b.warm.cached < b.warm.ran/2) {
		t.Errorf("caches are hardly used, or nothing is ever done: %s", b.sum())
	}
}

func number(t *testing.T, name string, def int) int {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return def
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// bed is what all cases share: a registry with a base image.
type bed struct {
	reg  *registrytest.Registry
	base string

	mu         sync.Mutex
	cold, warm tally
	failing    int // builds that failed, as they should
}

// tally counts the steps of builds.
type tally struct{ builds, ran, cached int }

func (b *bed) sum() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return fmt.Sprintf("%d cold builds ran %d steps, %d with a cache ran %d and found %d; %d failed as they should",
		b.cold.builds, b.cold.ran, b.warm.builds, b.warm.ran, b.warm.cached, b.failing)
}

func newBed(t *testing.T) *bed {
	t.Helper()
	program, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("needs busybox-static: ", err)
	}
	b := &bed{reg: registrytest.New(t, registrytest.Options{})}
	b.base = b.reg.Host() + "/base:1"
	dir := t.TempDir()
	for name, data := range map[string]string{
		"busybox": string(program), "passwd": "root:x:0:0::/root:/bin/sh\nalice:x:1000:1001::/:/bin/sh\n", "group": "root:x:0:\nstaff:x:50:\n",
		"Dockerfile": "FROM scratch\nCOPY --chmod=755 busybox /bin/busybox\nCOPY passwd group /etc/\nRUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if o := b.build(t, job{dir: dir, ref: b.base, store: t.TempDir()}); o.err != nil {
		t.Fatal(o.err)
	}
	b.cold = tally{}
	return b
}

// job is one build.
type job struct {
	dir, ref, store string // directories of the context and of the store
	args            map[string]string
	from, to        string // caches; empty: none
	damaged         bool   // something may be wrong with one
}

// outcome is what a build made.
type outcome struct {
	image       string // all that an image is; empty if the build failed
	ran, warned []string
	err         error
}

// steps notes what ran.
type steps struct {
	mu     sync.Mutex
	names  map[int]string
	ran    []string
	cached int
	warned []string
}

func (s *steps) Send(e progress.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := s.names[e.Step]
	switch {
	case e.Kind == progress.StepPlanned:
		s.names[e.Step] = e.Name
	case e.Kind == progress.Warning:
		s.warned = append(s.warned, e.Text)
	case e.Kind != progress.StepDone || !strings.HasPrefix(name, "[s") || strings.Contains(name, "] FROM "):
	case e.Cached:
		s.cached++
	default:
		s.ran = append(s.ran, name)
	}
}

func (b *bed) build(t *testing.T, j job) outcome {
	t.Helper()
	st, err := store.Open(j.store)
	if err != nil {
		t.Fatal(err)
	}
	reg, err := registry.New(registry.Options{Retry: registry.Retry{Tries: 2}, SkipPushCheck: true})
	if err != nil {
		t.Fatal(err)
	}
	s := &steps{names: map[int]string{}}
	env := build.Env{Store: st, Registry: reg, Progress: progress.NewRecorder(s), Sandbox: gvisor.New(gvisor.Options{})}
	req := build.Request{
		Context: j.dir, Tags: []string{j.ref}, BuildArgs: map[string]string{"SOURCE_DATE_EPOCH": epoch},
		Outputs: []export.Spec{{Type: export.Registry}}, Compression: layer.Gzip,
	}
	for k, v := range j.args {
		req.BuildArgs[k] = v
	}
	if j.from != "" {
		if req.CacheFrom, err = cache.ParseFrom(j.from); err != nil {
			t.Fatal(err)
		}
	}
	if j.to != "" {
		sp, err := cache.ParseTo(j.to)
		if err != nil {
			t.Fatal(err)
		}
		req.CacheTo = []cache.Spec{sp}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	_, err = build.Run(ctx, env, req)
	b.count(j, s, err)
	for _, w := range s.warned {
		if !j.damaged && strings.Contains(w, "cache") && !strings.Contains(w, "there is none yet") {
			t.Errorf("warned: %s", w)
		}
	}
	if err != nil {
		return outcome{err: err, ran: s.ran, warned: s.warned}
	}
	return outcome{image: describe(t, reg, j.ref), ran: s.ran, warned: s.warned}
}

func (b *bed) count(j job, s *steps, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	to := &b.warm
	if j.from == "" && j.to == "" {
		to = &b.cold
	}
	if err != nil {
		b.failing++
		return
	}
	to.builds++
	to.ran += len(s.ran)
	to.cached += s.cached
}

// describe is an image in words, without the records within it.
func describe(t *testing.T, reg *registry.Client, ref string) string {
	t.Helper()
	img, err := reg.Resolve(context.Background(), ref, ocispec.Platform{})
	if err != nil {
		t.Fatal(err)
	}
	config := map[string]json.RawMessage{}
	if err := json.Unmarshal(img.RawConfig, &config); err != nil {
		t.Fatal(err)
	}
	delete(config, remote.InlineField)
	text, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	var layers []digest.Digest
	for _, l := range img.Layers {
		layers = append(layers, l.DiffID, l.Blob.Digest)
	}
	return fmt.Sprintf("%s\n%s", text, layers)
}

// way is a way to build with what earlier builds left.
type way struct {
	name     string
	from, to string
	store    string // "" is a new one each time
}

// oneCase makes a project up, builds it in all ways, and does so again after edits.
func (b *bed) oneCase(t *testing.T, seed uint64) {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 1))
	withRun := seed%3 == 0 // RUN steps take most of the time
	p := generate(r, withRun)
	dir, err := os.MkdirTemp(quickDir(), "kiln-cachetruth-*")
	if err != nil {
		t.Fatal(err)
	}
	defer removeAll(dir)
	c := oneCase{bed: b, t: t, seed: seed, dir: dir, r: r, withRun: withRun}
	repo := fmt.Sprintf("%s/case%d", b.reg.Host(), seed)
	ways := []way{
		{"the store's cache", "", "", filepath.Join(dir, "store")},
		{"a registry's cache, max", repo + "/max:1", "type=registry,mode=max,ref=" + repo + "/max:1", ""},
		{"a registry's cache, min", repo + "/min:1", "type=registry,ref=" + repo + "/min:1", ""},
		{"a directory's cache", "type=local,src=" + dir + "/cache", "type=local,mode=max,dest=" + dir + "/cache", ""},
		{"an inline cache", repo + "/inline:1", "type=inline", ""},
	}
	if !c.state(p, ways, "as generated") {
		return // not a Dockerfile that can be built
	}
	for range 2 {
		next, what := edit(r, p, withRun)
		// Not all of them, for the time that it takes.
		some := slices.Clone(ways)
		r.Shuffle(len(some), func(i, j int) { some[i], some[j] = some[j], some[i] })
		if c.state(next, some[:3], what) {
			p = next
		}
		if t.Failed() {
			return
		}
	}
}

// quickDir is where files need not get to a disk: a build waits for that at its end.
func quickDir() string {
	const shm = "/dev/shm"
	if f, err := os.CreateTemp(shm, "kiln-*"); err == nil {
		f.Close()
		os.Remove(f.Name())
		return shm
	}
	return ""
}

func removeAll(dir string) {
	_ = filepath.WalkDir(dir, func(p string, d os.DirEntry, _ error) error {
		if d != nil && d.IsDir() {
			_ = os.Chmod(p, 0o700)
		}
		return nil
	})
	_ = os.RemoveAll(dir)
}

// oneCase is a case on its way.
type oneCase struct {
	*bed
	t       *testing.T
	seed    uint64
	dir     string
	r       *rand.Rand
	withRun bool
	n       int
	damaged bool // something was taken away from a cache
}

// state builds a project without a cache and in other ways, which must come to the same; false if
// it cannot be built.
func (c *oneCase) state(p *project, ways []way, what string) bool {
	c.t.Helper()
	context := filepath.Join(c.dir, "context")
	if err := os.MkdirAll(context, 0o755); err != nil {
		c.t.Fatal(err)
	}
	if err := p.write(context, c.base); err != nil {
		c.t.Fatal(err)
	}
	cold := c.build(c.t, c.job(p, way{}))
	check := func(w way, o outcome) {
		c.t.Helper()
		if (o.err == nil) != (cold.err == nil) || o.image != cold.image {
			c.t.Errorf("seed %d, %s, with %s: another image than without a cache\n%s\nbuild arguments %q\nran %q\nwarned %q\nwith:    %v %s\nwithout: %v %s",
				c.seed, what, w.name, p.dockerfile(c.base), p.args, o.ran, o.warned, o.err, o.image, cold.err, cold.image)
		}
	}
	if cold.err != nil {
		check(ways[0], c.build(c.t, c.job(p, ways[0])))
		return false
	}
	for _, w := range ways {
		if chance(c.r, 15) {
			c.damage(w)
		}
		check(w, c.build(c.t, c.job(p, w)))
		if chance(c.r, 60) {
			continue
		}
		again := c.build(c.t, c.job(p, w))
		check(w, again)
		if len(again.ran) > 0 && !c.damaged {
			c.t.Errorf("seed %d, %s, with %s: built once more, it ran %q\n%s", c.seed, what, w.name, again.ran, p.dockerfile(c.base))
		}
	}
	if chance(c.r, 30) {
		c.together(p, ways, check)
	}
	return true
}

// damage takes something away from a cache, which is to cost time and nothing else: a
// prune of the store, or what pruning, disks and people do to files.
func (c *oneCase) damage(w way) {
	c.t.Helper()
	c.damaged = true
	if w.store != "" && chance(c.r, 50) {
		st, err := store.Open(w.store)
		if err == nil {
			_, err = st.Prune(context.Background(), store.PruneOptions{Limit: store.Limit{MaxUsed: int64(c.r.IntN(100_000) + 1)}})
		}
		if err != nil {
			c.t.Error(err)
		}
		return
	}
	var files []string
	for _, dir := range []string{filepath.Join(c.dir, "store", "blobs"), filepath.Join(c.dir, "store", "layers"), filepath.Join(c.dir, "cache", "blobs")} {
		_ = filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				files = append(files, p)
			}
			return nil
		})
	}
	for range min(3, len(files)) {
		p := pick(c.r, files...)
		if chance(c.r, 70) {
			_ = os.Remove(p)
		} else if strings.Contains(p, "blobs") { // layer files are only verified in part
			_ = os.Chmod(p, 0o600)
			_ = os.WriteFile(p, []byte("damaged"), 0o600)
		}
	}
}

func (c *oneCase) job(p *project, w way) job {
	c.n++
	j := job{
		dir: filepath.Join(c.dir, "context"), store: w.store, args: p.args, from: w.from, to: w.to, damaged: c.damaged,
		ref: fmt.Sprintf("%s/case%d/image:%d", c.reg.Host(), c.seed, c.n),
	}
	if w.to == "type=inline" {
		j.ref = w.from
	}
	if j.store == "" {
		j.store = filepath.Join(c.dir, fmt.Sprint("store", c.n))
	}
	return j
}

// together has two builders build at once, with one cache: the project, and an edited one.
func (c *oneCase) together(p *project, ways []way, check func(way, outcome)) {
	c.t.Helper()
	i := slices.IndexFunc(ways, func(w way) bool { return w.to != "" && w.to != "type=inline" })
	if i < 0 {
		return
	}
	w := ways[i]
	other, what := edit(c.r, p, c.withRun)
	dir := filepath.Join(c.dir, "other")
	if err := errors.Join(os.MkdirAll(dir, 0o755), other.write(dir, c.base)); err != nil {
		c.t.Fatal(err)
	}
	cold := c.job(other, way{})
	theirs := c.job(other, w)
	cold.dir, theirs.dir = dir, dir
	want := c.build(c.t, cold)
	mine := c.job(p, w)
	var a, b outcome
	var wg sync.WaitGroup
	wg.Go(func() { a = c.build(c.t, mine) })
	wg.Go(func() { b = c.build(c.t, theirs) })
	wg.Wait()
	check(w, a)
	if (b.err == nil) != (want.err == nil) || b.image != want.image {
		c.t.Errorf("seed %d, %s, at the same time as before it, with %s: another image than without a cache\n%s\nwith:    %v %s\nwithout: %v %s",
			c.seed, what, w.name, other.dockerfile(c.base), b.err, b.image, want.err, want.image)
	}
}
