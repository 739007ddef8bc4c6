package decompress

import (
	"bufio"
	"bytes"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// TestXZDictionary: a few bytes must not make a decoder allocate gigabytes.
func TestXZDictionary(t *testing.T) {
	cmd := exec.Command("xz", "-c", "--lzma2=dict=1GiB")
	cmd.Stdin = strings.NewReader("small")
	out, err := cmd.Output()
	if err != nil {
		t.Skipf("xz: %v", err)
	}
	r, err := New(bytes.NewReader(out))
	if err == nil {
		defer r.Close()
		_, err = io.ReadAll(r)
	}
	if err == nil || !strings.Contains(err.Error(), "dictionary") {
		t.Errorf("got %v", err)
	}
}

// FuzzXZGuard: the guard passes on what it is given.
func FuzzXZGuard(f *testing.F) {
	for _, size := range []int{0, 10, 100000} {
		cmd := exec.Command("xz", "-c")
		cmd.Stdin = bytes.NewReader(make([]byte, size))
		if out, err := cmd.Output(); err == nil {
			f.Add(out)
			f.Add(append(slices.Clone(out), out...))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		g := newXZGuard(bufio.NewReader(bytes.NewReader(b)))
		got, err := io.ReadAll(g)
		g.Close()
		if !bytes.HasPrefix(b, got) || err == nil && len(got) == 0 && len(b) > 0 {
			t.Fatalf("passed on %d bytes of %d, %v", len(got), len(b), err)
		}
	})
}
