package gc_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/cache/cachetest"
	"github.com/kiln-build/kiln/internal/cachemount"
	"github.com/kiln-build/kiln/internal/gc"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/store"
)

// world is a store with a chain of three results, an image that has the first two, and a
// cache mount.
type world struct {
	st     *store.Store
	layers []image.Layer
}

func newWorld(t *testing.T) world {
	t.Helper()
	w := world{st: cachetest.NewStore(t)}
	ctx := context.Background()
	local := cache.NewLocal(w.st)
	for i := range 3 {
		l := cachetest.Layer(t, w.st, strings.Repeat(fmt.Sprint(i), 10_000*(i+1)))
		if l, err := image.Pack(ctx, w.st, l, layer.Gzip, 0); err != nil {
			t.Fatal(err)
		} else {
			w.layers = append(w.layers, l)
		}
		if err := local.Save(ctx, cachetest.Key(fmt.Sprint(i)), cache.Record{Layers: w.layers}); err != nil {
			t.Fatal(err)
		}
	}
	opt := image.AssembleOptions{Config: []byte(`{"os":"linux","architecture":"amd64"}`)}
	for _, l := range w.layers[:2] {
		opt.Layers = append(opt.Layers, image.NewLayer{Layer: l})
	}
	img, err := image.Assemble(opt)
	if err == nil {
		var d ocispec.Descriptor
		if d, err = image.Keep(w.st, img); err == nil {
			err = image.Tag(w.st, d, "app:1")
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	mounts := cachemount.New(w.st)
	base, err := mounts.Empty(ctx)
	if err != nil {
		t.Fatal(err)
	}
	m, err := mounts.Acquire(ctx, cachemount.Key{ID: "go"}, cachemount.Shared, []image.Layer{base}, func() {})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Add(ctx, cachetest.Layer(t, w.st, strings.Repeat("mount", 5000))); err != nil {
		t.Fatal(err)
	}
	m.Release()
	return w
}

func id(d digest.Digest) string { return d.Encoded()[:25] }

func (w world) list(t *testing.T, filter ...string) map[string]gc.Item {
	t.Helper()
	all, err := gc.List(context.Background(), w.st, filter...)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]gc.Item{}
	for _, i := range all {
		out[i.ID] = i
	}
	return out
}

// left are the numbers of the layers that are there, and "mount".
func (w world) left(t *testing.T) (out []string) {
	t.Helper()
	for i, l := range w.layers {
		if w.st.HasLayer(l.DiffID) {
			out = append(out, fmt.Sprint(i))
		}
	}
	ms, err := cachemount.New(w.st).List(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for range ms {
		out = append(out, "mount")
	}
	return out
}

func TestList(t *testing.T) {
	w := newWorld(t)
	all := w.list(t)
	for i, l := range w.layers {
		it := all[id(l.DiffID)]
		if it.Type != gc.Regular || it.Shared != (i < 2) || it.InUse || it.Mutable || it.Size < int64(10_000*(i+1)) || !it.Created.Equal(l.Created) {
			t.Errorf("layer %d: %+v", i, it)
		}
		if want := i > 0; want != (len(it.Parents) == 1) || want && it.Parents[0] != id(w.layers[i-1].DiffID) {
			t.Errorf("layer %d: parents %v", i, it.Parents)
		}
		if time.Since(it.Used) > time.Minute {
			t.Errorf("layer %d was used %v", i, it.Used)
		}
	}
	var total int64
	n := map[string]int{}
	for _, i := range all {
		n[i.Type]++
		total += i.Size
	}
	if n[gc.Regular] != 3 || n[gc.CacheMount] != 1 || n[gc.Internal] != 2 {
		t.Errorf("%v", n)
	}
	u, err := w.st.Usage(context.Background())
	if err != nil || total != u.Blobs.Bytes+u.Layers.Bytes {
		t.Errorf("items are %d bytes, the store's content %d (%v)", total, u.Blobs.Bytes+u.Layers.Bytes, err)
	}
	for filter, want := range map[string]int{
		"type==regular": 3, "type!=regular": 3, "type==exec.cachemount": 1, "shared": 4, "private": 2, "mutable": 1, "immutable": 5, "inuse": 0,
		"id~=" + id(w.layers[1].DiffID)[:8]: 1, "parents==" + id(w.layers[1].DiffID): 1, `description~="\"go\""`: 1, "type==regular,private": 1, "nosuch": 0,
	} {
		if got := w.list(t, filter); len(got) != want {
			t.Errorf("%s: %d items, want %d: %v", filter, len(got), want, got)
		}
	}
	if _, err := gc.List(context.Background(), w.st, "type=="); err == nil {
		t.Error("a filter that makes no sense is taken")
	}
	release, err := w.st.Use(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	if !w.st.HasLayer(w.layers[2].DiffID) {
		t.Fatal("no layer")
	}
	if got := w.list(t, "inuse"); !got[id(w.layers[2].DiffID)].InUse {
		t.Errorf("in use: %v", got)
	}
}

func TestPrune(t *testing.T) {
	for _, c := range []struct {
		name string
		opt  gc.Options
		gone int // items
		left string
	}{
		{"all", gc.Options{}, 2, "[0 1]"},
		{"dry", gc.Options{DryRun: true}, 2, "[0 1 2 mount]"},
		{"mounts", gc.Options{Filter: []string{"type==exec.cachemount"}}, 1, "[0 1 2]"},
		{"all but mounts", gc.Options{Filter: []string{"type!=exec.cachemount"}}, 1, "[0 1 mount]"},
		{"what an image has", gc.Options{Filter: []string{"shared"}}, 0, "[0 1 2 mount]"},
		{"what no image has", gc.Options{Filter: []string{"private"}}, 2, "[0 1]"},
		{"what was just used", gc.Options{KeepFor: time.Hour}, 0, "[0 1 2 mount]"},
		{"room enough", gc.Options{Limit: store.Limit{MaxUsed: 1 << 30}}, 0, "[0 1 2 mount]"},
		{"no room", gc.Options{Limit: store.Limit{MaxUsed: 1}}, 2, "[0 1]"},
		{"no room for mounts", gc.Options{Limit: store.Limit{MaxUsed: 1}, Filter: []string{"mutable"}}, 1, "[0 1 2]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			rep, err := gc.Prune(context.Background(), w.st, c.opt)
			if err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprint(w.left(t)); got != c.left || len(rep.Items) != c.gone {
				t.Errorf("leaves %s, want %s; says %+v are gone", got, c.left, rep.Items)
			}
			if (rep.Bytes > 0) != (c.gone > 0) && c.name != "what an image has" {
				t.Errorf("%d bytes", rep.Bytes)
			}
		})
	}
}

// TestPruneOne: a layer goes by its ID, unless another one is built on it.
func TestPruneOne(t *testing.T) {
	for i, want := range []string{"[0 1 2]", "[0 1 2]", "[0 1]"} {
		w := newWorld(t)
		if err := w.st.DeleteTag("docker.io/library/app:1"); err != nil {
			t.Fatal(err)
		}
		rep, err := gc.Prune(context.Background(), w.st, gc.Options{Filter: []string{"id==" + id(w.layers[i].DiffID)}})
		if err != nil {
			t.Fatal(err)
		}
		left := slices.DeleteFunc(w.left(t), func(s string) bool { return s == "mount" })
		if got := fmt.Sprint(left); got != want {
			t.Errorf("without layer %d there are %s, want %s (%+v)", i, got, want, rep)
		}
	}
}
