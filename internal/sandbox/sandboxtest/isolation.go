package sandboxtest

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/sandbox"
)

func testEnvironment(t *testing.T, h *harness) {
	t.Setenv("KILN_CANARY", "secret")
	s := h.start(t, nil)
	o := run(t, s, sandbox.Process{Args: []string{"env"}, Env: []string{path, "A=1", "B=two words", "C=\xff\xfe", "E="}, Cwd: "/"})
	if o.err != nil {
		t.Fatal(o.err)
	}
	o.wantOut(t, path+"\nA=1\nB=two words\nC=\xff\xfe\nE=\n")
	o = run(t, s, sandbox.Process{Args: []string{"/bin/env"}, Cwd: "/"})
	o.wantOut(t, "")
}

func testArguments(t *testing.T, h *harness) {
	args := []string{"/bin/printf", "[%s]", "a b", "", "\xff", "'\"$HOME", "new\nline", strings.Repeat("x", 100000)}
	o := run(t, h.start(t, nil), sandbox.Process{Args: args, Cwd: "/"})
	if want := "[" + strings.Join(args[2:], "][") + "]"; o.out != want {
		t.Errorf("got %.200q", o.out)
	}
}

func testDescriptors(t *testing.T, h *harness) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	o := sh(t, h.start(t, nil, h.base, h.tools), "exec guesttool fds")
	o.wantOut(t, "0 20000\n1 10000\n2 10000\n")                           // a character device and two pipes
	if o := h.once(t, "exec ls /proc/self/fd"); o.out != "0\n1\n2\n3\n" { // ls' own is 3
		t.Errorf("/proc/self/fd has %q", o.out)
	}
}

func testLimits(t *testing.T, h *harness) {
	o := sh(t, h.start(t, nil, h.base, h.tools), "guesttool nonewprivs; exec guesttool limits")
	if !strings.HasPrefix(o.out, "0\n1048576 1048576\n") {
		t.Errorf("got %q", o.out)
	}
}

// testNoHostPaths searches everything that tells of a builder.
func testNoHostPaths(t *testing.T, h *harness) {
	const canary = "canary-4f2a"
	d := filepath.Join(scratchDir(t), canary)
	if err := os.Mkdir(d, 0o700); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(d)
	t.Setenv("SECRET", canary)
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	s := h.start(t, func(c *sandbox.Config) { c.Dir = d })
	o := sh(t, s, `for f in mounts mountinfo maps cmdline environ status stat; do cat /proc/self/$f /proc/1/$f 2>/dev/null | tr '\0' '\n'; done
		cat /proc/mounts /proc/cmdline /proc/version /proc/filesystems; ls -l /proc/*/exe /proc/*/cwd /proc/*/root /proc/*/fd /proc/*/map_files 2>/dev/null
		ls -laR /dev /run /tmp /sys/fs 2>/dev/null; ps; env`)
	for _, bad := range []string{canary, d, wd, os.TempDir() + "/", "kiln-sandbox", filepath.Base(os.Args[0])} {
		if bad != "/" && strings.Contains(o.out, bad) {
			t.Errorf("the guest sees %q:\n%s", bad, o.out)
		}
	}
	if n := strings.Count(h.once(t, "ls /proc").out, "\n"); n < 5 {
		t.Errorf("/proc is empty")
	}
	h.once(t, "echo $$; echo $PPID").wantOut(t, "1\n0\n")
}

func testHostname(t *testing.T, h *harness) {
	s := h.start(t, func(c *sandbox.Config) { c.Hostname = "builder.example" })
	sh(t, s, "hostname; uname -n").wantOut(t, "builder.example\nbuilder.example\n")
}

func testNetwork(t *testing.T, h *harness) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan string, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		b, _ := io.ReadAll(c)
		got <- string(b)
	}()
	sh(t, h.start(t, nil, h.base, h.tools), "guesttool dial "+l.Addr().String())
	select {
	case s := <-got:
		if s != "hello from the guest" {
			t.Errorf("got %q", s)
		}
	case <-time.After(5 * time.Second):
		t.Error("nothing arrived")
	}
}

func testNetworkNone(t *testing.T, h *harness) {
	if h.opts.NoNetworkNone {
		t.Skip("this sandbox has no network of its own here")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := h.start(t, func(c *sandbox.Config) { c.Network = false }, h.base, h.tools)
	o := sh(t, s, "guesttool dial "+l.Addr().String()+" 2>&1 && echo reached the host; ip -o link | wc -l; ip -o link | grep -c ': lo'; "+
		"nc -l -p 5000 > /got & sleep 0.3; echo hi | nc -w 2 127.0.0.1 5000; wait; cat /got")
	if strings.Contains(o.out, "reached the host") || !strings.HasSuffix(o.out, "1\n1\nhi\n") {
		t.Errorf("output:\n%s", o.out)
	}
}

func testCancel(t *testing.T, h *harness) {
	for name, script := range map[string]string{
		"sleeping": "echo ready; sleep 1000", "spinning": "echo ready; while :; do :; done",
		"ignoring": "trap '' TERM INT HUP; echo ready; sleep 1000", "printing": "echo ready; yes",
		"many": "for i in $(seq 40); do sleep 1000 & done; echo ready; wait",
	} {
		t.Run(name, func(t *testing.T) {
			s := h.start(t, nil)
			ctx, cancel := context.WithCancelCause(context.Background())
			defer cancel(nil)
			w := &onWrite{do: func() { time.AfterFunc(50*time.Millisecond, func() { cancel(errStopped) }) }}
			begin := time.Now()
			err := s.Run(ctx, shell(script), w, io.Discard)
			if err != errStopped { //nolint:errorlint // it is promised to be the cause itself
				t.Errorf("got %v, want the context's cause", err)
			}
			if d := time.Since(begin); d > 5*time.Second {
				t.Errorf("took %s", d)
			}
			if err := s.Run(context.Background(), shell("true"), io.Discard, io.Discard); err == nil {
				t.Error("the session goes on")
			}
		})
	}
	t.Run("before", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(context.Background())
		cancel(errStopped)
		if err := h.start(t, nil).Run(ctx, shell("true"), io.Discard, io.Discard); err != errStopped { //nolint:errorlint
			t.Errorf("got %v", err)
		}
		if _, err := h.box.Start(ctx, sandbox.Config{Layers: []string{h.base}, Dir: scratchDir(t)}); err != errStopped { //nolint:errorlint
			t.Errorf("start: %v", err)
		}
	})
	t.Run("session", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(context.Background())
		defer cancel(nil)
		s, err := h.box.Start(ctx, sandbox.Config{Layers: []string{h.base}, Dir: scratchDir(t)})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		w := &onWrite{do: func() { cancel(errStopped) }}
		if err := s.Run(context.Background(), shell("echo ready; sleep 1000"), w, io.Discard); err != errStopped { //nolint:errorlint
			t.Errorf("got %v", err)
		}
	})
}

type stopped struct{}

func (stopped) Error() string { return "stopped by the test" }

var errStopped error = stopped{}

// onWrite calls a function at the first write.
type onWrite struct {
	do   func()
	done bool
}

func (w *onWrite) Write(b []byte) (int, error) {
	if !w.done {
		w.done = true
		w.do()
	}
	return len(b), nil
}

func testClose(t *testing.T, h *harness) {
	s := h.start(t, nil)
	sh(t, s, "true")
	for range 2 {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	if err := s.Run(context.Background(), shell("true"), io.Discard, io.Discard); err == nil {
		t.Error("a closed session ran a process")
	}
}

// failing is a writer that fails.
type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, errStopped }

func testFailingWriters(t *testing.T, h *harness) {
	for name, run := range map[string]func(sandbox.Session) error{
		"output": func(s sandbox.Session) error {
			return s.Run(context.Background(), shell("echo x; sleep 1000"), failing{}, io.Discard)
		},
		"changes": func(s sandbox.Session) error {
			return s.Run(context.Background(), shell("echo x > /f"), io.Discard, failing{})
		},
	} {
		if err := run(h.start(t, nil)); err == nil || !strings.Contains(err.Error(), "stopped by the test") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func testParallel(t *testing.T, h *harness) {
	errs := make(chan error, 3)
	for i := range 3 {
		s := h.start(t, nil)
		go func() {
			var err error
			for range 5 {
				if err = s.Run(context.Background(), shell("echo $(cat /n 2>/dev/null)"+itoa(int64(i))+" > /n; sleep 0.05"), io.Discard, io.Discard); err != nil {
					break
				}
			}
			errs <- err
		}()
	}
	for range 3 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

func testIPCEnds(t *testing.T, h *harness) {
	s := h.start(t, nil)
	sh(t, s, "test -d /dev/mqueue; touch /dev/mqueue/left 2>/dev/null; true")
	sh(t, s, "ls /dev/mqueue").wantOut(t, "")
}
