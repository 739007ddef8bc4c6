package engine_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/cachemount"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/engine"
	"github.com/kiln-build/kiln/internal/fileop"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/sandbox"
	"github.com/kiln-build/kiln/internal/sandbox/gvisor"
	"github.com/kiln-build/kiln/internal/sandbox/sandboxtest"
	"github.com/kiln-build/kiln/internal/source"
	"github.com/kiln-build/kiln/internal/source/remote"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/kiln-build/kiln/internal/tree"
	"github.com/kiln-build/kiln/internal/tree/memtree"
)

func TestMain(m *testing.M) {
	if code, ok := gvisor.Main(os.Args); ok {
		os.Exit(code)
	}
	if code, ok := sandboxtest.GuestMain(os.Args); ok {
		os.Exit(code)
	}
	os.Exit(m.Run())
}

// bed solves graphs in one store, and counts what is really run.
type bed struct {
	st            *store.Store
	box           sandbox.Sandbox
	base, tools   tree.Tree
	secrets       secrets
	agent         remote.SSH
	output        string // of the last solve
	warnings      string
	starts, steps atomic.Int32
}

// secrets are values by id.
type secrets map[string]string

// Secret implements remote.Secrets.
func (s secrets) Secret(_ context.Context, id string) ([]byte, error) {
	v, ok := s[id]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return []byte(v), nil
}

func newBed(t *testing.T) *bed {
	t.Helper()
	st, err := store.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return &bed{st: st, box: gvisor.New(gvisor.Options{}), base: openLayer(t, sandboxtest.BaseLayer(t)), tools: openLayer(t, sandboxtest.ToolLayer(t))}
}

func openLayer(t *testing.T, path string) tree.Tree {
	t.Helper()
	l, err := layer.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// Name implements sandbox.Sandbox.
func (b *bed) Name() string { return b.box.Name() }

// Start implements sandbox.Sandbox.
func (b *bed) Start(ctx context.Context, c sandbox.Config) (sandbox.Session, error) {
	b.starts.Add(1)
	s, err := b.box.Start(ctx, c)
	return counted{s, b}, err
}

type counted struct {
	sandbox.Session
	b *bed
}

// Run implements sandbox.Session.
func (c counted) Run(ctx context.Context, p sandbox.Process, output, changes io.Writer) error {
	c.b.steps.Add(1)
	return c.Session.Run(ctx, p, output, changes)
}

// text is a sink of what steps print, and of warnings.
type text struct {
	b, warnings bytes.Buffer
}

// Send implements progress.Sink.
func (s *text) Send(e progress.Event) {
	s.b.Write(e.Data)
	if e.Kind == progress.Warning {
		s.warnings.WriteString(e.Text + "\n")
	}
}

func (b *bed) config(files map[string]memtree.File, out *text) engine.Config {
	c := engine.Config{
		Store: b.st, Cache: cache.NewLocal(b.st),
		Sandbox:  b,
		Contexts: source.Trees{"base": b.base, "tools": b.tools, "context": memtree.New(files)},
		Secrets:  b.secrets, SSH: b.agent,
	}
	if out != nil {
		c.Progress = progress.NewRecorder(out)
	}
	return c
}

// solve returns the result as a tree, and how many steps and sessions it took.
func (b *bed) solve(t *testing.T, files map[string]memtree.File, g *engine.Graph) (result tree.Tree, steps, starts int32, err error) {
	t.Helper()
	b.starts.Store(0)
	b.steps.Store(0)
	var out text
	solver := engine.New(b.config(files, &out))
	defer solver.Close()
	res, err := solver.Solve(t.Context(), g, engine.Watch{})
	ls := res.Layers
	b.output, b.warnings = out.b.String(), out.warnings.String()
	t.Logf("%s%s", b.output, b.warnings)
	var ts []tree.Tree
	for _, l := range ls {
		r, err := layer.Open(b.st.LayerPath(l.DiffID))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close() })
		ts = append(ts, r)
	}
	return rootfs.New(ts...), b.steps.Load(), b.starts.Load(), err
}

// graph collects operations.
type graph struct{ engine.Graph }

func (g *graph) add(do engine.Operation, ins ...*engine.Op) *engine.Op {
	op := &engine.Op{Name: "op", Do: do}
	for _, in := range ins {
		op.Inputs = append(op.Inputs, engine.Input{Op: in})
	}
	g.Ops, g.Target = append(g.Ops, op), engine.Input{Op: op}
	return op
}

// root is a root file system with a shell.
func (g *graph) root() *engine.Op {
	return g.copy(g.add(local("base")), "/", "/")
}

// copy is a file system with a part of another, or of a context.
func (g *graph) copy(from *engine.Op, src, dest string) *engine.Op {
	return g.add(&engine.File{Actions: []engine.Action{{
		Source: engine.Ref{Kind: engine.RefInput},
		Copy:   &fileop.CopyAction{Src: src, Dest: dest, DirCopyContents: true, CreateDestPath: true},
	}}}, from)
}

func (g *graph) run(script string, mounts []engine.Mount, ins ...*engine.Op) *engine.Op {
	return g.add(&engine.Exec{
		Args: []string{"/bin/sh", "-c", script}, Cwd: "/", Mounts: mounts,
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
	}, ins...)
}

func content(t *testing.T, fs tree.Tree, name string) string {
	t.Helper()
	f, err := fs.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func boundFiles(change ...string) map[string]memtree.File {
	files := map[string]memtree.File{
		"used/f": {Data: "used"}, "used/link": memtree.Symlink("f"), "other": {Data: "other"},
	}
	for i := 0; i+1 < len(change); i += 2 {
		files[change[i]] = memtree.File{Data: change[i+1]}
	}
	return files
}

// TestMountContextKey: a mounted part of a context counts by its content.
func TestMountContextKey(t *testing.T) {
	b := newBed(t)
	build := func(files map[string]memtree.File, source, want string, steps int32) {
		t.Helper()
		g := &graph{}
		g.run("cat /m/f /m/link > /out 2>/dev/null || cat /m > /out", []engine.Mount{{Dest: "/m", Input: 1, Source: source}}, g.root(), g.add(local("context")))
		fs, n, _, err := b.solve(t, files, &g.Graph)
		if err != nil || n != steps {
			t.Fatalf("%d steps, want %d; %v", n, steps, err)
		}
		if got := content(t, fs, "out"); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		if _, err := fs.Lstat("m"); err == nil {
			t.Error("the mount point is in the result")
		}
	}
	build(boundFiles(), "used", "usedused", 1)
	build(boundFiles(), "used", "usedused", 0)
	build(boundFiles("other", "changed", "new", "x"), "used", "usedused", 0)
	build(boundFiles("used/f", "changed"), "used", "changedchanged", 1)
	build(boundFiles(), "used/link", "used", 1)
	build(boundFiles("other", "changed"), "used/link", "used", 0)
	build(boundFiles("used/f", "again"), "used/link", "again", 1)
}

// TestMountStageKey: a mounted part of a stage counts by its content, however it came about.
func TestMountStageKey(t *testing.T) {
	b := newBed(t)
	build := func(files map[string]memtree.File, steps int32) {
		t.Helper()
		g := &graph{}
		root := g.root()
		stage := g.copy(g.add(local("context")), "/", "/s")
		g.run("cat /m/f > /out; test ! -e /m/g; touch /m/g /tmp2; rm /m/f", []engine.Mount{{Dest: "/m", Input: 1, Source: "s/used", Writable: true}}, root, stage)
		fs, n, _, err := b.solve(t, files, &g.Graph)
		if err != nil || n != steps {
			t.Fatalf("%d steps, want %d; %v", n, steps, err)
		}
		if got, want := content(t, fs, "out"), files["used/f"].Data; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	build(boundFiles(), 1)
	build(boundFiles("other", "changed"), 0)
	build(boundFiles("used/f", "changed"), 1)
	build(boundFiles("used/new", "changed"), 1)
}

// TestMountFieldsInKey: another place, and other rights, are another step.
func TestMountFieldsInKey(t *testing.T) {
	b := newBed(t)
	for i, m := range []engine.Mount{
		{Dest: "/m", Input: 1, Source: "used"},
		{Dest: "/n", Input: 1, Source: "used"},
		{Dest: "/m", Input: 1, Source: "."},
		{Dest: "/m", Input: 1, Source: "used", Writable: true},
		{Dest: "/m", Tmpfs: &engine.TmpfsMount{}, Writable: true},
		{Dest: "/m", Tmpfs: &engine.TmpfsMount{Size: 1 << 20}, Writable: true},
		{Dest: "/m", Input: 0, Source: "bin"},
	} {
		for again := range int32(2) {
			g := &graph{}
			ins := []*engine.Op{g.root()}
			if m.Input == 1 {
				ins = append(ins, g.add(local("context")))
			}
			g.run("ls -d /m /n > /out 2>/dev/null; true", []engine.Mount{m}, ins...)
			_, n, _, err := b.solve(t, boundFiles(), &g.Graph)
			if err != nil || n != 1-again {
				t.Errorf("mount %d: %d steps, want %d; %v", i, n, 1-again, err)
			}
		}
	}
}

// TestMountSessions: steps go on in a session only if they see the same mounts.
func TestMountSessions(t *testing.T) {
	b := newBed(t)
	g := &graph{}
	root := g.root()
	ctx := g.add(local("context"))
	m := []engine.Mount{{Dest: "/m", Input: 1, Source: "used", Writable: true}}
	one := g.run("cat /m/f > /one; echo x > /m/f", m, root, ctx)
	two := g.run("cat /m/f > /two; echo x > /m/f", m, one, ctx)
	three := g.run("ls /m > /three 2>&1; true", nil, two)
	g.run("cat /t/one /m/f > /four", []engine.Mount{{Dest: "/m", Input: 1, Source: "used"}, {Dest: "/t", Input: 0, Source: "."}}, three, ctx)
	fs, steps, starts, err := b.solve(t, boundFiles(), &g.Graph)
	if err != nil || steps != 4 || starts != 3 {
		t.Fatalf("%d steps in %d sessions: %v", steps, starts, err)
	}
	for name, want := range map[string]string{"one": "used", "two": "used", "three": "ls: /m: No such file or directory\n", "four": "usedused"} {
		if got := content(t, fs, name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
}

func TestMountErrors(t *testing.T) {
	b := newBed(t)
	for _, name := range []string{"context", "stage", "root", "nothing"} {
		g := &graph{}
		root := g.root()
		m := engine.Mount{Dest: "/m", Input: 1, Source: "no/such"}
		ins := []*engine.Op{root, nil}
		switch name {
		case "context":
			ins[1] = g.add(local("context"))
		case "stage":
			ins[1] = g.copy(g.add(local("context")), "/", "/s")
		case "root":
			m.Input, ins = 0, ins[:1]
		}
		g.run("true", []engine.Mount{m}, ins...)
		_, _, _, err := b.solve(t, boundFiles(), &g.Graph)
		var d *diag.Error
		if !errors.As(err, &d) || diag.ExitCode(err) != diag.ExitDockerfile || !strings.Contains(err.Error(), `"/no/such": not found`) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestIgnoreCacheEmptiesMounts: what a step that runs in any case finds in its cache mounts is
// what the build has put there.
func TestIgnoreCacheEmptiesMounts(t *testing.T) {
	b := newBed(t)
	cacheMount := func(id string, input int) []engine.Mount {
		return []engine.Mount{{Dest: "/c", Input: input, Source: ".", Writable: true, Cache: &engine.CacheMount{ID: id}}}
	}
	// steps has a step for each script on one cache mount, and what they saw in /1, /2 …
	steps := func(id string, input int, ignore bool, marks ...string) *engine.Graph {
		g := &graph{}
		last := g.root()
		seed := g.copy(g.add(local("context")), "/used", "/")
		for i, m := range marks {
			last = g.run(fmt.Sprintf("echo $(ls /c) > /%d; touch /c/%s", i+1, m), cacheMount(id, input), last, nil, seed)
			last.IgnoreCache = ignore
		}
		return &g.Graph
	}
	for _, c := range []struct {
		id     string
		input  int // 1: nothing, 2: something
		ignore bool
		mark   string
		want   string
	}{
		{"one", 1, false, "a", ""},
		{"one", 1, false, "b", "a"},
		{"one", 2, false, "c", "f link"},
		{"other", 1, false, "d", ""},
		{"one", 1, true, "e", ""},
		{"one", 1, false, "f", "e"},
		{"one", 2, false, "g", "c f link"},
		{"other", 1, false, "h", "d"},
		{"one", 2, true, "i", "f link"},
		{"one", 1, false, "j", "e f"},
	} {
		fs, n, _, err := b.solve(t, boundFiles(), steps(c.id, c.input, c.ignore, c.mark))
		if err != nil || n != 1 {
			t.Fatalf("%+v: %d steps: %v", c, n, err)
		}
		if got := strings.TrimSpace(content(t, fs, "1")); got != c.want {
			t.Errorf("%+v: in the mount there is %q", c, got)
		}
	}
	// Once in a build, whose second step finds what the first one left.
	fs, _, _, err := b.solve(t, boundFiles(), steps("one", 1, true, "k", "l"))
	if err != nil || strings.TrimSpace(content(t, fs, "2")) != "k" {
		t.Errorf("the second step sees %q: %v", content(t, fs, "2"), err)
	}
	solver := engine.New(b.config(boundFiles(), nil))
	defer solver.Close()
	for _, mark := range []string{"m", "n"} {
		res, err := solver.Solve(t.Context(), steps("one", 1, true, mark), engine.Watch{})
		if err != nil {
			t.Fatal(err)
		}
		tr, err := solver.Tree(t.Context(), res)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := strings.TrimSpace(content(t, tr, "1")), map[string]string{"m": "", "n": "m"}[mark]; got != want {
			t.Errorf("step %s of the build sees %q, want %q", mark, got, want)
		}
	}
}

// notes is a sink of what is said of cache mounts that are shared.
type notes struct {
	mu  sync.Mutex
	all []string
}

// Send implements progress.Sink.
func (n *notes) Send(e progress.Event) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if e.Kind == progress.Note && strings.Contains(e.Text, "several steps at once") {
		n.all = append(n.all, e.Text)
	}
}

// TestSharedCacheIsTold: steps that run at the same time with one shared cache mount do not see
// each other's files, and it is said once; not of steps that take turns.
func TestSharedCacheIsTold(t *testing.T) {
	b := newBed(t)
	for _, c := range []struct {
		name    string
		sharing cachemount.Sharing
		chained bool // one step after the other
		want    int
	}{{"shared", cachemount.Shared, false, 1}, {"locked", cachemount.Locked, false, 0}, {"private", cachemount.Private, false, 0}, {"chained", cachemount.Shared, true, 0}} {
		g := &graph{}
		root := g.root()
		var ends []*engine.Op
		from := root
		for _, mine := range []string{"a", "b"} {
			m := []engine.Mount{{Dest: "/c", Input: 1, Source: ".", Writable: true, Cache: &engine.CacheMount{ID: c.name, Sharing: c.sharing}}}
			op := g.run("touch /c/"+mine+"; sleep 1; ls /c > /"+mine, m, from, nil)
			if ends = append(ends, op); c.chained {
				from = op
			}
		}
		if !c.chained {
			g.add(&engine.Merge{}, ends...)
		}
		var said notes
		config := b.config(nil, nil)
		config.Progress, config.Parallel = progress.NewRecorder(&said), 2
		solver := engine.New(config)
		solver.SetPatience(time.Millisecond)
		res, err := solver.Solve(t.Context(), &g.Graph, engine.Watch{})
		if err != nil {
			t.Fatal(err)
		}
		tr, err := solver.Tree(t.Context(), res)
		if err != nil {
			t.Fatal(err)
		}
		seen := content(t, tr, "a") + content(t, tr, "b")
		if len(said.all) != c.want || c.want > 0 && seen != "a\nb\n" {
			t.Errorf("%s: said %q; the steps saw %q", c.name, said.all, seen)
		}
		if err := solver.Close(); err != nil {
			t.Error(err)
		}
	}
}
