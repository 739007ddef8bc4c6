package engine_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/engine"
	"github.com/kiln-build/kiln/internal/fileop"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/sandbox"
	"github.com/kiln-build/kiln/internal/source"
	"github.com/kiln-build/kiln/internal/source/remote"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/kiln-build/kiln/internal/tree"
	"github.com/kiln-build/kiln/internal/tree/memtree"
)

// catalogue has an image of one layer for any name; "alias-X" is X's.
type catalogue struct{}

func (catalogue) Resolve(_ context.Context, ref string, p ocispec.Platform) (*image.Image, error) {
	name, _, _ := strings.Cut(strings.Replace(ref, "alias-", "", 1), "@")
	d := digest.FromString(name)
	c := fmt.Sprintf(`{"os":%q,"architecture":%q,"rootfs":{"type":"layers","diff_ids":[%q]}}`, p.OS, p.Architecture, d)
	return &image.Image{Ref: ref, Digest: digest.FromString(ref), RawConfig: []byte(c), Layers: []image.Layer{{DiffID: d}}}, nil
}

func (catalogue) Describe(context.Context, string, map[string]string, remote.Ask) (remote.Metadata, error) {
	return remote.Metadata{}, errors.New("there is nothing remote")
}

func (catalogue) ResolveLayout(context.Context, string, digest.Digest, ocispec.Platform) (*image.Image, error) {
	return nil, errors.New("there is no layout")
}

func (catalogue) Fetch(context.Context, image.Layer) (io.ReadCloser, error) {
	return nil, errors.New("there is no registry")
}

// box is a sandbox that counts. A step "write NAME CONTENT" writes a file, "fail" fails,
// "wait" waits for the end.
type box struct {
	mu      sync.Mutex
	started []int // number of layers of each session
	open    int
	ran     []string

	hold, running chan struct{} // if not nil, the first step closes running and waits for hold
}

func (*box) Name() string { return "counting" }

func (b *box) Start(_ context.Context, c sandbox.Config) (sandbox.Session, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.started = append(b.started, len(c.Layers))
	b.open++
	return &boxSession{b: b}, nil
}

type boxSession struct {
	b      *box
	closed bool
}

func (s *boxSession) Run(ctx context.Context, p sandbox.Process, _, changes io.Writer) error {
	s.b.mu.Lock()
	s.b.ran = append(s.b.ran, strings.Join(p.Args, " "))
	first := len(s.b.ran) == 1
	s.b.mu.Unlock()
	if first && s.b.hold != nil {
		close(s.b.running)
		<-s.b.hold
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	switch p.Args[0] {
	case "fail":
		return &sandbox.ExitError{Code: 3}
	case "wait":
		<-ctx.Done()
		return context.Cause(ctx)
	}
	tw := layer.NewTarWriter(changes)
	n := tree.Node{Mode: tree.ModeRegular | 0o644, Size: int64(len(p.Args[2]))}
	if err := tw.Add(p.Args[1], n, "", func() (io.ReadCloser, error) {
		return io.NopCloser(strings.NewReader(p.Args[2])), nil
	}); err != nil {
		return err
	}
	return tw.Close()
}

func (*boxSession) Changes(context.Context, *sandbox.Volume, io.Writer) error {
	return errors.New("there are no volumes")
}

func (s *boxSession) Close() error {
	s.b.mu.Lock()
	defer s.b.mu.Unlock()
	if s.closed {
		return errors.New("closed twice")
	}
	s.closed = true
	s.b.open--
	return nil
}

type fixture struct {
	t   *testing.T
	box *box
	c   engine.Config
	ops []*engine.Op

	watch engine.Watch
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	st, err := store.Open(filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{t: t}
	f.c = engine.Config{
		Store: st, Cache: cache.NewLocal(st), Images: catalogue{},
		Contexts: source.Trees{"context": memtree.New(map[string]memtree.File{"a": {Data: "a"}, "b": {Data: "b"}})},
	}
	return f
}

func (f *fixture) op(do engine.Operation, ins ...*engine.Op) *engine.Op {
	o := &engine.Op{Name: fmt.Sprintf("%T", do), Do: do, At: &diag.Location{File: "D", Line: len(f.ops) + 1}}
	for _, in := range ins {
		o.Inputs = append(o.Inputs, engine.Input{Op: in})
	}
	f.ops = append(f.ops, o)
	return o
}

func local(name string) *engine.Local {
	return &engine.Local{Selection: source.Selection{Name: name}}
}

func (f *fixture) exec(args string, in ...*engine.Op) *engine.Op {
	return f.op(&engine.Exec{
		Args: strings.Fields(args), Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}, User: "0",
	}, in...)
}

func (f *fixture) solve(target *engine.Op) ([]image.Layer, error) {
	f.box = &box{}
	f.c.Sandbox = f.box
	solver := engine.New(f.c)
	defer solver.Close()
	res, err := solver.Solve(context.Background(), &engine.Graph{Ops: f.ops, Target: engine.Input{Op: target}}, f.watch)
	ls := res.Layers
	if err == nil {
		ls, err = solver.Layers(context.Background(), res)
	}
	if f.box.open != 0 {
		f.t.Errorf("%d sessions are open", f.box.open)
	}
	es, rerr := filepath.Glob(filepath.Join(f.c.Store.Root(), "tmp", "*"))
	if rerr != nil || len(es) > 0 {
		f.t.Errorf("left in the store: %v", es)
	}
	return ls, err
}

func (f *fixture) mustSolve(target *engine.Op) []image.Layer {
	f.t.Helper()
	ls, err := f.solve(target)
	if err != nil {
		f.t.Fatal(err)
	}
	return ls
}

// read is a file of a result.
func (f *fixture) read(ls []image.Layer, name string) string {
	f.t.Helper()
	for i := len(ls) - 1; i >= 0; i-- {
		r, err := layer.Open(f.c.Store.LayerPath(ls[i].DiffID))
		if err != nil {
			f.t.Fatal(err)
		}
		defer r.Close()
		if _, err := r.Lstat(name); err != nil {
			continue
		}
		rc, err := r.Open(name)
		if err != nil {
			f.t.Fatal(err)
		}
		b, err := io.ReadAll(rc)
		if err != nil {
			f.t.Fatal(err)
		}
		return string(b)
	}
	return "none"
}

// TestSessions: a step goes on in the session of the one before it; a second one on
// the same root has its own; a cached one leaves none behind.
func TestSessions(t *testing.T) {
	f := newFixture(t)
	a := f.exec("write a 1")
	b := f.exec("write b 1", a)
	c := f.exec("write c 1", b)
	d := f.exec("write d 1", a)
	all := f.op(&engine.Merge{}, c, d)
	ls := f.mustSolve(all)
	if len(f.box.ran) != 4 || len(f.box.started) != 2 || slices.Max(f.box.started) > 1 {
		t.Errorf("ran %q in sessions on %v layers", f.box.ran, f.box.started)
	}
	if len(ls) != 5 || f.read(ls, "d") != "1" || f.read(ls, "c") != "1" {
		t.Errorf("layers %v", ls)
	}
	if f.mustSolve(all); len(f.box.ran) != 0 {
		t.Errorf("ran again: %q", f.box.ran)
	}
	// Another network is another session.
	e := f.exec("write e 1", c)
	e.Do.(*engine.Exec).NoNetwork = true
	if f.mustSolve(e); len(f.box.ran) != 1 || !slices.Equal(f.box.started, []int{3}) {
		t.Errorf("ran %q in sessions on %v layers", f.box.ran, f.box.started)
	}
}

func TestIgnoreCache(t *testing.T) {
	f := newFixture(t)
	a := f.exec("write a 1")
	b := f.exec("write b 1", a)
	c := f.exec("write c 1", b)
	f.mustSolve(c)
	b.IgnoreCache = true
	if f.mustSolve(c); !slices.Equal(f.box.ran, []string{"write b 1"}) {
		// c is known by what b gave.
		t.Errorf("ran %q", f.box.ran)
	}
	b.Do.(*engine.Exec).Args[2] = "2"
	if f.mustSolve(c); !slices.Equal(f.box.ran, []string{"write b 2", "write c 1"}) {
		t.Errorf("ran %q", f.box.ran)
	}
}

// TestFirstFailure: one step's failure ends the others, and is the error.
func TestFirstFailure(t *testing.T) {
	f := newFixture(t)
	a := f.exec("write a 1")
	m := f.op(&engine.Merge{}, f.exec("wait", a), f.exec("fail", a))
	ls, err := f.solve(m)
	var d *diag.Error
	if ls != nil || !errors.As(err, &d) || d.At == nil || d.At.Line != 3 || diag.ExitCode(err) != diag.ExitStep {
		t.Errorf("%v, %v", ls, err)
	}
}

func TestNoContext(t *testing.T) {
	f := newFixture(t)
	if ls, err := f.solve(f.op(local("nosuch"))); err == nil {
		t.Errorf("a context that there is not: %v", ls)
	}
}

// TestActionsShareResults: what one action makes of another's result is not seen by a third.
func TestActionsShareResults(t *testing.T) {
	in := func(n int) engine.Ref { return engine.Ref{Kind: engine.RefAction, N: n} }
	mkfile := func(base engine.Ref, p, data string) engine.Action {
		return engine.Action{Base: base, Mkfile: &fileop.MkfileAction{Path: p, Data: []byte(data), Mode: 0o644}}
	}
	cp := func(base, from engine.Ref, p, dest string) engine.Action {
		return engine.Action{Base: base, Source: from, Copy: &fileop.CopyAction{Src: p, Dest: dest}}
	}
	scratch := engine.Ref{}
	for name, as := range map[string][]engine.Action{
		"changed after it was copied from": {
			mkfile(scratch, "/a", "1"), cp(scratch, in(0), "/a", "/out"), mkfile(in(0), "/a", "2"), cp(in(1), in(2), "/a", "/two"),
		},
		"changed before":          {mkfile(scratch, "/a", "1"), mkfile(in(0), "/a", "2"), cp(scratch, in(0), "/a", "/out"), cp(in(2), in(1), "/a", "/two")},
		"copied within itself":    {mkfile(scratch, "/out", "1"), mkfile(scratch, "/x", "2"), cp(in(0), in(1), "/x", "/two"), cp(in(2), in(2), "/two", "/three")},
		"two bases of one result": {mkfile(scratch, "/a", "1"), mkfile(in(0), "/b", "2"), mkfile(in(0), "/c", "3"), cp(in(2), in(1), "/b", "/two"), cp(in(3), in(0), "/a", "/out")},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			ls := f.mustSolve(f.op(&engine.File{Actions: as, Result: len(as) - 1}))
			if f.read(ls, "out") != "1" || f.read(ls, "two") != "2" {
				t.Errorf("out is %q, two is %q", f.read(ls, "out"), f.read(ls, "two"))
			}
		})
	}
	// An owner is looked up in the result as it was.
	f := newFixture(t)
	ls := f.mustSolve(f.op(&engine.File{Result: 3, Actions: []engine.Action{
		{Mkdir: &fileop.MkdirAction{Path: "/etc", Mode: 0o755}},
		mkfile(in(0), "/etc/passwd", "u:x:5:5::/:\n"),
		mkfile(in(1), "/etc/passwd", "u:x:6:6::/:\n"),
		{Base: in(2), UserIn: in(1), Mkfile: &fileop.MkfileAction{Path: "/f", Owner: &fileop.Owner{User: &fileop.ID{Name: "u"}}}},
	}}))
	r, err := layer.Open(f.c.Store.LayerPath(ls[0].DiffID))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if n, err := r.Lstat("f"); err != nil || n.UID != 5 {
		t.Errorf("%+v %v", n, err)
	}
}

// TestOnLayers: each call repeats and extends the one before.
func TestOnLayers(t *testing.T) {
	f := newFixture(t)
	var told [][]image.Layer
	f.watch.Layers = func(ls []image.Layer) { told = append(told, ls) }
	a := f.exec("write a 1")
	side := f.exec("write s 1")
	b := f.exec("write b 1", a)
	ls := f.mustSolve(f.op(&engine.Merge{}, b, side))
	for i, t1 := range append(told, ls) {
		if i > 0 && (len(t1) < len(told[i-1]) || !slices.EqualFunc(told[i-1], t1[:len(told[i-1])], func(a, b image.Layer) bool { return a.DiffID == b.DiffID })) {
			t.Errorf("%v after %v", t1, told[i-1])
		}
	}
	if len(told) != 3 || len(told[2]) != 3 {
		t.Errorf("told %v", told)
	}
}

// TestLostLayers: a record of which a layer is gone is none.
func TestLostLayers(t *testing.T) {
	f := newFixture(t)
	b := f.exec("write b 1", f.exec("write a 1"))
	ls := f.mustSolve(b)
	if err := f.c.Store.DropLayer(ls[0].DiffID); err != nil {
		t.Fatal(err)
	}
	again := f.mustSolve(b)
	if len(f.box.ran) == 0 || again[0].DiffID != ls[0].DiffID || f.read(again, "a") != "1" {
		t.Errorf("ran %q", f.box.ran)
	}
}

// list are the paths of the file system that layers make.
func (f *fixture) list(ls []image.Layer) (paths []string) {
	f.t.Helper()
	solver := engine.New(f.c)
	defer solver.Close()
	t, err := solver.Tree(context.Background(), engine.Result{Layers: ls})
	if err != nil {
		f.t.Fatal(err)
	}
	if err := tree.Walk(t, ".", func(p string, n tree.Node) error {
		if !n.IsDir() {
			paths = append(paths, p)
		}
		return nil
	}); err != nil {
		f.t.Fatal(err)
	}
	return paths
}

// TestDiff: of what was built on the other, its own layers; else what makes one of the other.
func TestDiff(t *testing.T) {
	f := newFixture(t)
	base := f.exec("write dir/a 1")
	both := f.exec("write dir/b 2", f.exec("write same 1", base))
	other := f.exec("write c 3", f.exec("write same 1", base))
	if ls := f.mustSolve(f.op(&engine.Diff{}, base, both)); len(ls) != 2 {
		t.Errorf("%d layers instead of the two that were built on it", len(ls))
	}
	if ls := f.mustSolve(f.op(&engine.Diff{}, both, both)); len(ls) != 0 {
		t.Errorf("%d layers between a file system and itself", len(ls))
	}
	d := f.op(&engine.Diff{}, both, other)
	ls := f.mustSolve(d)
	if len(ls) != 1 {
		t.Fatalf("%d layers", len(ls))
	}
	if got := f.list(f.mustSolve(f.op(&engine.Merge{}, both, d))); !slices.Equal(got, []string{"c", "dir/a", "same"}) {
		t.Errorf("with the difference laid over it: %q", got)
	}
	if got := f.list(ls); !slices.Equal(got, []string{"c"}) { // besides that, a whiteout
		t.Errorf("the difference alone: %q", got)
	}
	if ls := f.mustSolve(f.op(&engine.Diff{}, nil, both)); !slices.Equal(f.list(ls), []string{"dir/a", "dir/b", "same"}) {
		t.Errorf("from nothing: %q", f.list(ls))
	}
}

// TestContextResult: a build context can be the result, a base, or a root file system.
func TestContextResult(t *testing.T) {
	f := newFixture(t)
	ctx := f.op(local("context"))
	for name, x := range map[string]struct {
		op   *engine.Op
		want []string
	}{
		"result": {ctx, []string{"a", "b"}},
		"base": {f.op(&engine.File{Actions: []engine.Action{{
			Base: engine.Ref{Kind: engine.RefInput}, Mkfile: &fileop.MkfileAction{Path: "/new", Mode: 0o644},
		}}}, ctx), []string{"a", "b", "new"}},
		"root":   {f.exec("write c 1", ctx), []string{"a", "b", "c"}},
		"merged": {f.op(&engine.Merge{}, ctx, f.exec("write d 1")), []string{"a", "b", "d"}},
	} {
		if got := f.list(f.mustSolve(x.op)); !slices.Equal(got, x.want) {
			t.Errorf("%s: %q instead of %q", name, got, x.want)
		}
	}
}

// TestSolves: what one Solve of a build has done is not done again by another, though it is to ignore the cache.
func TestSolves(t *testing.T) {
	f := newFixture(t)
	f.box = &box{}
	f.c.Sandbox = f.box
	a := f.exec("write a 1")
	a.IgnoreCache = true
	b, c := f.exec("write b 1", a), f.exec("write c 1", a)
	solver := engine.New(f.c)
	defer solver.Close()
	var wg sync.WaitGroup
	for _, op := range []*engine.Op{b, c, b} {
		wg.Go(func() {
			g := &engine.Graph{Ops: []*engine.Op{a, op}, Target: engine.Input{Op: op}}
			if _, err := solver.Solve(context.Background(), g, engine.Watch{}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	slices.Sort(f.box.ran)
	if want := []string{"write a 1", "write b 1", "write c 1"}; !slices.Equal(f.box.ran, want) {
		t.Errorf("ran %q instead of %q", f.box.ran, want)
	}
}

// TestBuilds: of several builds with one store that want the same at the same time one does it, and if that one
// is ended another.
func TestBuilds(t *testing.T) {
	for _, ended := range []bool{false, true} {
		f := newFixture(t)
		target := f.exec("write b 1", f.exec("write a 1"))
		start := func(ctx context.Context, b *box) <-chan error {
			c, done := f.c, make(chan error, 1)
			c.Sandbox = b
			go func() {
				solver := engine.New(c)
				defer solver.Close()
				_, err := solver.Solve(ctx, &engine.Graph{Ops: f.ops, Target: engine.Input{Op: target}}, engine.Watch{})
				done <- err
			}()
			return done
		}
		ctx, end := context.WithCancel(context.Background())
		first, second := &box{hold: make(chan struct{}), running: make(chan struct{})}, &box{}
		one := start(ctx, first)
		<-first.running
		two := start(context.Background(), second)
		select {
		case err := <-two:
			t.Errorf("the second build does not wait: %v", err)
		case <-time.After(100 * time.Millisecond):
		}
		if ended {
			end()
		}
		close(first.hold)
		if err := <-one; (err != nil) != ended {
			t.Errorf("the first build: %v", err)
		}
		if err := <-two; err != nil {
			t.Error(err)
		}
		end()
		if (len(second.ran) == 0) == ended {
			t.Errorf("the first build ran %q, the second %q", first.ran, second.ran)
		}
	}
}

// asked notes the keys that a cache is asked for.
type asked struct {
	cache.Index
	mu   sync.Mutex
	keys []digest.Digest
}

func (a *asked) Lookup(ctx context.Context, key digest.Digest) (*cache.Record, error) {
	a.mu.Lock()
	a.keys = append(a.keys, key)
	a.mu.Unlock()
	return a.Index.Lookup(ctx, key)
}

// TestTargetIsAskedForFirst: that a result is known is found out before anything that
// it is made of is looked at, stages that only it needs included.
func TestTargetIsAskedForFirst(t *testing.T) {
	f := newFixture(t)
	stage := f.exec("write b 1", f.exec("write a 1"))
	target := f.exec("write d 1", f.op(&engine.Merge{}, f.exec("write c 1"), stage))
	f.mustSolve(target)
	a := &asked{Index: f.c.Cache}
	f.c.Cache = a
	if f.mustSolve(target); len(f.box.ran) != 0 || len(a.keys) != 1 {
		t.Errorf("ran %q, asked for %d keys", f.box.ran, len(a.keys))
	}
	// A miss leads on, and what is below is asked for, too.
	a.keys = nil
	last := f.exec("write e 1", target)
	if f.mustSolve(last); len(f.box.ran) != 1 || len(a.keys) < 2 {
		t.Errorf("ran %q, asked for %d keys", f.box.ran, len(a.keys))
	}
}
