package sandboxtest

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/sandbox"
)

func testOutputOrder(t *testing.T, h *harness) {
	o := h.once(t, `i=0; while [ $i -lt 300 ]; do echo out $i; echo err $i >&2; echo dev $i > /dev/stdout; i=$((i+1)); done; printf 'no newline'`)
	var want strings.Builder
	for i := range 300 {
		fmt.Fprintf(&want, "out %d\nerr %d\ndev %d\n", i, i, i)
	}
	o.wantOut(t, want.String()+"no newline")
}

func testOutputBinary(t *testing.T, h *harness) {
	o := run(t, h.start(t, nil, h.base, h.tools), sandbox.Process{Args: []string{"guesttool", "write", "1048576"}, Env: []string{path}, Cwd: "/"})
	if o.err != nil {
		t.Fatal(o.err)
	}
	if want := strings.Repeat("\x00\x01\xff\xfe\r\n\x1b[", 1<<17); o.out != want {
		t.Errorf("got %d bytes, want %d; equal until %d", len(o.out), len(want), common(o.out, want))
	}
}

func common(a, b string) int {
	i := 0
	for i < min(len(a), len(b)) && a[i] == b[i] {
		i++
	}
	return i
}

func testOutputLarge(t *testing.T, h *harness) {
	o := h.once(t, "yes 0123456789abcdef | head -c 20000000")
	if want := strings.Repeat("0123456789abcdef\n", 20000000/17+1)[:20000000]; o.out != want {
		t.Errorf("got %d bytes, want %d; equal until %d", len(o.out), len(want), common(o.out, want))
	}
}

// stamps notes when what was written.
type stamps struct {
	bytes.Buffer
	first time.Time
}

func (s *stamps) Write(b []byte) (int, error) {
	if s.first.IsZero() {
		s.first = time.Now()
	}
	return s.Buffer.Write(b)
}

func testOutputUnbuffered(t *testing.T, h *harness) {
	var w stamps
	var changes bytes.Buffer
	if err := h.start(t, nil).Run(context.Background(), shell("echo now; sleep 1"), &w, &changes); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(w.first); d < 900*time.Millisecond {
		t.Errorf("output came %s before the end of the process, want 1 s", d)
	}
}

func testStdin(t *testing.T, h *harness) {
	h.once(t, "cat; read x && exit 1; wc -c < /dev/stdin; cat | wc -c").wantOut(t, "0\n0\n")
}

// testOutputLeak: a writing end of the pipe that outlives all processes.
func testOutputLeak(t *testing.T, h *harness) {
	s := h.start(t, nil, h.base, h.tools)
	sh(t, s, "guesttool leakpipe").wantOut(t, "leaked\n")
	sh(t, s, "echo next").wantOut(t, "next\n")
}
