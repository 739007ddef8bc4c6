package store

import (
	"context"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// putImage stores an image of one layer in both forms, and returns its index.
func putImage(t testing.TB, s *Store, name string) (index ocispec.Descriptor, all []digest.Digest, diffID digest.Digest) {
	t.Helper()
	diffID = putLayer(t, s, "tar of "+name)
	blob := must(s.PutBlob([]byte("compressed " + name)))(t)
	config := must(s.PutBlob([]byte(fmt.Sprintf("\n {%q:{%q:[%q]}}", "rootfs", "diff_ids", diffID))))(t)
	manifest := must(s.PutBlob([]byte(fmt.Sprintf(`{"config":{"digest":%q},"layers":[{"digest":%q}]}`, config, blob))))(t)
	d := must(s.PutBlob([]byte(fmt.Sprintf(`{"manifests":[{"digest":%q}]}`, manifest))))(t)
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: d}, []digest.Digest{blob, config, manifest, d}, diffID
}

func (s *Store) age(t testing.TB, age time.Duration) {
	t.Helper()
	old := time.Now().Add(-age)
	for _, dir := range []string{dirBlobs, dirLayers, dirRecords, dirTags} {
		if err := eachFile(s.path(dir), func(p string, _ os.FileInfo) error { return os.Chtimes(p, old, old) }); err != nil {
			t.Fatal(err)
		}
	}
}

func there(s *Store, ds ...digest.Digest) (n int) {
	for _, d := range ds {
		if _, err := s.StatBlob(d); err == nil {
			n++
		}
	}
	return n
}

func TestPruneFollowsTags(t *testing.T) {
	s, ctx := open(t), context.Background()
	kept, keptBlobs, keptLayer := putImage(t, s, "kept")
	_, goneBlobs, goneLayer := putImage(t, s, "gone")
	if err := s.SetTag("kept", kept); err != nil {
		t.Fatal(err)
	}
	dry := must(s.Prune(ctx, PruneOptions{DryRun: true}))(t)
	if there(s, goneBlobs...) != 4 || !s.HasLayer(goneLayer) {
		t.Fatal("a dry run has removed something")
	}
	rep := must(s.Prune(ctx, PruneOptions{}))(t)
	if !reflect.DeepEqual(rep, dry) || len(rep.Gone) != 5 || rep.Blobs != 4 || rep.Layers != 1 || rep.Bytes == 0 {
		t.Fatalf("pruned %+v, announced %+v", rep, dry)
	}
	if there(s, keptBlobs...) != 4 || !s.HasLayer(keptLayer) {
		t.Error("prune took what a tag needs")
	}
	if there(s, goneBlobs...) != 0 || s.HasLayer(goneLayer) {
		t.Error("prune left what nothing needs")
	}
	if err := s.DeleteTag("kept"); err != nil {
		t.Fatal(err)
	}
	must(s.Prune(ctx, PruneOptions{}))(t)
	u := must(s.Usage(ctx))(t)
	if u.Total() != 0 || u.Blobs.Count+u.Layers.Count+u.Tags.Count+u.Temp.Count != 0 {
		t.Errorf("left in the store: %+v", u)
	}
}

func TestPruneRecords(t *testing.T) {
	s, ctx := open(t), context.Background()
	var layers []digest.Digest
	for i := range 4 {
		d := putLayer(t, s, strings.Repeat(fmt.Sprint(i), 100_000))
		layers = append(layers, d)
		if err := s.PutRecord("step", fmt.Sprint(i), []byte(`{"layer":"`+string(d)+`"}`)); err != nil {
			t.Fatal(err)
		}
		used := time.Now().Add(-time.Duration(i) * 24 * time.Hour)
		os.Chtimes(must(s.recordPath("step", fmt.Sprint(i)))(t), used, used)
	}
	alive := func() (n int) {
		for _, d := range layers {
			if exists(s.LayerPath(d)) {
				n++
			}
		}
		return n
	}
	for _, c := range []struct {
		opt  PruneOptions
		want int
	}{
		{PruneOptions{KeepFor: 1000 * time.Hour}, 4},
		{PruneOptions{Limit: Limit{MaxUsed: 1 << 30}}, 4},
		{PruneOptions{KeepFor: 60 * time.Hour}, 3},
		{PruneOptions{KeepFor: 60 * time.Hour, Limit: Limit{MaxUsed: 250_000}}, 2},
		{PruneOptions{Limit: Limit{MaxUsed: 150_000}}, 1},
		{PruneOptions{}, 0},
	} {
		must(s.Prune(ctx, c.opt))(t)
		if got := alive(); got != c.want {
			t.Errorf("%+v leaves %d layers, want %d", c.opt, got, c.want)
		}
		n := 0
		s.Records("step", func(string, time.Time) error { n++; return nil })
		if n != c.want {
			t.Errorf("%+v leaves %d records, want %d", c.opt, n, c.want)
		}
	}
}

// A record that is used again counts as new.
func TestUseRenewsRecords(t *testing.T) {
	s, ctx := open(t), context.Background()
	for _, k := range []string{"a", "b"} {
		if err := s.PutRecord("step", k, nil); err != nil {
			t.Fatal(err)
		}
	}
	s.age(t, 100*time.Hour)
	must(s.GetRecord("step", "a"))(t)
	rep := must(s.Prune(ctx, PruneOptions{KeepFor: time.Hour}))(t)
	if rep.Records != 1 {
		t.Fatalf("pruned %+v", rep)
	}
	must(s.GetRecord("step", "a"))(t)
}

// A link keeps nothing, and goes with its key; while that is needed, so is
// what the link mentions.
func TestPruneLinks(t *testing.T) {
	s, ctx := open(t), context.Background()
	l1, l2 := putLayer(t, s, "one"), putLayer(t, s, "two")
	b1 := must(s.PutBlob([]byte("compressed one")))(t)
	b2 := must(s.PutBlob([]byte("compressed two")))(t)
	s.PutRecord("link-pack", string(l1), []byte(b1))
	s.PutRecord("link-pack", string(l2), []byte(b2))
	s.PutRecord("step", "one", []byte(l1))
	must(s.Prune(ctx, PruneOptions{KeepFor: time.Hour}))(t)
	if !s.HasLayer(l1) || there(s, b1) != 1 {
		t.Error("what the needed layer links to is gone")
	}
	if s.HasLayer(l2) || there(s, b2) != 0 {
		t.Error("a link has kept its layer alive")
	}
	_, err := s.GetRecord("link-pack", string(l2))
	wantMissing(t, err)
	must(s.GetRecord("link-pack", string(l1)))(t)
}

// Documents that name each other, or themselves, are no endless walk.
func TestPruneHostileDocuments(t *testing.T) {
	s, ctx := open(t), context.Background()
	var b strings.Builder
	b.WriteString("{")
	for i := range 20_000 {
		b.WriteString(string(digest.FromString(fmt.Sprint(i))))
	}
	d := must(s.PutBlob([]byte(b.String())))(t)
	s.SetTag("x", ocispec.Descriptor{Digest: d})
	s.PutRecord("link-x", string(d), []byte(d))
	rep := must(s.Prune(ctx, PruneOptions{KeepFor: time.Hour}))(t)
	if rep.Blobs != 0 || rep.Records != 0 {
		t.Fatalf("pruned %+v", rep)
	}
}

// Tagging what a Prune is just about to remove keeps it.
func TestTagDuringPrune(t *testing.T) {
	s := open(t)
	d, blobs, layer := putImage(t, s, "image")
	s.age(t, time.Hour)
	inv := must(s.inventory())(t)
	if err := s.SetTag("late", d); err != nil {
		t.Fatal(err)
	}
	n := 0
	if err := s.sweep(context.Background(), append(values(inv.blobs), values(inv.layers)...), false, func(*object) { n++ }); err != nil {
		t.Fatal(err)
	}
	if n != 0 || there(s, blobs...) != 4 || !s.HasLayer(layer) {
		t.Errorf("%d objects of the image were removed", n)
	}
}

// What a build finds after the inventory stays, though the Prune did not know
// of that build.
func TestUseDuringPrune(t *testing.T) {
	s := open(t)
	d := must(s.PutBlob([]byte("found")))(t)
	lost := must(s.PutBlob([]byte("not found")))(t)
	inv := must(s.inventory())(t)
	build := must(Open(s.Root()))(t)
	defer must(build.Use(context.Background()))(t)()
	must(build.StatBlob(d))(t)
	n := 0
	if err := s.sweep(context.Background(), values(inv.blobs), false, func(*object) { n++ }); err != nil {
		t.Fatal(err)
	}
	if n != 1 || there(s, d) != 1 || there(s, lost) != 0 {
		t.Errorf("%d objects were removed; found: %d", n, there(s, d))
	}
}

func FuzzRecord(f *testing.F) {
	s := must(Open(f.TempDir()))(f)
	s.PutRecord("k", "key", []byte("content"))
	f.Add(must(os.ReadFile(must(s.recordPath("k", "key"))(f)))(f))
	f.Add([]byte(recordMagic + "\xff\xff\xff\xff\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		key, b, err := parseRecord(raw)
		if err == nil && len(key)+len(b)+recordFrame+32 != len(raw) {
			t.Fatalf("a record of %d bytes gave %d and %d", len(raw), len(key), len(b))
		}
	})
}
