// Package sandboxtest is the conformance suite of sandboxes: what every
// implementation of sandbox.Sandbox promises, checked from the inside by real
// processes and from the outside by the layers that they leave.
//
// It needs a static busybox (apt-get install busybox-static) for its images,
// and for some tests the Go toolchain.
package sandboxtest

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/internal/sandbox"
)

// Options say what a sandbox cannot do here.
type Options struct {
	// NoNetworkNone: Config.Network false cannot be had.
	NoNetworkNone bool
}

// harness is what the tests of one sandbox share.
type harness struct {
	opts  Options
	box   sandbox.Sandbox
	base  string // layer file of an image with a shell
	tools string // layer file with the guest tool
}

// path is a PATH like docker's.
const path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// supplied are the files that an engine gives.
func supplied() map[string][]byte {
	return map[string][]byte{
		"/etc/resolv.conf": []byte("nameserver 192.0.2.1\n"),
		"/etc/hosts":       []byte("127.0.0.1 localhost\n"),
		"/etc/hostname":    []byte("buildkitsandbox\n"),
	}
}

// scratchDir is a directory on disk for a session.
func scratchDir(t testing.TB) string {
	t.Helper()
	d, err := os.MkdirTemp("", "sandboxtest-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		es, err := os.ReadDir(d)
		if err != nil || len(es) > 0 {
			t.Errorf("the session left %v (%v) in its directory", es, err)
		}
		os.RemoveAll(d)
	})
	return d
}

// start starts a session on layers (default: the base image).
func (h *harness) start(t testing.TB, change func(*sandbox.Config), layers ...string) sandbox.Session {
	t.Helper()
	if layers == nil {
		layers = []string{h.base}
	}
	c := sandbox.Config{Layers: layers, Dir: scratchDir(t), Network: true, Files: supplied()}
	if change != nil {
		change(&c)
	}
	s, err := h.box.Start(context.Background(), c)
	if err != nil {
		t.Fatalf("start: %v", err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

// outcome is what a step left.
type outcome struct {
	out     string
	changes []byte // the tar
	entries map[string]tarEntry
	order   []string
	err     error
}

type tarEntry struct {
	*tar.Header
	content string // of small files
	sum     int64  // number of bytes read
}

func shell(script string) sandbox.Process {
	return sandbox.Process{Args: []string{"/bin/sh", "-c", script}, Env: []string{path}, Cwd: "/"}
}

// run runs p and reads what it changed.
func run(t testing.TB, s sandbox.Session, p sandbox.Process) outcome {
	t.Helper()
	var out, changes bytes.Buffer
	err := s.Run(context.Background(), p, &out, &changes)
	o := outcome{out: out.String(), changes: changes.Bytes(), err: err}
	if err != nil && changes.Len() > 0 {
		t.Errorf("a failed process wrote %d bytes of changes", changes.Len())
	}
	if err == nil {
		o.entries, o.order = readTar(t, &changes)
	}
	return o
}

// sh runs a shell script that must succeed.
func sh(t testing.TB, s sandbox.Session, script string) outcome {
	t.Helper()
	o := run(t, s, shell(script))
	if o.err != nil {
		t.Fatalf("%s\n%s: %v", script, o.out, o.err)
	}
	return o
}

// once runs a script in a session of its own.
func (h *harness) once(t testing.TB, script string) outcome {
	t.Helper()
	return sh(t, h.start(t, nil), script)
}

func readTar(t testing.TB, r io.Reader) (map[string]tarEntry, []string) {
	t.Helper()
	const small = 1 << 20
	entries, order := map[string]tarEntry{}, []string(nil)
	tr := tar.NewReader(r)
	for {
		hd, err := tr.Next()
		if err == io.EOF {
			return entries, order
		}
		if err != nil {
			t.Fatalf("read changes: %v", err)
		}
		e := tarEntry{Header: hd}
		var b bytes.Buffer
		n, err := io.CopyN(&b, tr, small)
		if err == nil {
			var more int64
			more, err = io.Copy(io.Discard, tr)
			n += more
		}
		if err != nil && err != io.EOF {
			t.Fatalf("read changes: %v", err)
		}
		e.content, e.sum = b.String(), n
		name := strings.TrimSuffix(hd.Name, "/")
		if _, twice := entries[name]; twice {
			t.Errorf("changes have %q twice", name)
		}
		entries[name] = e
		order = append(order, name)
	}
}

// wantNames checks that the changes are exactly these names.
func (o outcome) wantNames(t testing.TB, names ...string) {
	t.Helper()
	if got, want := strings.Join(o.order, " "), strings.Join(names, " "); got != want {
		t.Errorf("changes are\n\t%s\nwant\n\t%s", got, want)
	}
}

// wantExit checks a failure.
func (o outcome) wantExit(t testing.TB, code int) *sandbox.ExitError {
	t.Helper()
	var e *sandbox.ExitError
	if !errors.As(o.err, &e) {
		t.Fatalf("got error %v (output %q), want an exit error", o.err, o.out)
	}
	if e.Code != code {
		t.Errorf("exit code %d (%v), want %d; output %q", e.Code, e, code, o.out)
	}
	return e
}

func (o outcome) wantOut(t testing.TB, want string) {
	t.Helper()
	if o.out != want {
		t.Errorf("output is\n%q\nwant\n%q", o.out, want)
	}
}

// BaseLayer makes a layer file with a shell and the usual tools in it, for
// tests of one implementation's own.
func BaseLayer(t testing.TB) string { return image(t, base(t)...) }

// ToolLayer makes a layer file that has the test binary as a guest's tool; see GuestMain.
func ToolLayer(t testing.TB) string { return image(t, program("usr/bin/"+guestName, guestTool(t))) }

// Shell is a process that runs a script as root.
func Shell(script string) sandbox.Process { return shell(script) }
