package remote_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/cache/cachetest"
	"github.com/kiln-build/kiln/internal/cache/remote"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/registry/registrytest"
	"github.com/kiln-build/kiln/internal/store"
)

func save(t *testing.T, c *remote.Cache, key string, layers ...image.Layer) {
	t.Helper()
	if err := c.Save(context.Background(), cachetest.Key(key), cache.Record{Layers: layers}); err != nil {
		t.Fatal(err)
	}
}

func flush(t *testing.T, c *remote.Cache) {
	t.Helper()
	if err := c.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}

// has lists which of the keys the cache has.
func (p place) has(keys ...string) (out []string) {
	p.t.Helper()
	c := p.open(cachetest.NewStore(p.t))
	defer c.Close()
	for _, k := range keys {
		r, err := c.Lookup(context.Background(), cachetest.Key(k))
		if err != nil {
			p.t.Fatal(err)
		}
		if r != nil {
			out = append(out, k)
		}
	}
	return out
}

func (w *warnings) all() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Join(w.said, "\n")
}

// TestEviction: what was used longest ago goes first, by number, size and time; what the
// build that writes has used stays.
func TestEviction(t *testing.T) {
	st := cachetest.NewStore(t)
	day := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	big := func(s string) image.Layer { // a few hundred bytes, compressed
		return cachetest.Layer(t, st, strings.Repeat(s, 10))
	}
	for _, c := range []struct {
		name, more string
		want       []string
	}{
		{"number", ",max-records=3", []string{"day0", "day3", "day4"}},
		{"number below the build's own", ",max-records=1", []string{"day0", "day4"}},
		{"size", ",max-size=1", []string{"day0", "day4"}},
		{"time", ",ttl=40h", []string{"day0", "day3", "day4"}},
		{"none", "", []string{"day0", "day1", "day2", "day3", "day4"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := inDirectory(t, c.more)
			now := day
			p.now = func() time.Time { return now }
			for i := range 5 {
				now = day.AddDate(0, 0, i)
				w := p.open(st)
				save(t, w, fmt.Sprint("day", i), big(fmt.Sprint(i)))
				if i == 4 {
					save(t, w, "day0", big("0")) // used once more
				}
				flush(t, w)
			}
			if got := p.has("day0", "day1", "day2", "day3", "day4"); !slices.Equal(got, c.want) {
				t.Errorf("there are %v, want %v", got, c.want)
			}
			// And the blobs of no others: manifest, config and one for each.
			blobs, err := os.ReadDir(filepath.Join(p.spec.Dir, "blobs", "sha256"))
			if err != nil || len(blobs) != len(c.want)+2 {
				t.Errorf("%d blobs of %d results: %v (%v)", len(blobs), len(c.want), blobs, err)
			}
		})
	}
}

// TestClockInTheFuture of one writer does not make its records immortal.
func TestClockInTheFuture(t *testing.T) {
	p := inDirectory(t, ",max-records=2")
	st := cachetest.NewStore(t)
	real := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	now := real.AddDate(50, 0, 0)
	p.now = func() time.Time { return now }
	w := p.open(st)
	save(t, w, "future", cachetest.Layer(t, st, "f"))
	flush(t, w)
	for i := range 3 {
		now = real.AddDate(0, 0, i+1)
		w := p.open(st)
		save(t, w, fmt.Sprint(i), cachetest.Layer(t, st, fmt.Sprint(i)))
		flush(t, w)
	}
	if got := p.has("future", "0", "1", "2"); !slices.Equal(got, []string{"1", "2"}) {
		t.Errorf("there are %v", got)
	}
}

// TestNothingNew: a build that used what there is writes nothing, and sends nothing.
func TestNothingNew(t *testing.T) {
	reg := registrytest.New(t, registrytest.Options{})
	p := inRegistry(t, reg, "")
	st := cachetest.NewStore(t)
	one := cachetest.Layer(t, st, "one")
	w := p.open(st)
	save(t, w, "k", one)
	flush(t, w)
	reg.ResetCounts()
	w = p.open(st)
	r, err := w.Lookup(context.Background(), cachetest.Key("k"))
	if err != nil || r == nil {
		t.Fatal(r, err)
	}
	if err := w.Save(context.Background(), cachetest.Key("k"), *r); err != nil {
		t.Fatal(err)
	}
	flush(t, w)
	if n := reg.Counts(); n.ManifestPuts+n.BlobPuts+n.UploadStarts+n.BlobHeads > 0 || n.ManifestGets != 1 || n.BlobGets != 1 {
		t.Errorf("%+v", n)
	}
}

// TestManyWriters at once, in one registry: every one finds its records afterwards.
func TestManyWriters(t *testing.T) {
	p := inRegistry(t, registrytest.New(t, registrytest.Options{}), "")
	const writers = 8
	var keys []string
	var wg sync.WaitGroup
	for i := range writers {
		st := cachetest.NewStore(t)
		c := p.open(st)
		keys = append(keys, fmt.Sprint(i))
		save(t, c, fmt.Sprint(i), cachetest.Layer(t, st, fmt.Sprint("layer", i)))
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := c.Flush(context.Background()); err != nil {
				t.Error(err)
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	if got := p.has(keys...); len(got) != writers {
		t.Errorf("there are %v", got)
	}
}

// TestSlowWriter: one that read the cache before another wrote it does not take
// that away.
func TestSlowWriter(t *testing.T) {
	reg := registrytest.New(t, registrytest.Options{})
	p := inRegistry(t, reg, "")
	st := cachetest.NewStore(t)
	slow := p.open(st)
	if r, err := slow.Lookup(context.Background(), cachetest.Key("x")); r != nil || err != nil {
		t.Fatal(r, err)
	}
	quick := p.open(st)
	save(t, quick, "quick", cachetest.Layer(t, st, "quick"))
	flush(t, quick)
	save(t, slow, "slow", cachetest.Layer(t, st, "slow"))
	other := p.open(st)
	save(t, other, "other", cachetest.Layer(t, st, "other"))
	// other has found the cache as it was, and writes when slow has.
	held := make(chan struct{})
	reg.Fail(registrytest.Fault{Method: http.MethodPut, Path: "/manifests/", Times: 1, Serve: func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		<-held
		next.ServeHTTP(w, r)
	}})
	done := make(chan error)
	go func() { done <- other.Flush(context.Background()) }()
	for reg.Counts().Failed == 0 {
		time.Sleep(time.Millisecond)
	}
	slowDone := make(chan error)
	go func() { slowDone <- slow.Flush(context.Background()) }()
	for reg.Counts().ManifestPuts < 2 { // quick's and slow's
		time.Sleep(time.Millisecond)
	}
	close(held) // now other overwrites what slow has just written
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := <-slowDone; err != nil {
		t.Error(err)
	}
	if got := p.has("quick", "slow", "other"); len(got) != 3 {
		t.Errorf("there are %v", got)
	}
}

// TestWhatIsNoCache is not used, with a warning that says why; and overwritten only
// if it is a cache.
func TestWhatIsNoCache(t *testing.T) {
	blob := func(b string) ocispec.Descriptor {
		return ocispec.Descriptor{MediaType: "application/octet-stream", Digest: digest.FromString(b), Size: int64(len(b))}
	}
	manifest := func(mediaType, config string) any {
		d := blob(config)
		d.MediaType = mediaType
		return ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: d, Layers: []ocispec.Descriptor{}}
	}
	const bk = "application/vnd.buildkit.cacheconfig.v0"
	const emptyImage = `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[]}}`
	for _, c := range []struct {
		name      string
		doc       any
		config    string
		says      string
		overwrite bool
	}{
		{"BuildKit's", manifest(bk, "{}"), "{}", "written by BuildKit, whose keys are computed in another way", true},
		{"an image", manifest(ocispec.MediaTypeImageConfig, emptyImage), emptyImage, "an image without records", false},
		{
			"an image of BuildKit's", manifest(ocispec.MediaTypeImageConfig, emptyImage[:len(emptyImage)-1]+`,"moby.buildkit.cache.v0":"W10="}`),
			emptyImage[:len(emptyImage)-1] + `,"moby.buildkit.cache.v0":"W10="}`, "records of BuildKit's", false,
		},
		{"an artifact", manifest("application/vnd.example+json", "{}"), "{}", "neither a cache nor an image", false},
		{"of the future", manifest(remote.MediaType, `{"version":2}`), `{"version":2}`, "version 2", true},
		{"broken", manifest(remote.MediaType, `{"version`), `{"version`, "not valid JSON", true},
		{
			"out of range", manifest(remote.MediaType, `{"version":1,"records":[{"key":"`+string(cachetest.Key("k"))+`","layers":[0]}]}`),
			`{"version":1,"records":[{"key":"` + string(cachetest.Key("k")) + `","layers":[0]}]}`, "layers are not there", true,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			reg := registrytest.New(t, registrytest.Options{})
			p := inRegistry(t, reg, "")
			st := cachetest.NewStore(t)
			raw, err := json.Marshal(c.doc)
			if err != nil {
				t.Fatal(err)
			}
			put(t, p.reg, st, p.spec.Ref, raw, c.config)
			if got := p.has("k"); len(got) > 0 || !strings.Contains(p.warn.all(), c.says) || strings.Count(p.warn.all(), "\n") > 0 {
				t.Errorf("there is %v; warned of %q, want %q", got, p.warn.all(), c.says)
			}
			w := p.open(st)
			save(t, w, "k", cachetest.Layer(t, st, "one"))
			err = w.Flush(context.Background())
			if (err == nil) != c.overwrite {
				t.Errorf("writing: %v", err)
			}
			if got := p.has("k"); (len(got) > 0) != c.overwrite {
				t.Errorf("there is %v", got)
			}
		})
	}
}

// put pushes a document with its config.
func put(t *testing.T, reg *registry.Client, st *store.Store, ref string, raw []byte, config string) {
	t.Helper()
	ctx := context.Background()
	p, err := export.OpenPush(ctx, reg, st, reg, ref, nil)
	if err == nil {
		err = p.Blob(ctx, "", []byte(config))
	}
	var d struct{ MediaType string }
	if err == nil {
		err = json.Unmarshal(raw, &d)
	}
	if err == nil {
		_, err = p.Tag(ctx, ocispec.Descriptor{MediaType: d.MediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}, raw)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestLostBlobs: others' layers that the registry has lost do not keep a build from
// writing its own, and its own are sent again.
func TestLostBlobs(t *testing.T) {
	p := inDirectory(t, "")
	st := cachetest.NewStore(t)
	w := p.open(st)
	save(t, w, "theirs", cachetest.Layer(t, st, "theirs"))
	mine := cachetest.Layer(t, st, "mine")
	save(t, w, "mine", mine)
	flush(t, w)
	w = p.open(st)
	if r, err := w.Lookup(context.Background(), cachetest.Key("mine")); r == nil || err != nil {
		t.Fatal(r, err)
	}
	if err := filepath.WalkDir(filepath.Join(p.spec.Dir, "blobs"), func(name string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.HasPrefix(read(t, name), "{") {
			return err
		}
		return os.Remove(name)
	}); err != nil {
		t.Fatal(err)
	}
	save(t, w, "mine", mine)
	save(t, w, "new", cachetest.Layer(t, st, "new"))
	flush(t, w)
	if got := p.has("mine", "theirs", "new"); !slices.Equal(got, []string{"mine", "new"}) {
		t.Errorf("there are %v", got)
	}
	elsewhere := cachetest.NewStore(t)
	r, err := p.open(elsewhere).Lookup(context.Background(), cachetest.Key("mine"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := image.UnpackAll(context.Background(), elsewhere, r.Layers, fetcher{p.reg}, nil); err != nil {
		t.Error(err)
	}
}

// TestOnlyCopyLost: what is in the cache and nowhere else, and then not there either, goes.
func TestOnlyCopyLost(t *testing.T) {
	p := inDirectory(t, "")
	st := cachetest.NewStore(t)
	w := p.open(st)
	save(t, w, "lost", cachetest.Layer(t, st, "lost"))
	flush(t, w)
	elsewhere := cachetest.NewStore(t)
	w = p.open(elsewhere)
	r, err := w.Lookup(context.Background(), cachetest.Key("lost"))
	if r == nil || err != nil {
		t.Fatal(r, err)
	}
	if err := os.Remove(filepath.Join(p.spec.Dir, "blobs", "sha256", r.Layers[0].Blob.Digest.Encoded())); err != nil {
		t.Fatal(err)
	}
	if err := w.Save(context.Background(), cachetest.Key("lost"), *r); err != nil {
		t.Fatal(err)
	}
	save(t, w, "new", cachetest.Layer(t, elsewhere, "new"))
	flush(t, w)
	if got := p.has("lost", "new"); !slices.Equal(got, []string{"new"}) {
		t.Errorf("there are %v", got)
	}
}

// TestLostDocuments: a directory's cache whose manifest or records are gone or
// damaged is written anew.
func TestLostDocuments(t *testing.T) {
	for _, content := range []string{"", "{", "damaged"} {
		for _, which := range []string{"manifest", "config"} {
			p := inDirectory(t, "")
			st := cachetest.NewStore(t)
			w := p.open(st)
			save(t, w, "old", cachetest.Layer(t, st, "old"))
			flush(t, w)
			var idx ocispec.Index
			if err := json.Unmarshal([]byte(read(t, filepath.Join(p.spec.Dir, "index.json"))), &idx); err != nil {
				t.Fatal(err)
			}
			blob := func(d digest.Digest) string { return filepath.Join(p.spec.Dir, "blobs", "sha256", d.Encoded()) }
			doc := blob(idx.Manifests[0].Digest)
			if which == "config" {
				var m ocispec.Manifest
				if err := json.Unmarshal([]byte(read(t, doc)), &m); err != nil {
					t.Fatal(err)
				}
				doc = blob(m.Config.Digest)
			}
			if err := os.Remove(doc); err != nil {
				t.Fatal(err)
			}
			if content != "" {
				if err := os.WriteFile(doc, []byte(content), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if got := p.has("old"); len(got) > 0 || p.warn.all() == "" {
				t.Errorf("%s %q: there is %v; warned of %q", which, content, got, p.warn.all())
			}
			w = p.open(st)
			save(t, w, "new", cachetest.Layer(t, st, "new"))
			flush(t, w)
			if got := p.has("new"); len(got) != 1 {
				t.Errorf("%s %q: there is %v", which, content, got)
			}
		}
	}
}

// TestRepair: a blob that a build found damaged is written again.
func TestRepair(t *testing.T) {
	p := inDirectory(t, "")
	st := cachetest.NewStore(t)
	l := cachetest.Layer(t, st, "content")
	w := p.open(st)
	save(t, w, "k", l)
	flush(t, w)
	w = p.open(st)
	r, err := w.Lookup(context.Background(), cachetest.Key("k"))
	if r == nil || err != nil {
		t.Fatal(r, err)
	}
	blob := filepath.Join(p.spec.Dir, "blobs", "sha256", r.Layers[0].Blob.Digest.Encoded())
	good := read(t, blob)
	if err := os.WriteFile(blob, []byte(strings.Repeat("x", len(good))), 0o644); err != nil {
		t.Fatal(err)
	}
	w.Doubt(r.Layers[0])
	save(t, w, "k", l)
	flush(t, w)
	if read(t, blob) != good {
		t.Error("it is still damaged")
	}
}

// TestRegistryLostBlobs is the same where the registry refuses the manifest.
func TestRegistryLostBlobs(t *testing.T) {
	reg := registrytest.New(t, registrytest.Options{})
	p := inRegistry(t, reg, "")
	st := cachetest.NewStore(t)
	w := p.open(st)
	save(t, w, "theirs", cachetest.Layer(t, st, "theirs"))
	flush(t, w)
	reg.Fail(registrytest.Fault{Method: http.MethodPut, Path: "/manifests/", Times: 1, Status: 400, Body: `{"errors":[{"code":"MANIFEST_BLOB_UNKNOWN","message":"blob unknown"}]}`})
	w = p.open(st)
	save(t, w, "mine", cachetest.Layer(t, st, "mine"))
	flush(t, w)
	if got := p.has("mine", "theirs"); !slices.Equal(got, []string{"mine"}) {
		t.Errorf("there are %v", got)
	}
}

// TestDirectoryIsShared with an image of another name, and with what is no layout not at all.
func TestDirectoryIsShared(t *testing.T) {
	p := inDirectory(t, "")
	st := cachetest.NewStore(t)
	w := p.open(st)
	save(t, w, "k", cachetest.Layer(t, st, "one"))
	flush(t, w)
	other := p
	other.spec.Tag = "other"
	w = other.open(st)
	save(t, w, "k2", cachetest.Layer(t, st, "two"))
	flush(t, w)
	if p.has("k", "k2")[0] != "k" || other.has("k", "k2")[0] != "k2" {
		t.Error("the tags are not kept apart")
	}
	foreign := inDirectory(t, "")
	if err := os.MkdirAll(foreign.spec.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(foreign.spec.Dir, "precious"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	w = foreign.open(st)
	save(t, w, "k", cachetest.Layer(t, st, "one"))
	if err := w.Flush(context.Background()); err == nil || !strings.Contains(err.Error(), "not an OCI layout") {
		t.Error(err)
	}
	if es, err := os.ReadDir(foreign.spec.Dir); err != nil || len(es) != 1 {
		t.Error(es, err)
	}
}

// TestLeftovers of writers that were killed go with the next one that ends.
func TestLeftovers(t *testing.T) {
	p := inDirectory(t, "")
	st := cachetest.NewStore(t)
	killed := p.open(st)
	save(t, killed, "never", cachetest.Layer(t, st, "never named"))
	dir := filepath.Join(p.spec.Dir, "blobs", "sha256")
	count := func() (n int) {
		names, err := filepath.Glob(filepath.Join(dir, "*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(names)
	}
	for count() == 0 { // it is sent in the background
		time.Sleep(time.Millisecond)
	}
	w := p.open(st)
	save(t, w, "k", cachetest.Layer(t, st, "one"))
	flush(t, w)
	if err := os.WriteFile(filepath.Join(dir, ".kiln-tmp-123"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if n := count(); n != 5 { // while the other one may still name its own
		t.Errorf("%d files", n)
	}
	if err := killed.Close(); err != nil { // as its end does
		t.Fatal(err)
	}
	if n := count(); n != 3 {
		t.Errorf("%d files are left", n)
	}
	if got := p.has("k", "never"); !slices.Equal(got, []string{"k"}) {
		t.Errorf("there are %v", got)
	}
}

// TestNoSecrets: a record has keys, digests and times, and names no place.
func TestNoSecrets(t *testing.T) {
	p := inDirectory(t, "")
	st := cachetest.NewStore(t)
	base := cachetest.Layer(t, st, "base")
	base.Created, base.Origin = time.Time{}, "secret.example/base"
	base.Blob = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromString("x"), Size: 1, URLs: []string{"https://user:pass@secret.example"}}
	w := p.open(st)
	save(t, w, "k", base, cachetest.Layer(t, st, "top"))
	flush(t, w)
	for _, name := range []string{"index.json", "oci-layout"} {
		if s := read(t, filepath.Join(p.spec.Dir, name)); strings.Contains(s, "secret") {
			t.Errorf("%s: %s", name, s)
		}
	}
	es, err := os.ReadDir(filepath.Join(p.spec.Dir, "blobs", "sha256"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range es {
		if s := read(t, filepath.Join(p.spec.Dir, "blobs", "sha256", e.Name())); strings.Contains(s, "secret") {
			t.Errorf("%s: %s", e.Name(), s)
		}
	}
}

// TestSameBytes: the same results make the same cache, whoever writes it.
func TestSameBytes(t *testing.T) {
	var all []string
	for range 2 {
		p := inDirectory(t, "")
		p.now = func() time.Time { return time.Unix(1900000000, 0) }
		st := cachetest.NewStore(t)
		w := p.open(st)
		for i := range 9 {
			save(t, w, fmt.Sprint(i), cachetest.Layer(t, st, fmt.Sprint("layer", i)))
		}
		flush(t, w)
		all = append(all, read(t, filepath.Join(p.spec.Dir, "index.json")))
	}
	if all[0] != all[1] {
		t.Errorf("%s\n%s", all[0], all[1])
	}
}
