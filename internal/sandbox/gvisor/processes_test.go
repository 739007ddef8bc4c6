package gvisor

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/sandbox"
	"github.com/kiln-build/kiln/internal/sandbox/sandboxtest"
)

// process is a line of ps.
type process struct {
	pid, ppid int
	state     string
}

// processes lists all of the machine's.
func processes(t *testing.T) map[int]process {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	ps := map[int]process{}
	for _, f := range stats {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // just gone
		}
		var p process
		fmt.Sscan(string(b[:bytes.IndexByte(b, '(')]), &p.pid)
		fmt.Sscan(string(b[bytes.LastIndexByte(b, ')')+1:]), &p.state, &p.ppid)
		ps[p.pid] = p
	}
	return ps
}

// below lists a shim and its descendants: the sentry and all stubs.
func below(t *testing.T, shim int) []process {
	t.Helper()
	all := processes(t)
	var found []process
	for pid, p := range all {
		for at := pid; at > 1; at = all[at].ppid {
			if at == shim {
				found = append(found, p)
				break
			}
		}
	}
	return found
}

// remain are those of ps that still exist, be it as zombies.
func remain(t *testing.T, ps []process) []process {
	t.Helper()
	all := processes(t)
	var left []process
	for _, p := range ps {
		if q, ok := all[p.pid]; ok {
			left = append(left, q)
		}
	}
	return left
}

// sentryOf is the shim's child.
func sentryOf(t *testing.T, shim int) int {
	t.Helper()
	for _, p := range below(t, shim) {
		if p.ppid == shim && bytes.Contains(procFile(t, p.pid, "cmdline"), []byte(roleSentry)) {
			return p.pid
		}
	}
	t.Error("no sentry found")
	return 0
}

func procFile(t *testing.T, pid int, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func startSession(t *testing.T, s *Sandbox, layers ...string) *session {
	t.Helper()
	if layers == nil {
		layers = []string{sandboxtest.BaseLayer(t)}
	}
	sess, err := s.startChosen(context.Background(), sandbox.Config{Layers: layers, Dir: t.TempDir(), Network: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sess.Close() })
	return sess
}

// ready is a writer that tells when something was written.
type ready struct{ c chan struct{} }

func newReady() ready { return ready{make(chan struct{}, 1000)} }

func (r ready) Write(b []byte) (int, error) {
	select {
	case r.c <- struct{}{}:
	default:
	}
	return len(b), nil
}

// many starts enough processes for their stubs to be of interest.
const many = "for i in $(seq 20); do sleep 1000 & done; echo ready; wait"

func TestNothingIsLeft(t *testing.T) {
	sess := startSession(t, New(Options{}))
	shim := sess.shim.Pid
	for range 3 {
		if err := sess.Run(context.Background(), sandboxtest.Shell("for i in $(seq 10); do sleep 0.01 & done; (sleep 1000 &)"), io.Discard, io.Discard); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := newReady()
	var ps []process
	var begin time.Time
	go func() {
		<-r.c
		ps = below(t, shim)
		begin = time.Now()
		cancel()
	}()
	if err := sess.Run(ctx, sandboxtest.Shell(many), r, io.Discard); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	t.Logf("cancelled and gone in %s", time.Since(begin))
	if len(ps) < 20 {
		t.Errorf("only %d processes ran", len(ps))
	}
	if left := remain(t, ps); len(left) > 0 {
		t.Errorf("left behind: %+v", left)
	}
}

// TestProcesses: what the sandbox's own processes have of the builder.
func TestProcesses(t *testing.T) {
	t.Setenv("KILN_CANARY", "secret")
	sess := startSession(t, New(Options{}))
	r := newReady()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- sess.Run(ctx, sandboxtest.Shell("echo ready; sleep 1000"), r, io.Discard) }()
	<-r.c
	shim, sentry := sess.shim.Pid, sentryOf(t, sess.shim.Pid)
	for _, pid := range []int{shim, sentry} {
		if b := procFile(t, pid, "environ"); len(b) > 0 {
			t.Errorf("environment of %d is %q", pid, b)
		}
		if cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); cwd != "/" {
			t.Errorf("directory of %d is %q, %v", pid, cwd, err)
		}
		cmdline := string(procFile(t, pid, "cmdline"))
		if !strings.HasPrefix(cmdline, argv0+"\x00") || strings.Contains(cmdline, "/") {
			t.Errorf("arguments of %d are %q", pid, cmdline)
		}
	}
	if s := string(procFile(t, sentry, "status")); !strings.Contains(s, "Seccomp:\t2") || !strings.Contains(s, "NoNewPrivs:\t1") {
		t.Errorf("the sentry is not confined:\n%s", s)
	}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", sentry))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range fds {
		target, err := os.Readlink(f)
		if err != nil {
			continue
		}
		// The layer and upper files; and what Go's runtime and hostinet read
		// of the kernel itself.
		ours := strings.HasPrefix(target, os.TempDir()) || strings.HasPrefix(target, "/memfd:") || target == os.DevNull
		kernels := strings.HasPrefix(target, "/proc/") || strings.HasPrefix(target, "/sys/fs/cgroup/")
		if strings.HasPrefix(target, "/") && !ours && !kernels {
			t.Errorf("the sentry has %s -> %s", f, target)
		}
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// TestBuilder is no test: it is the builder that TestKilledBuilder kills.
func TestBuilder(t *testing.T) {
	if os.Getenv("KILN_TEST_BUILDER") == "" {
		t.Skip("run by TestKilledBuilder")
	}
	sess := startSession(t, New(Options{}))
	r := newReady()
	go func() {
		<-r.c
		fmt.Printf("shim %d\n", sess.shim.Pid)
	}()
	_ = sess.Run(context.Background(), sandboxtest.Shell(many), r, io.Discard)
}

func TestKilledBuilder(t *testing.T) {
	cmd := exec.Command("/proc/self/exe", "-test.run", "^TestBuilder$")
	cmd.Env = append(os.Environ(), "KILN_TEST_BUILDER=1", "TMPDIR="+t.TempDir())
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	shim := 0
	for sc := bufio.NewScanner(out); shim == 0 && sc.Scan(); {
		fmt.Sscanf(sc.Text(), "shim %d", &shim)
	}
	if shim == 0 {
		t.Fatal("no shim was started")
	}
	ps := below(t, shim)
	if len(ps) < 20 {
		t.Fatalf("only %d processes run", len(ps))
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	begin := time.Now()
	var left []process
	for time.Since(begin) < 2*time.Second {
		left = left[:0]
		for _, p := range remain(t, ps) {
			// The shim itself is process 1's to reap, whoever that is.
			if p.pid != shim || p.state != "Z" {
				left = append(left, p)
			}
		}
		if len(left) == 0 {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if d := time.Since(begin); len(left) > 0 || d > time.Second {
		t.Errorf("after %s: %+v", d, left)
	}
}

// TestKilledSentry: the kernel's out-of-memory killer sends SIGKILL.
func TestKilledSentry(t *testing.T) {
	for name, x := range map[string]struct {
		signal syscall.Signal
		check  func(*testing.T, error)
	}{
		"killed": {syscall.SIGKILL, func(t *testing.T, err error) {
			var e *sandbox.ExitError
			if !errors.As(err, &e) || !e.OutOfMemory || e.Code != 137 || e.Signal != syscall.SIGKILL || !strings.Contains(e.Detail, "memory") {
				t.Errorf("got %+v", err)
			}
		}},
		"crashed": {syscall.SIGABRT, func(t *testing.T, err error) {
			var e *sandbox.ExitError
			if err == nil || errors.As(err, &e) || !strings.Contains(err.Error(), "SIGABRT") {
				t.Errorf("got %v", err)
			}
		}},
		"forbidden": {syscall.SIGSYS, func(t *testing.T, err error) {
			if err == nil || strings.Contains(err.Error(), "panic") && !strings.Contains(err.Error(), "SIGSYS") {
				t.Errorf("got %v", err)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			sess := startSession(t, New(Options{}))
			shim := sess.shim.Pid
			r := newReady()
			var ps []process
			go func() {
				<-r.c
				ps = below(t, shim)
				_ = syscall.Kill(sentryOf(t, shim), x.signal)
			}()
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			x.check(t, sess.Run(ctx, sandboxtest.Shell(many), r, io.Discard))
			if left := remain(t, ps); len(ps) < 20 || len(left) > 0 {
				t.Errorf("of %d processes are left: %+v", len(ps), left)
			}
		})
	}
}

// TestKilledStub: the out-of-memory killer may choose a stub as well.
func TestKilledStub(t *testing.T) {
	sess := startSession(t, New(Options{}))
	shim := sess.shim.Pid
	r := newReady()
	go func() {
		<-r.c
		sentry := sentryOf(t, shim)
		for _, p := range below(t, shim) {
			if p.pid != shim && p.pid != sentry {
				_ = syscall.Kill(p.pid, syscall.SIGKILL)
			}
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err := sess.Run(ctx, sandboxtest.Shell("echo ready; while :; do :; done"), r, io.Discard)
	t.Logf("got %v", err)
	if err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

// TestTornChanges: a sentry that dies while it writes a layer.
func TestTornChanges(t *testing.T) {
	sess := startSession(t, New(Options{}))
	shim := sess.shim.Pid
	r := newReady()
	go func() {
		<-r.c
		_ = syscall.Kill(sentryOf(t, shim), syscall.SIGKILL)
	}()
	if err := sess.Run(context.Background(), sandboxtest.Shell("dd if=/dev/zero of=/big bs=1M count=200"), io.Discard, &slow{r}); err == nil {
		t.Error("half a layer was taken for a whole one")
	}
}

type slow struct{ r ready }

func (s *slow) Write(b []byte) (int, error) {
	n, err := s.r.Write(b)
	time.Sleep(10 * time.Millisecond)
	return n, err
}
