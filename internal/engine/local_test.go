package engine_test

import (
	"bytes"
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/internal/engine"
	"github.com/kiln-build/kiln/internal/fileop"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/source"
	"github.com/kiln-build/kiln/internal/tree"
)

// distant are contexts of which so many bytes have come when they are opened, and a byte more with each file that is opened.
type distant struct{ source.Trees }

func (d distant) OpenContext(ctx context.Context, s source.Selection) (tree.Tree, error) {
	t, err := d.Trees.OpenContext(ctx, s)
	s.Progress(100)
	return &sending{Tree: t, progress: s.Progress, n: 100}, err
}

type sending struct {
	tree.Tree
	progress func(int64)
	n        int64
}

func (t *sending) Lstat(p string) (tree.Node, error) {
	t.n++
	t.progress(t.n)
	return t.Tree.Lstat(p)
}

// TestContextTransfer: the step of a context goes on until what is taken of it is known, and says what has come of it.
func TestContextTransfer(t *testing.T) {
	f := newFixture(t)
	f.c.Contexts = distant{f.c.Contexts.(source.Trees)}
	ctx := f.op(local("context"))
	copied := f.op(&engine.File{Actions: []engine.Action{{
		Base: engine.Ref{Kind: engine.RefScratch}, Source: engine.Ref{Kind: engine.RefInput}, Copy: &fileop.CopyAction{Src: "/a", Dest: "/a"},
	}}}, ctx)
	last := f.exec("write x 1", copied)
	events := func() (of []string) {
		var b bytes.Buffer
		f.c.Progress = progress.NewRecorder(progress.NewJSON(&b))
		f.mustSolve(last)
		names := map[int]string{}
		for d := json.NewDecoder(&b); d.More(); {
			var e progress.Event
			if err := d.Decode(&e); err != nil {
				t.Fatal(err)
			}
			if e.Kind == progress.StepPlanned {
				names[e.Step] = strings.TrimPrefix(e.Name, "*engine.")
				continue
			}
			line := names[e.Step] + " " + string(e.Kind)
			if e.Cached {
				line += " cached"
			}
			if e.Item != "" {
				line += " " + e.Item
			}
			if len(of) == 0 || of[len(of)-1] != line {
				of = append(of, line)
			}
		}
		return of
	}
	index := func(of []string, line string) int {
		t.Helper()
		i := slices.Index(of, line)
		if i < 0 {
			t.Fatalf("no %q in %q", line, of)
		}
		return i
	}
	got := events()
	begun, moved, done := index(got, "Local started"), index(got, "Local transfer transferring context:"), index(got, "Local done")
	if begun > moved || moved > done || done > index(got, "File started") {
		t.Errorf("%q", got)
	}
	got = events() // all from the cache, after a look at what would be copied
	if index(got, "Local done") < index(got, "Local transfer transferring context:") || slices.Contains(got, "Local done cached") {
		t.Errorf("%q", got)
	}
}
