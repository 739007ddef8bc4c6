package engine_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/engine"
	"github.com/kiln-build/kiln/internal/sandbox"
	"github.com/kiln-build/kiln/internal/tree/memtree"
)

// several is a step whose results are its root, what it made of a context and what of nothing;
// and one more mount, that is read-only.
func several(g *graph, script string, root, context *engine.Op) *engine.Op {
	op := g.run(script, []engine.Mount{
		{Dest: "/in", Input: 1, Source: "used", Writable: true},
		{Dest: "/new", Input: 2, Source: ".", Writable: true},
		{Dest: "/ro", Input: 1, Source: "."},
	}, root, context, nil)
	op.Do.(*engine.Exec).Results = []int{0, engine.Root, 1, 2}
	return op
}

func (g *graph) target(op *engine.Op, index int) *graph {
	g.Target = engine.Input{Op: op, Index: index}
	return g
}

// TestResults: what a step makes of its mounts are results like its root file system, to go on
// from, to copy from and to remember.
func TestResults(t *testing.T) {
	b := newBed(t)
	const script = "cat /in/f > /new/copy; echo more > /in/more; rm /in/link; echo root > /root/r; ls /ro > /new/ls"
	build := func(files map[string]memtree.File, index int, want string, steps int32) {
		t.Helper()
		g := &graph{}
		op := several(g, script, g.root(), g.add(local("context")))
		fs, n, _, err := b.solve(t, files, &g.target(op, index).Graph)
		if err != nil || n != steps {
			t.Fatalf("%d steps, want %d; %v", n, steps, err)
		}
		var got []string
		for _, name := range []string{"used/f", "used/more", "used/link", "other", "bin/busybox", "root/r", "copy", "ls"} {
			if _, err := fs.Lstat(name); err == nil {
				got = append(got, name)
			}
		}
		if s := strings.Join(got, " "); s != want {
			t.Errorf("result %d has %s, want %s", index, s, want)
		}
	}
	build(boundFiles(), 0, "used/f used/more other", 1)
	build(boundFiles(), 1, "bin/busybox root/r", 0)
	build(boundFiles(), 2, "copy ls", 0)
	build(boundFiles(), 3, "used/f used/link other", 0)
	// All of a context that becomes a result counts, not just the part that is mounted.
	build(boundFiles("other", "changed"), 0, "used/f used/more other", 1)

	g := &graph{}
	one := several(g, script, g.root(), g.add(local("context")))
	two := g.run("cat /m/copy > /out; cat /m/ls >> /out; test -e /root/r; touch /m/x", []engine.Mount{{Dest: "/m", Input: 1, Source: ".", Writable: true}})
	two.Inputs = []engine.Input{{Op: one, Index: 1}, {Op: one, Index: 2}}
	two.Do.(*engine.Exec).Results = []int{engine.Root, 0}
	three := g.add(&engine.Merge{})
	three.Inputs = []engine.Input{{Op: two}, {Op: two, Index: 1}, {Op: one}}
	for range 2 {
		fs, n, starts, err := b.solve(t, boundFiles(), &g.target(three, 0).Graph)
		if err != nil || n > 1 || starts > 1 {
			t.Fatalf("%d steps in %d sessions; %v", n, starts, err)
		}
		if got := content(t, fs, "out"); got != "usedother\nused\n" {
			t.Errorf("the second step saw %q", got)
		}
		for _, name := range []string{"x", "copy", "used/more", "root/r"} {
			if _, err := fs.Lstat(name); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestReadOnlyRoot: a step that cannot write to its root may have a result all the same.
func TestReadOnlyRoot(t *testing.T) {
	b := newBed(t)
	g := &graph{}
	op := g.run("touch /x 2>/dev/null || echo no > /out/x", []engine.Mount{{Dest: "/out", Input: 1, Source: ".", Writable: true}}, g.root(), nil)
	x := op.Do.(*engine.Exec)
	x.ReadOnlyRoot, x.Results = true, []int{0}
	fs, n, _, err := b.solve(t, nil, &g.Graph)
	if err != nil || n != 1 || content(t, fs, "x") != "no\n" {
		t.Errorf("%d steps; %v", n, err)
	}
	if es, err := fs.ReadDir("."); err != nil || len(es) != 1 {
		t.Errorf("%v %v", es, err)
	}
}

// TestExitCodesAndLimits: a step may succeed with other exit codes, and has the limits it is given.
func TestExitCodesAndLimits(t *testing.T) {
	b := newBed(t)
	g := &graph{}
	op := g.run("ulimit -n > /out; exit 7", nil, g.root())
	x := op.Do.(*engine.Exec)
	x.Success, x.Ulimits = []int{7}, []engine.Ulimit{{Resource: 7, Soft: 123, Hard: 123}} // RLIMIT_NOFILE
	fs, _, _, err := b.solve(t, nil, &g.Graph)
	if err != nil || content(t, fs, "out") != "123\n" {
		t.Error(err)
	}
	x.Args = []string{"/bin/true"}
	var e *sandbox.ExitError
	if _, _, _, err := b.solve(t, nil, &g.Graph); !errors.As(err, &e) || e.Code != 0 {
		t.Errorf("exit code 0 of a step that must end with 7: %v", err)
	}
}

// TestMountCannotBeMade: it is the step's failure, and is said in words.
func TestMountCannotBeMade(t *testing.T) {
	b := newBed(t)
	g := &graph{}
	op := g.run("true", []engine.Mount{{Dest: "/bin/busybox", Input: 1, Source: "used"}}, g.root(), g.add(local("context")))
	op.At = &diag.Location{File: "Dockerfile", Line: 3}
	_, _, _, err := b.solve(t, boundFiles(), &g.Graph)
	if diag.ExitCode(err) != diag.ExitStep || !strings.Contains(err.Error(), `Dockerfile:3: cannot mount on "/bin/busybox": "/bin/busybox" is not a directory in the image, and a directory is to be mounted there`) {
		t.Errorf("%v, exit code %d", err, diag.ExitCode(err))
	}
}
