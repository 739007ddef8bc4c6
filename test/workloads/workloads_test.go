package workloads

import (
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestWriteAndChange(t *testing.T) {
	for _, w := range All() {
		if w.Name == "W5-big-context" { // below
			continue
		}
		dir := filepath.Join(t.TempDir(), w.Name)
		if err := w.Write(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(dir, "Dockerfile")); err != nil {
			t.Error(err)
		}
		before := sum(t, filepath.Join(dir, filepath.FromSlash(w.Edit)))
		if err := w.Change(dir); err != nil {
			t.Error(err)
		}
		if sum(t, filepath.Join(dir, filepath.FromSlash(w.Edit))) == before {
			t.Errorf("%s: the change changes nothing", w.Name)
		}
		if w.Name == "W3-node-app" {
			if _, err := os.Stat(filepath.Join(dir, ".dockerignore")); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestBigContextIsTheSame holds W5's bytes: figures of two versions can only be compared on one input.
func TestBigContextIsTheSame(t *testing.T) {
	if testing.Short() {
		t.Skip("writes 520 MB")
	}
	w, err := Find("W5")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "w5")
	if err := w.Write(dir); err != nil {
		t.Fatal(err)
	}
	files := 0
	h := sha256.New()
	err = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		files++
		fmt.Fprintf(h, "%s %s\n", strings.TrimPrefix(p, dir), sum(t, p))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if files != 20_002 {
		t.Errorf("%d files", files)
	}
	const want = "20e85f1bf0afa866846a9b94891ca8c976db3027029178b94bd2ead828545c83"
	if got := fmt.Sprintf("%x", h.Sum(nil)); got != want {
		t.Errorf("content %s, want %s", got, want)
	}
}

func sum(t *testing.T, p string) string {
	t.Helper()
	f, err := os.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}
