package cache_test

import (
	"context"
	"io/fs"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/cache/cachetest"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/store"
)

// TestFraming: no two sequences of values give one key.
func TestFraming(t *testing.T) {
	seen := map[digest.Digest]int{}
	for i, fill := range []func(h *cache.Hasher){
		func(*cache.Hasher) {},
		func(h *cache.Hasher) { h.String("") },
		func(h *cache.Hasher) { h.Bytes(nil) },
		func(h *cache.Hasher) { h.Strings(nil) },
		func(h *cache.Hasher) { h.Strings([]string{""}) },
		func(h *cache.Hasher) { h.Int(0) },
		func(h *cache.Hasher) { h.Int(-1) },
		func(h *cache.Hasher) { h.Int(1) },
		func(h *cache.Hasher) { h.Bool(false) },
		func(h *cache.Hasher) { h.Bool(true) },
		func(h *cache.Hasher) { h.String("ab") },
		func(h *cache.Hasher) { h.Bytes([]byte("ab")) },
		func(h *cache.Hasher) { h.String("a"); h.String("b") },
		func(h *cache.Hasher) { h.Strings([]string{"a", "b"}) },
		func(h *cache.Hasher) { h.Strings([]string{"a"}); h.String("b") },
		func(h *cache.Hasher) { h.Strings([]string{"a"}); h.Strings([]string{"b"}) },
		func(h *cache.Hasher) { h.String("as\x00\x00\x00\x00\x00\x00\x00\x01b") },
	} {
		h := cache.NewHasher("x", 1)
		fill(h)
		k := h.Key()
		if j, ok := seen[k]; ok {
			t.Errorf("%d and %d give one key", j, i)
		}
		seen[k] = i
	}
	if cache.NewHasher("x", 1).Key() == cache.NewHasher("x", 2).Key() || cache.NewHasher("x", 1).Key() == cache.NewHasher("y", 1).Key() {
		t.Error("kind or version is not in the key")
	}
}

type records map[string][]byte

func (r records) GetRecord(kind, key string) ([]byte, error) {
	if b, ok := r[kind+" "+key]; ok {
		return b, nil
	}
	return nil, fs.ErrNotExist
}

func (r records) PutRecord(kind, key string, b []byte) error {
	r[kind+" "+key] = b
	return nil
}

// TestLocal: what was saved is found, and what makes no sense is not there.
func TestLocal(t *testing.T) {
	ctx, r, key := context.Background(), records{}, digest.FromString("k")
	l := cache.NewLocal(r)
	if got, err := l.Lookup(ctx, key); got != nil || err != nil {
		t.Error(got, err)
	}
	d := digest.FromString("layer")
	want := image.Layer{DiffID: d, Blob: ocispec.Descriptor{Digest: d, Size: 5}, Origin: "r.example/a"}
	if err := l.Save(ctx, key, cache.Record{Layers: []image.Layer{want}}); err != nil {
		t.Fatal(err)
	}
	if got, err := l.Lookup(ctx, key); err != nil || len(got.Layers) != 1 || got.Layers[0].DiffID != d || got.Layers[0].Origin != want.Origin {
		t.Error(got, err)
	}
	good := string(r["cache "+key.String()])
	for _, bad := range []string{
		"", "null x", "[]", `{"layers":[{}]}`, `{"layers":[{"diffID":"sha256:../../x"}]}`, strings.Replace(good, `"size":5`, `"size":-5`, 1),
		strings.Replace(good, d.String()+`","size`, `x","size`, 1),
	} {
		r["cache "+key.String()] = []byte(bad)
		if got, err := l.Lookup(ctx, key); got != nil || err != nil {
			t.Errorf("%s: %+v %v", bad, got, err)
		}
	}
}

func TestLocalConformance(t *testing.T) {
	cachetest.Run(t, func(t *testing.T) cachetest.Backend {
		l := cache.NewLocal(cachetest.NewStore(t))
		return cachetest.Backend{Open: func(*testing.T, *store.Store) (cache.Index, func(context.Context) error) {
			return l, func(context.Context) error { return nil }
		}}
	})
}
