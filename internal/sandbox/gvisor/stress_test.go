package gvisor

import (
	"context"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/sandbox"
	"github.com/kiln-build/kiln/internal/sandbox/sandboxtest"
)

// TestManyBoots boots sessions for a step that does nothing, 8 at a time, on a
// machine that has other things to do. KILN_BOOTS says how many, KILN_LOAD how
// many processes burn the processors, KILN_PLATFORM on what.
func TestManyBoots(t *testing.T) {
	boots := setting(t, "KILN_BOOTS", 16)
	if testing.Short() {
		boots = min(boots, 8)
	}
	for range setting(t, "KILN_LOAD", 2*runtime.NumCPU()) {
		burn := exec.Command("sh", "-c", "while :; do :; done")
		if err := burn.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = burn.Process.Kill()
			_ = burn.Wait()
		})
	}
	platforms := []string{Systrap, Ptrace}
	if p := os.Getenv("KILN_PLATFORM"); p != "" {
		platforms = []string{p}
	}
	layers := []string{sandboxtest.BaseLayer(t)}
	for _, p := range platforms {
		t.Run(p, func(t *testing.T) { manyBoots(t, p, layers, boots) })
	}
}

func manyBoots(t *testing.T, platform string, layers []string, n int) {
	t.Helper()
	s := New(Options{Platform: platform})
	var wg sync.WaitGroup
	next := make(chan int)
	var mu sync.Mutex
	var slowest time.Duration
	for range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range next {
				begin := time.Now()
				if err := bootTrue(t, s, platform, layers); err != nil {
					t.Errorf("boot %d, after %s: %v", i, time.Since(begin), err)
				}
				mu.Lock()
				slowest = max(slowest, time.Since(begin))
				mu.Unlock()
			}
		}()
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
	t.Logf("%d boots, the slowest in %s", n, slowest)
}

// bootTrue is a whole session, with the self-test that a builder's first one has.
func bootTrue(t *testing.T, s *Sandbox, platform string, layers []string) error {
	t.Helper()
	sess, err := s.start(context.Background(), platform, sandbox.Config{Layers: layers, Dir: t.TempDir(), Network: true}, true)
	if err != nil {
		return err
	}
	defer sess.Close()
	return sess.Run(context.Background(), sandboxtest.Shell("true"), io.Discard, io.Discard)
}

func setting(t *testing.T, name string, otherwise int) int {
	t.Helper()
	v := os.Getenv(name)
	if v == "" {
		return otherwise
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		t.Fatalf("%s=%q is not a number", name, v)
	}
	return n
}
