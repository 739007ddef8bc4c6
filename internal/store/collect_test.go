package store

import (
	"context"
	"fmt"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

func TestLimit(t *testing.T) {
	for _, c := range []struct {
		l                 Limit
		total, free, want int64
	}{
		{Limit{MaxUsed: 10}, 100, 5, 10},
		{Limit{MaxUsed: 10, Reserved: 20}, 100, 5, 20},
		{Limit{Reserved: 20}, 100, 5, 20},
		{Limit{MinFree: 30}, 100, 50, 100}, // there is enough
		{Limit{MinFree: 30}, 100, 10, 80},  // 20 are missing
		{Limit{MinFree: 3000}, 100, 10, 1}, // more than there is
		{Limit{MinFree: 30, MaxUsed: 90}, 100, 10, 80},
		{Limit{MinFree: 30, MaxUsed: 70}, 100, 10, 70},
		{Limit{MinFree: 30, MaxUsed: 70, Reserved: 75}, 100, 10, 75},
		{Limit{MinFree: 30, MaxUsed: 70}, 100, 50, 70},
	} {
		if got := c.l.bytes(c.total, c.free); got != c.want {
			t.Errorf("%+v of %d, %d free: %d, want %d", c.l, c.total, c.free, got, c.want)
		}
	}
}

// aged is a store with n layers of 100 kB, each kept by a record that was used so many
// days ago as its number.
func aged(t *testing.T, n int) (*Store, []digest.Digest) {
	t.Helper()
	s := open(t)
	var layers []digest.Digest
	for i := range n {
		d := putLayer(t, s, strings.Repeat(fmt.Sprint(i), 100_000))
		layers = append(layers, d)
		kind := "even"
		if i%2 == 1 {
			kind = "odd"
		}
		if err := s.PutRecord(kind, fmt.Sprint(i), []byte(`{"layer":"`+string(d)+`"}`)); err != nil {
			t.Fatal(err)
		}
		used := time.Now().Add(-time.Duration(i) * 24 * time.Hour)
		if err := os.Chtimes(must(s.recordPath(kind, fmt.Sprint(i)))(t), used, used); err != nil {
			t.Fatal(err)
		}
	}
	return s, layers
}

func left(s *Store, layers []digest.Digest) (n []int) {
	for i, d := range layers {
		if exists(s.LayerPath(d)) {
			n = append(n, i)
		}
	}
	return n
}

// TestPruneOnly: what is not to go stays, whatever else is said.
func TestPruneOnly(t *testing.T) {
	odd := func(r Record) bool { return r.Kind == "odd" && len(r.Mentions) == 1 }
	for _, c := range []struct {
		opt  PruneOptions
		want string
	}{
		{PruneOptions{Only: odd}, "[0 2 4]"},
		{PruneOptions{Only: odd, KeepFor: 36 * time.Hour}, "[0 1 2 4]"},
		{PruneOptions{Only: odd, Limit: Limit{MaxUsed: 450_000}}, "[0 1 2 4]"},
		{PruneOptions{Only: odd, Limit: Limit{MaxUsed: 1}}, "[0 2 4]"},
		{PruneOptions{Only: func(Record) bool { return false }}, "[0 1 2 3 4 5]"},
	} {
		s, layers := aged(t, 6)
		rep := must(s.Prune(context.Background(), c.opt))(t)
		if got := fmt.Sprint(left(s, layers)); got != c.want || len(rep.Gone) != 6-len(left(s, layers)) {
			t.Errorf("%+v leaves %s, want %s; says %v are gone", c.opt, got, c.want, rep.Gone)
		}
	}
}

// TestCollect: down to the limit and no further, not below what it may have in any case,
// nothing while a build uses it, and not twice in a minute.
func TestCollect(t *testing.T) {
	ctx := context.Background()
	s, layers := aged(t, 6)
	if rep := must(s.Collect(ctx, Limit{}))(t); len(rep.Gone) > 0 {
		t.Errorf("without a limit %+v", rep)
	}
	if rep := must(s.Collect(ctx, Limit{MaxUsed: math.MaxInt64}))(t); len(rep.Gone) > 0 {
		t.Errorf("far below the limit %+v", rep)
	}
	rep := must(s.Collect(ctx, Limit{MaxUsed: 350_000}))(t)
	if got := fmt.Sprint(left(s, layers)); got != "[0 1 2]" || len(rep.Gone) != 3 {
		t.Errorf("leaves %s; %+v", got, rep)
	}
	if rep := must(s.Collect(ctx, Limit{MaxUsed: 1}))(t); len(rep.Gone) > 0 {
		t.Errorf("measured twice in a minute: %+v", rep)
	}
	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(s.path(dirLocks, "collected"), old, old); err != nil {
		t.Fatal(err)
	}
	release := must(s.Use(ctx))(t)
	if !s.HasLayer(layers[2]) {
		t.Fatal("a layer is gone")
	}
	rep = must(s.Collect(ctx, Limit{MaxUsed: 1, Reserved: 1}))(t)
	if got := left(s, layers); got[len(got)-1] != 2 {
		t.Errorf("what a build has found is gone: %v; %+v", got, rep)
	}
	release()
	if err := os.Chtimes(s.path(dirLocks, "collected"), old, old); err != nil {
		t.Fatal(err)
	}
	unlock := must(s.Lock(ctx, pruneLock))(t)
	if rep := must(s.Collect(ctx, Limit{MaxUsed: 1}))(t); len(rep.Gone) > 0 {
		t.Errorf("while another is at it: %+v", rep)
	}
	unlock()
	must(s.Collect(ctx, Limit{MaxUsed: 1}))(t)
	if got := left(s, layers); len(got) > 0 {
		t.Errorf("leaves %v", got)
	}
}

func TestParseLimit(t *testing.T) {
	s := open(t)
	size, _, err := s.disk()
	if err != nil {
		t.Fatal(err)
	}
	for in, want := range map[string]Limit{
		"": must(s.DefaultLimit())(t), "none": {}, "20GB": {MaxUsed: 20e9}, "512mb": {MaxUsed: 512e6}, "60%": {MaxUsed: size / 100 * 60}, "1": {MaxUsed: 1},
	} {
		if got, err := s.ParseLimit(in); err != nil || got != want {
			t.Errorf("%q: %+v (%v), want %+v", in, got, err, want)
		}
	}
	for _, in := range []string{"0", "-1", "much", "0%", "101%", "x%", "%"} {
		if got, err := s.ParseLimit(in); err == nil {
			t.Errorf("%q: %+v", in, got)
		}
	}
}

func TestDefaultLimit(t *testing.T) {
	s := open(t)
	l := must(s.DefaultLimit())(t)
	size, free, err := s.disk()
	if err != nil || l.MaxUsed <= 0 || l.MaxUsed > 100e9 || l.MinFree != size/100*20 || l.Reserved > 10e9 || free > size {
		t.Errorf("%+v of %d, %d free: %v", l, size, free, err)
	}
}

// TestContents: each layer with its compressed forms, each other blob alone, and who
// needs them. Looking does not count as a use.
func TestContents(t *testing.T) {
	s := open(t)
	image, blobs, layer := putImage(t, s, "image")
	if err := s.SetTag("tagged", image); err != nil {
		t.Fatal(err)
	}
	loose := putLayer(t, s, "loose")
	form := must(s.PutBlob([]byte("compressed loose")))(t)
	if err := s.PutRecord("link-x", string(loose), []byte(form)); err != nil {
		t.Fatal(err)
	}
	s.age(t, time.Hour)
	found := func() map[string]Content {
		all := map[string]Content{}
		for _, c := range must(s.Contents())(t) {
			all[c.Digest] = c
		}
		return all
	}
	all := found()
	if c := all[string(layer)]; !c.Layer || !c.Tagged || c.InUse || time.Since(c.Used) < time.Minute {
		t.Errorf("the image's layer: %+v", c)
	}
	if c := all[string(loose)]; !c.Layer || c.Tagged || c.Size != 8192 {
		t.Errorf("the other layer: %+v", c)
	}
	if _, ok := all[string(form)]; ok {
		t.Error("a layer's blob is listed by itself")
	}
	for _, b := range blobs {
		if c, ok := all[string(b)]; !ok || c.Layer || !c.Tagged {
			t.Errorf("the image's blob %s: %+v", b, c)
		}
	}
	defer must(s.Use(context.Background()))(t)()
	if !s.HasLayer(loose) {
		t.Fatal("no layer")
	}
	if c := found()[string(loose)]; !c.InUse {
		t.Errorf("while a build uses it: %+v", c)
	}
	if c := found()[string(layer)]; c.InUse {
		t.Errorf("nobody uses %+v", c)
	}
}
