package decompress

import (
	"bytes"
	"io"
	"os/exec"
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

func FuzzDecompress(f *testing.F) {
	plain := []byte("not much, but enough to be compressed in every way")
	f.Add(plain)
	for _, args := range [][]string{{"gzip", "-c"}, {"bzip2", "-c"}, {"xz", "-c"}, {"xz", "-c", "--check=sha256"}, {"zstd", "-c"}} {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Stdin = bytes.NewReader(plain)
		if out, err := cmd.Output(); err == nil {
			f.Add(out)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := New(bytes.NewReader(b))
		if err != nil {
			return
		}
		defer r.Close()
		_, err = io.Copy(io.Discard, io.LimitReader(r, 1<<20))
		if err != nil && strings.Contains(err.Error(), "runtime error") {
			t.Fatal(err)
		}
	})
}
