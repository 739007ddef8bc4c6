// Package cachetest is what every kind of cache has to do: one suite that all
// implementations of cache.Index run.
package cachetest

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/kiln-build/kiln/internal/tree"
)

// Backend is one place for a cache, empty at first.
type Backend struct {
	// Open opens the cache. What was saved into an index and flushed is found by those that
	// are opened afterwards. st has the layers that are saved.
	Open func(t *testing.T, st *store.Store) (idx cache.Index, flush func(ctx context.Context) error)
	// Fetcher gets layers that records name.
	Fetcher image.Fetcher
	// Prefix says that all records are of one image's first layers.
	Prefix bool
}

// Run checks one kind of cache. make makes a new place for each test.
func Run(t *testing.T, make func(t *testing.T) Backend) {
	for name, test := range map[string]func(*testing.T, Backend){
		"empty": testEmpty, "saved is found": testSaved, "layers can be fetched": testLayers, "base layers": testBase,
		"replaced": testReplaced, "several writers": testWriters, "at once": testConcurrent, "mine to change": testCopies,
	} {
		t.Run(name, func(t *testing.T) { test(t, make(t)) })
	}
}

// NewStore is an empty store.
func NewStore(t *testing.T) *store.Store {
	t.Helper()
	st, err := store.Open(filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// Layer is a new layer of one file, as a build makes it.
func Layer(t *testing.T, st *store.Store, content string) image.Layer {
	t.Helper()
	l, err := image.Commit(context.Background(), st, image.CommitOptions{}, func(w io.Writer) error {
		tw := layer.NewTarWriter(w)
		n := tree.Node{Mode: tree.ModeRegular | 0o644, Size: int64(len(content)), MTime: time.Unix(1600000000, 5000)}
		err := tw.Add("file", n, "", func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(content)), nil })
		if err != nil {
			return err
		}
		return tw.Close()
	})
	if err != nil {
		t.Fatal(err)
	}
	l.Created = time.Date(2024, 5, 6, 7, 8, 9, 123456789, time.UTC)
	return l
}

// Key is a key.
func Key(s string) digest.Digest { return digest.FromString("key " + s) }

func (b Backend) save(t *testing.T, st *store.Store, records map[string]cache.Record) {
	t.Helper()
	idx, flush := b.Open(t, st)
	for k, r := range records {
		if err := idx.Save(context.Background(), Key(k), r); err != nil {
			t.Fatal(err)
		}
	}
	if err := flush(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func lookup(t *testing.T, idx cache.Reader, k string) *cache.Record {
	t.Helper()
	r, err := idx.Lookup(context.Background(), Key(k))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// find looks a key up in the cache as it is for others.
func (b Backend) find(t *testing.T, k string) *cache.Record {
	t.Helper()
	idx, _ := b.Open(t, NewStore(t))
	return lookup(t, idx, k)
}

func diffIDs(r *cache.Record) []digest.Digest {
	var out []digest.Digest
	for _, l := range r.Layers {
		out = append(out, l.DiffID)
	}
	return out
}

func testEmpty(t *testing.T, b Backend) {
	if r := b.find(t, "nosuch"); r != nil {
		t.Errorf("an empty cache has %+v", r)
	}
}

func testSaved(t *testing.T, b Backend) {
	st := NewStore(t)
	one, two := Layer(t, st, "one"), Layer(t, st, "two")
	b.save(t, st, map[string]cache.Record{
		"none": {}, "one": {Layers: []image.Layer{one}}, "both": {Layers: []image.Layer{one, two}, Content: Key("content")},
	})
	for k, want := range map[string][]image.Layer{"none": {}, "one": {one}, "both": {one, two}, "content": {one, two}} {
		r := b.find(t, k)
		if r == nil {
			t.Errorf("%s is not found", k)
			continue
		}
		if len(r.Layers) != len(want) {
			t.Errorf("%s has %d layers, want %d", k, len(r.Layers), len(want))
			continue
		}
		for i, l := range r.Layers {
			if l.DiffID != want[i].DiffID || !l.Created.Equal(want[i].Created) || !l.Newest.Equal(want[i].Newest) {
				t.Errorf("%s: layer %d is %+v, want %+v", k, i, l, want[i])
			}
		}
		if got := r.Content; k == "both" && got != Key("content") || k == "content" && got != "" {
			t.Errorf("%s: the key by content is %q", k, got)
		}
	}
	if r := b.find(t, "nosuch"); r != nil {
		t.Errorf("found %+v", r)
	}
}

func testLayers(t *testing.T, b Backend) {
	st := NewStore(t)
	one, two := Layer(t, st, "one"), Layer(t, st, "two")
	b.save(t, st, map[string]cache.Record{"k": {Layers: []image.Layer{one, two}}})
	elsewhere := NewStore(t)
	idx, _ := b.Open(t, elsewhere)
	r := lookup(t, idx, "k")
	if r == nil {
		t.Fatal("not found")
	}
	if b.Fetcher == nil {
		return // of the store that has the layers
	}
	if _, err := image.UnpackAll(context.Background(), elsewhere, r.Layers, b.Fetcher, nil); err != nil {
		t.Fatal(err)
	}
	for i, l := range r.Layers {
		if !elsewhere.HasLayer(l.DiffID) {
			t.Errorf("layer %d did not come", i)
		}
	}
}

// testBase: the layers of base images are named; they need not be had from the cache.
func testBase(t *testing.T, b Backend) {
	st := NewStore(t)
	base, top := Layer(t, st, "base"), Layer(t, st, "top")
	base.Created = time.Time{}
	base.Origin = "elsewhere.example/base"
	b.save(t, st, map[string]cache.Record{"k": {Layers: []image.Layer{base, top}}})
	r := b.find(t, "k")
	if r == nil || !slices.Equal(diffIDs(r), []digest.Digest{base.DiffID, top.DiffID}) {
		t.Fatalf("got %+v", r)
	}
	if r.Layers[0].Built() || !r.Layers[1].Built() {
		t.Errorf("which layers are built: %+v", r.Layers)
	}
}

func testReplaced(t *testing.T, b Backend) {
	st := NewStore(t)
	one, two := Layer(t, st, "one"), Layer(t, st, "two")
	b.save(t, st, map[string]cache.Record{"k": {Layers: []image.Layer{one}}})
	b.save(t, st, map[string]cache.Record{"k": {Layers: []image.Layer{two}}})
	if r := b.find(t, "k"); r == nil || !slices.Equal(diffIDs(r), []digest.Digest{two.DiffID}) {
		t.Errorf("got %+v, want %v", r, two.DiffID)
	}
}

// testWriters: one after the other; the second adds to what the first has written.
func testWriters(t *testing.T, b Backend) {
	if b.Prefix {
		t.Skip("an image has the records of the build that made it")
	}
	for i := range 3 {
		st := NewStore(t)
		b.save(t, st, map[string]cache.Record{fmt.Sprint(i): {Layers: []image.Layer{Layer(t, st, fmt.Sprint(i))}}})
	}
	for i := range 3 {
		if b.find(t, fmt.Sprint(i)) == nil {
			t.Errorf("%d is not found", i)
		}
	}
}

// testConcurrent is for the race detector, and for writers at the same time.
func testConcurrent(t *testing.T, b Backend) {
	st := NewStore(t)
	var layers []image.Layer
	for i := range 8 {
		layers = append(layers, Layer(t, st, fmt.Sprint("layer ", i)))
	}
	writers := 3
	if b.Prefix {
		writers = 1
	}
	var wg sync.WaitGroup
	for w := range writers {
		idx, flush := b.Open(t, st)
		wg.Add(1)
		go func() {
			defer wg.Done()
			var steps sync.WaitGroup
			for i := range layers {
				steps.Add(2)
				go func() {
					defer steps.Done()
					if err := idx.Save(context.Background(), Key(fmt.Sprint(w, i)), cache.Record{Layers: layers[:i+1]}); err != nil {
						t.Error(err)
					}
				}()
				go func() {
					defer steps.Done()
					if _, err := idx.Lookup(context.Background(), Key(fmt.Sprint(w, i))); err != nil {
						t.Error(err)
					}
				}()
			}
			steps.Wait()
			if err := flush(context.Background()); err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	idx, _ := b.Open(t, NewStore(t))
	for w := range writers {
		for i := range layers {
			if r := lookup(t, idx, fmt.Sprint(w, i)); r == nil || len(r.Layers) != i+1 {
				t.Errorf("of writer %d, %d is %+v", w, i, r)
			}
		}
	}
}

// testCopies: a record is the caller's, who may change it.
func testCopies(t *testing.T, b Backend) {
	st := NewStore(t)
	one := Layer(t, st, "one")
	b.save(t, st, map[string]cache.Record{"k": {Layers: []image.Layer{one}}})
	idx, _ := b.Open(t, st)
	r := lookup(t, idx, "k")
	if r == nil {
		t.Fatal("not found")
	}
	r.Layers[0] = image.Layer{}
	if again := lookup(t, idx, "k"); again.Layers[0].DiffID != one.DiffID {
		t.Error("a caller changed the cache's own record")
	}
}
