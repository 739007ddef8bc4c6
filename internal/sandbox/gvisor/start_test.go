package gvisor

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/sandbox"
	"github.com/kiln-build/kiln/internal/sandbox/sandboxtest"
)

func TestProbe(t *testing.T) {
	for _, p := range []string{"", Systrap, Ptrace} {
		s := New(Options{Platform: p})
		begin := time.Now()
		info, err := s.Probe(context.Background())
		if err != nil {
			t.Errorf("%q: %v", p, err)
		}
		if p != "" && info.Platform != p {
			t.Errorf("%q: got %+v", p, info)
		}
		t.Logf("%q: %+v in %s", p, info, time.Since(begin))
	}
	if _, err := New(Options{Platform: "kvm"}).Probe(context.Background()); diag.ExitCode(err) != diag.ExitUsage {
		t.Errorf("kvm: %v", err)
	}
}

// TestCannotBoot: an executable that is no sandbox boots on no platform.
func TestCannotBoot(t *testing.T) {
	s := New(Options{Executable: "/bin/false"})
	_, err := s.Start(context.Background(), sandbox.Config{Dir: t.TempDir()})
	if diag.ExitCode(err) != diag.ExitSandbox || !strings.Contains(err.Error(), Ptrace) {
		t.Errorf("got %v", err)
	}
	if _, err := New(Options{Executable: "/no/such/file"}).Start(context.Background(), sandbox.Config{Dir: t.TempDir()}); err == nil {
		t.Error("started a missing executable")
	}
}

func TestBadConfig(t *testing.T) {
	damaged := filepath.Join(t.TempDir(), "damaged")
	if err := os.WriteFile(damaged, []byte(strings.Repeat("no layer", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]sandbox.Config{
		"damaged layer":     {Layers: []string{damaged}, Dir: t.TempDir()},
		"missing layer":     {Layers: []string{"/no/such/layer"}, Dir: t.TempDir()},
		"missing directory": {Dir: "/no/such/directory"},
	} {
		_, err := New(Options{}).Start(context.Background(), c)
		if err == nil || diag.ExitCode(err) == diag.ExitSandbox {
			t.Errorf("%s: got %v", name, err)
		}
	}
	// What cannot be mounted on is found when a process is to run.
	s := New(Options{})
	sess, err := s.Start(context.Background(), sandbox.Config{
		Layers: []string{sandboxtest.BaseLayer(t)}, Dir: t.TempDir(), Files: map[string][]byte{"/etc/passwd/x": nil},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer sess.Close()
	if err := sess.Run(context.Background(), sandboxtest.Shell("true"), io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), `"/etc/passwd/x"`) {
		t.Errorf("got %v", err)
	}
}

// lockedBuffer is a debug log.
type lockedBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func TestDebugLog(t *testing.T) {
	var log lockedBuffer
	sess := startSession(t, New(Options{DebugLog: &log}))
	if err := sess.Run(context.Background(), sandboxtest.Shell("true"), io.Discard, io.Discard); err != nil {
		t.Fatal(err)
	}
	sess.Close()
	if !strings.Contains(log.b.String(), "EXEC:") {
		t.Error("the debug log says nothing of what was executed")
	}
}

// smallDisk mounts a small file system, if the test may.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	d := t.TempDir()
	if err := syscall.Mount("none", d, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("needs the right to mount: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(d, syscall.MNT_DETACH) })
	return d
}

func TestDiskFull(t *testing.T) {
	base := sandboxtest.BaseLayer(t)
	for name, script := range map[string]string{
		"write": "dd if=/dev/zero of=/big bs=1M",
		"mmap":  "for i in 1 2 3 4 5 6 7 8 9; do guesttool mmap /m$i || exit 1; dd if=/dev/zero of=/big$i bs=1M count=9 || exit 1; done",
	} {
		t.Run(name, func(t *testing.T) {
			sess, err := New(Options{}).Start(context.Background(), sandbox.Config{
				Layers: []string{base, sandboxtest.ToolLayer(t)}, Dir: smallDisk(t, "64m"),
			})
			if err != nil {
				t.Fatal(err)
			}
			defer sess.Close()
			var out strings.Builder
			err = sess.Run(context.Background(), sandboxtest.Shell(script), &out, io.Discard)
			var e *sandbox.ExitError
			if !errors.As(err, &e) || !e.DiskFull || e.Code != 1 {
				t.Errorf("got %+v; output %s", err, out.String())
			}
			if !strings.Contains(out.String(), "No space left on device") {
				t.Errorf("the guest saw %q", out.String())
			}
		})
	}
	t.Run("filled by others", func(t *testing.T) {
		d := smallDisk(t, "64m")
		sess, err := New(Options{}).Start(context.Background(), sandbox.Config{Layers: []string{base}, Dir: d})
		if err != nil {
			t.Fatal(err)
		}
		defer sess.Close()
		if err := os.WriteFile(filepath.Join(d, "other"), make([]byte, 60<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		err = sess.Run(context.Background(), sandboxtest.Shell("dd if=/dev/zero of=/big bs=1M count=30"), &out, io.Discard)
		var e *sandbox.ExitError
		if !errors.As(err, &e) || !e.DiskFull {
			t.Errorf("got %+v; output %s", err, out.String())
		}
	})
}
