package refbuild

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"

	"github.com/kiln-build/kiln/test/compare"
	"github.com/kiln-build/kiln/test/testenv"
)

// Answers keeps in a directory what a builder made, because asking takes root
// and time: an ordinary user can then compare with it.
type Answers string

// Answer is an image, or a failure with the builder's output.
type Answer struct {
	Image v1.Image // nil: it failed
	Log   string
}

// Kept returns the answer of an earlier run to a question of that name, or nil.
func (a Answers) Kept(name string) (*Answer, error) {
	dir := filepath.Join(string(a), name)
	log, err := os.ReadFile(filepath.Join(dir, "log"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	got := &Answer{Log: string(log)}
	if _, err := os.Stat(filepath.Join(dir, "failed")); err == nil {
		return got, nil
	}
	got.Image, err = compare.Open("oci:" + dir)
	return got, err
}

// Keep writes an answer, whole or not at all.
func (a Answers) Keep(name string, given Answer) error {
	if err := os.MkdirAll(string(a), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(string(a), ".new-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if given.Image == nil {
		err = os.WriteFile(filepath.Join(tmp, "failed"), nil, 0o644)
	} else {
		var p layout.Path
		if p, err = layout.Write(tmp, empty.Index); err == nil {
			err = p.AppendImage(given.Image)
		}
	}
	if err != nil {
		return fmt.Errorf("keep an answer: %w", err)
	}
	if err := os.WriteFile(filepath.Join(tmp, "log"), []byte(given.Log), 0o644); err != nil {
		return err
	}
	if err := testenv.Readable(tmp); err != nil {
		return err
	}
	dir := filepath.Join(string(a), name)
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.Rename(tmp, dir)
}
