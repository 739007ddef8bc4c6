package sandboxtest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/sandbox"
)

// echoServer answers every line with the same in capitals, and after the last with "bye".
func echoServer(t testing.TB) (dial func(context.Context) (net.Conn, error), open func() int) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	var mu sync.Mutex
	n := 0
	count := func(d int) {
		mu.Lock()
		defer mu.Unlock()
		n += d
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			count(1)
			go func() {
				defer count(-1)
				defer c.Close()
				for sc := bufio.NewScanner(c); sc.Scan(); {
					fmt.Fprintln(c, strings.ToUpper(sc.Text()))
				}
				fmt.Fprintln(c, "bye")
			}()
		}
	}()
	return func(ctx context.Context) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", l.Addr().String())
		}, func() int {
			mu.Lock()
			defer mu.Unlock()
			return n
		}
}

// testSocket: connections to a socket come out at the builder's Dial, any number, in both directions.
func testSocket(t *testing.T, h *harness) {
	dial, open := echoServer(t)
	dials := 0
	s := h.start(t, func(c *sandbox.Config) {
		c.Mounts = []sandbox.Mount{
			{Dest: "/run/deep/agent", Socket: &sandbox.Socket{Mode: 0o600, UID: 1000, GID: 50, Dial: dial}},
			{Dest: "/run/bad", Socket: &sandbox.Socket{Mode: 0o777, Dial: func(context.Context) (net.Conn, error) {
				dials++
				return nil, errors.New("nobody there")
			}}},
		}
	}, h.base, h.tools)
	for range 2 {
		o := sh(t, s, `stat -c '%F %a %u %g' /run/deep/agent; guesttool talk /run/deep/agent one two; for i in 1 2 3 4 5 6 7 8; do guesttool talk /run/deep/agent line$i >> /out & done; wait; sort /out | uniq -c | wc -l; rm /out
			guesttool talk /run/bad x; rm /run/deep/agent 2>&1 | grep -c busy`)
		o.wantOut(t, "socket 600 1000 50\nONE\nTWO\nbye\n9\n1\n")
		o.wantNames(t)
	}
	if dials != 2 {
		t.Errorf("%d connections to the other socket", dials)
	}
	p := sandbox.Process{Args: []string{"guesttool", "talk", "/run/deep/agent", "x"}, Env: []string{path}, User: sandbox.User{UID: 7, GID: 7}}
	o := run(t, s, p)
	o.wantExit(t, 1)
	if !strings.Contains(o.out, "permission denied") {
		t.Errorf("a user without permission: %q", o.out)
	}
	waitNone(t, open)
}

// testSocketLarge: as much as is wanted goes through, and a process that holds its connections
// until its end leaves none.
func testSocketLarge(t *testing.T, h *harness) {
	dial, open := echoServer(t)
	s := h.start(t, func(c *sandbox.Config) {
		c.Mounts = []sandbox.Mount{{Dest: "/agent", Socket: &sandbox.Socket{Mode: 0o666, Dial: dial}}}
	}, h.base, h.tools)
	o := run(t, s, sandbox.Process{Args: []string{"guesttool", "talk", "/agent", strings.Repeat("x", 60<<10)}, Env: []string{path}})
	if want := strings.Repeat("X", 60<<10) + "\nbye\n"; o.err != nil || o.out != want {
		t.Errorf("%v: %d bytes of output, want %d", o.err, len(o.out), len(want))
	}
	sh(t, s, "guesttool hold /agent & sleep 0.3; true")
	waitNone(t, open)
	sh(t, s, "guesttool talk /agent still").wantOut(t, "STILL\nbye\n")
}

// testSocketSlow: an agent that does not answer holds up nothing else.
func testSocketSlow(t *testing.T, h *harness) {
	var got bytes.Buffer
	done := make(chan struct{})
	s := h.start(t, func(c *sandbox.Config) {
		c.Mounts = []sandbox.Mount{{Dest: "/agent", Socket: &sandbox.Socket{Mode: 0o666, Dial: func(context.Context) (net.Conn, error) {
			ours, theirs := net.Pipe() // which does not even take what is written
			go func() {
				defer close(done)
				time.Sleep(500 * time.Millisecond)
				io.Copy(&got, ours)
			}()
			return theirs, nil
		}}}}
	}, h.base, h.tools)
	o := sh(t, s, "guesttool talk /agent hello & guesttool write 2000000 | wc -c; echo done")
	o.wantOut(t, "2000000\ndone\n")
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	<-done
}

func waitNone(t testing.TB, open func() int) {
	t.Helper()
	for range 100 {
		if open() == 0 {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Errorf("%d connections are still open", open())
}

// guestTalk takes PATH and LINES; it prints what the socket answers.
func guestTalk(a []string) error {
	c, err := net.Dial("unix", a[0])
	if err != nil {
		return err
	}
	defer c.Close()
	for _, l := range a[1:] {
		if l == "" {
			continue
		}
		if _, err := fmt.Fprintln(c, l); err != nil {
			return err
		}
	}
	if u, ok := c.(*net.UnixConn); ok {
		if err := u.CloseWrite(); err != nil {
			return err
		}
	}
	_, err = io.Copy(os.Stdout, c)
	return err
}

// guestHold takes PATH, and keeps connections to it.
func guestHold(a []string) error {
	for range 5 {
		if _, err := net.Dial("unix", a[0]); err != nil {
			return err
		}
	}
	time.Sleep(time.Hour)
	return nil
}
