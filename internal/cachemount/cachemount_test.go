package cachemount

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/kiln-build/kiln/internal/tree"
)

// The test binary, run again, is another process.
func TestMain(m *testing.M) {
	role := os.Getenv("KILN_CACHEMOUNT_ROLE")
	if role == "" {
		os.Exit(m.Run())
	}
	if err := play(role, os.Getenv("KILN_CACHEMOUNT_ROOT")); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

func play(role, root string) error {
	st, err := store.Open(root)
	if err != nil {
		return err
	}
	ctx := context.Background()
	release, err := st.Use(ctx)
	if err != nil {
		return err
	}
	defer release()
	s := New(st)
	switch role {
	case "hold":
		m, err := s.Acquire(ctx, Key{ID: "x"}, Locked, nil, nil)
		if err != nil {
			return err
		}
		defer m.Release()
		fmt.Println("have it")
		time.Sleep(time.Minute)
		return nil
	case "add": // for ever, and says what is safely in
		for i := 0; ; i++ {
			if err := addOne(ctx, s, fmt.Sprintf("%d-%d", os.Getpid(), i)); err != nil {
				return err
			}
			fmt.Println("added", fmt.Sprintf("%d-%d", os.Getpid(), i))
		}
	}
	return errors.New("unknown role")
}

// addOne is a step that writes a file.
func addOne(ctx context.Context, s *Store, name string) error {
	m, err := s.Acquire(ctx, Key{ID: "x"}, Shared, nil, nil)
	if err != nil {
		return err
	}
	defer m.Release()
	l, err := fileLayer(ctx, s.st, name, 100)
	if err != nil {
		return err
	}
	return m.Add(ctx, l)
}

func fileLayer(ctx context.Context, st *store.Store, name string, size int) (image.Layer, error) {
	return image.Commit(ctx, st, image.CommitOptions{}, func(w io.Writer) error {
		tw := layer.NewTarWriter(w)
		if err := tw.Add(name, tree.Node{Mode: tree.ModeRegular | 0o644, Size: int64(size)}, "", func() (io.ReadCloser, error) {
			return io.NopCloser(strings.NewReader(strings.Repeat("x", size))), nil
		}); err != nil {
			return err
		}
		return tw.Close()
	})
}

func open(t *testing.T) (context.Context, *Store) {
	t.Helper()
	st, err := store.Open(filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	return t.Context(), New(st)
}

func acquire(t *testing.T, s *Store, k Key, sh Sharing) *Mount {
	t.Helper()
	m, err := s.Acquire(t.Context(), k, sh, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Release)
	return m
}

// add puts a file of a size into a mount.
func add(t *testing.T, m *Mount, name string, size int) image.Layer {
	t.Helper()
	l, err := fileLayer(t.Context(), m.s.st, name, size)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Add(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	return l
}

// names are what a mount has in it.
func names(t *testing.T, s *Store, ls []image.Layer) string {
	t.Helper()
	rs, err := s.open(ls)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(rs)
	var ts []tree.Tree
	for _, r := range rs {
		ts = append(ts, r)
	}
	es, err := rootfs.New(ts...).ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range es {
		out = append(out, e.Name)
	}
	return strings.Join(out, " ")
}

// TestShared: steps that use a mount at the same time see what was there when they began, and
// of what they leave nothing is lost.
func TestShared(t *testing.T) {
	_, s := open(t)
	k := Key{ID: "x"}
	add(t, acquire(t, s, k, Shared), "first", 10)
	a, b := acquire(t, s, k, Shared), acquire(t, s, k, Shared)
	if got := names(t, s, a.Layers); got != "first" {
		t.Errorf("a step sees %q", got)
	}
	add(t, a, "a", 10)
	add(t, b, "b", 10)
	if got := names(t, s, acquire(t, s, k, Shared).Layers); got != "a b first" {
		t.Errorf("the next step sees %q", got)
	}
	for _, other := range []Key{{ID: "y"}, {ID: "x", Base: "b"}} {
		if m := acquire(t, s, other, Shared); len(m.Layers) > 0 {
			t.Errorf("%v has layers", other)
		}
	}
	var wg sync.WaitGroup
	for i := range 30 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := addOne(t.Context(), s, fmt.Sprintf("z%02d", i)); err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	if got := len(strings.Fields(names(t, s, acquire(t, s, k, Shared).Layers))); got != 33 {
		t.Errorf("%d files, want 33", got)
	}
}

// TestPrivate: nobody has a private mount with another, and those that are free are used again.
func TestPrivate(t *testing.T) {
	_, s := open(t)
	k := Key{ID: "x"}
	a, b := acquire(t, s, k, Private), acquire(t, s, k, Private)
	add(t, a, "a", 10)
	add(t, b, "b", 10)
	a.Release()
	c := acquire(t, s, k, Private)
	if got := names(t, s, c.Layers); got != "a" {
		t.Errorf("the free one has %q", got)
	}
	d := acquire(t, s, k, Private)
	if d.Key.Instance != 2 || len(d.Layers) > 0 {
		t.Errorf("a third is %+v", d.Key)
	}
	b.Release()
	b.Release()
	if got := names(t, s, acquire(t, s, k, Private).Layers); got != "b" {
		t.Errorf("the free one has %q", got)
	}
}

// child runs the test binary in a role and returns what it prints.
func child(t *testing.T, s *Store, role string) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "KILN_CACHEMOUNT_ROLE="+role, "KILN_CACHEMOUNT_ROOT="+s.st.Root())
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd, bufio.NewScanner(out)
}

// TestLocked: one waits for the other, in this process and in another, even if that is killed.
func TestLocked(t *testing.T) {
	ctx, s := open(t)
	cmd, out := child(t, s, "hold")
	if !out.Scan() || out.Text() != "have it" {
		t.Fatal(out.Text())
	}
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if _, err := s.Acquire(short, Key{ID: "x"}, Locked, nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("two processes have it: %v", err)
	}
	if m := acquire(t, s, Key{ID: "x"}, Private); m.Key.Instance != 1 {
		t.Error("a private mount is one that another process has locked")
	}
	got, waits := make(chan *Mount), make(chan struct{})
	go func() {
		m, err := s.Acquire(ctx, Key{ID: "x"}, Locked, nil, func() { close(waits) })
		if err != nil {
			t.Error(err)
		}
		got <- m
	}()
	select {
	case <-got:
		t.Fatal("two processes have it")
	case <-waits:
	}
	_ = cmd.Process.Kill()
	select {
	case m := <-got:
		add(t, m, "a", 10)
		m.Release()
	case <-time.After(30 * time.Second):
		t.Fatal("the lock of a killed process is never free")
	}
	if got := names(t, s, acquire(t, s, Key{ID: "x"}, Locked).Layers); got != "a" {
		t.Errorf("it has %q", got)
	}
}

// TestKilled: wherever a process is killed, what it had added is there.
func TestKilled(t *testing.T) {
	_, s := open(t)
	want := map[string]bool{}
	for range 5 {
		var cmds []*exec.Cmd
		var wg sync.WaitGroup
		var mu sync.Mutex
		for range 2 {
			cmd, out := child(t, s, "add")
			cmds = append(cmds, cmd)
			wg.Add(1)
			go func() {
				defer wg.Done()
				for out.Scan() {
					name, ok := strings.CutPrefix(out.Text(), "added ")
					if !ok {
						t.Error(out.Text())
					}
					mu.Lock()
					want[name] = true
					mu.Unlock()
				}
			}()
		}
		time.Sleep(200*time.Millisecond + time.Duration(rand.IntN(200))*time.Millisecond)
		for _, c := range cmds {
			_ = c.Process.Kill()
		}
		wg.Wait()
		m := acquire(t, s, Key{ID: "x"}, Shared)
		have := map[string]bool{}
		for _, n := range strings.Fields(names(t, s, m.Layers)) {
			have[n] = true
		}
		for n := range want {
			if !have[n] {
				t.Errorf("%s is lost", n)
			}
		}
		if len(m.Layers) > maxDepth+1 {
			t.Errorf("%d layers", len(m.Layers))
		}
	}
	if len(want) == 0 {
		t.Error("nothing was tested")
	}
	t.Logf("%d steps", len(want))
}

// TestDepth: a stack does not get deep, and a large layer at its bottom is not written again and again.
func TestDepth(t *testing.T) {
	ctx, s := open(t)
	base, err := fileLayer(ctx, s.st, "base", 50)
	if err != nil {
		t.Fatal(err)
	}
	k := Key{ID: "x", Base: "base"}
	var large image.Layer
	for i := range 60 {
		m, err := s.Acquire(ctx, k, Locked, []image.Layer{base}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if l := m.Layers; len(l) > 1+maxDepth || l[0].DiffID != base.DiffID {
			t.Fatalf("step %d: %d layers", i, len(l))
		}
		if i == 0 {
			large = add(t, m, "large", 1<<20)
		} else {
			add(t, m, fmt.Sprintf("f%02d", i), 1000)
		}
		if i > 0 && m.Layers[min(1, len(m.Layers)-1)].DiffID != large.DiffID {
			t.Errorf("step %d: the large layer was written again", i)
		}
		m.Release()
	}
	m := acquire(t, s, k, Locked)
	if got := len(strings.Fields(names(t, s, m.Layers))); got != 61 {
		t.Errorf("%d files", got)
	}
}

// TestWrittenOver: what was written over is not kept.
func TestWrittenOver(t *testing.T) {
	_, s := open(t)
	for i := range 20 {
		m := acquire(t, s, Key{ID: "x"}, Shared)
		if len(m.Layers) > 2 {
			t.Fatalf("step %d: %d layers", i, len(m.Layers))
		}
		add(t, m, "same", 100_000+i)
	}
	infos, err := s.List(t.Context())
	if err != nil || len(infos) != 1 || infos[0].Size > 250_000 {
		t.Errorf("%+v %v", infos, err)
	}
}

// TestLostLayer: a mount of which a layer is gone or damaged begins anew.
func TestLostLayer(t *testing.T) {
	ctx, s := open(t)
	for name, spoil := range map[string]func(path string) error{
		"gone": os.Remove,
		"damaged": func(path string) error {
			if err := os.Chmod(path, 0o600); err != nil {
				return err
			}
			return os.Truncate(path, 100)
		},
	} {
		k := Key{ID: name}
		m := acquire(t, s, k, Shared)
		add(t, m, "kept", 10)
		add(t, m, name, 20)
		if err := spoil(s.st.LayerPath(acquire(t, s, k, Shared).Layers[0].DiffID)); err != nil {
			t.Fatal(err)
		}
		base, err := fileLayer(ctx, s.st, "base", 5)
		if err != nil {
			t.Fatal(err)
		}
		m, err = s.Acquire(ctx, k, Shared, []image.Layer{base}, nil)
		if err != nil || names(t, s, m.Layers) != "base" {
			t.Errorf("%s: %v %v", name, m, err)
		}
		add(t, m, "new", 10)
		if got := names(t, s, acquire(t, s, k, Shared).Layers); got != "base new" {
			t.Errorf("%s: then it has %q", name, got)
		}
	}
	if err := s.st.PutRecord(RecordKind, Key{ID: "odd"}.record(), []byte(`{"Layers":[{"diffID":"../../x"}]}`)); err != nil {
		t.Fatal(err)
	}
	if m := acquire(t, s, Key{ID: "odd"}, Shared); len(m.Layers) > 0 {
		t.Error("a record that makes no sense is read")
	}
}

// TestPrune: the store's Prune knows what cache mounts need, and drops them with the build cache.
func TestPrune(t *testing.T) {
	ctx, s := open(t)
	k := Key{ID: "x"}
	m := acquire(t, s, k, Shared)
	l := add(t, m, "a", 1000)
	infos, err := s.List(ctx)
	if err != nil || len(infos) != 1 || infos[0].ID != "x" || infos[0].Size < 1000 || len(infos[0].Layers) != 1 || time.Since(infos[0].Used) > time.Minute {
		t.Errorf("%+v %v", infos, err)
	}
	if _, err := s.st.Prune(ctx, store.PruneOptions{KeepFor: time.Hour}); err != nil || !s.st.HasLayer(l.DiffID) {
		t.Errorf("a layer of a mount that was just used is gone: %v", err)
	}
	release, err := s.st.Use(ctx)
	if err != nil {
		t.Fatal(err)
	}
	m = acquire(t, s, k, Shared)
	if _, err := s.st.Prune(ctx, store.PruneOptions{}); err != nil || !s.st.HasLayer(l.DiffID) {
		t.Errorf("a layer that a running build uses is gone: %v", err)
	}
	add(t, m, "b", 10)
	release()
	if got := names(t, s, acquire(t, s, k, Shared).Layers); got != "a b" {
		t.Errorf("it has %q", got)
	}
	if err := s.Remove(k); err != nil {
		t.Fatal(err)
	}
	if m := acquire(t, s, k, Shared); len(m.Layers) > 0 {
		t.Error("a removed mount is there")
	}
	rep, err := s.st.Prune(ctx, store.PruneOptions{})
	if err != nil || rep.Layers != 2 || s.st.HasLayer(l.DiffID) {
		t.Errorf("%+v %v", rep, err)
	}
}
