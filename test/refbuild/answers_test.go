package refbuild

import (
	"io/fs"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/random"
)

// TestAnswers: what was kept comes back, and everybody may read it.
func TestAnswers(t *testing.T) {
	a := Answers(filepath.Join(t.TempDir(), "answers"))
	if got, err := a.Kept("case"); got != nil || err != nil {
		t.Errorf("%v, %v before anything was kept", got, err)
	}
	if err := a.Keep("case", Answer{Log: "it failed"}); err != nil {
		t.Fatal(err)
	}
	if got, err := a.Kept("case"); err != nil || got.Image != nil || got.Log != "it failed" {
		t.Errorf("%+v, %v", got, err)
	}
	img, err := random.Image(1000, 2)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Keep("case", Answer{Image: img, Log: "built"}); err != nil {
		t.Fatal(err)
	}
	got, err := a.Kept("case")
	if err != nil || got.Image == nil || got.Log != "built" {
		t.Fatalf("%+v, %v", got, err)
	}
	want, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if d, err := got.Image.Digest(); err != nil || d != want {
		t.Errorf("digest %v, %v, want %v", d, err, want)
	}
	err = filepath.WalkDir(string(a), func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		if m := fi.Mode().Perm(); m&0o444 != 0o444 || d.IsDir() && m&0o111 != 0o111 {
			t.Errorf("%s has mode %v", p, m)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
