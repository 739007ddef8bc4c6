package store

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
)

// LayerPath is where the layer file for a diff ID is, if HasLayer. It never
// changes its content. For a digest that is not valid it is a path that does
// not exist.
func (s *Store) LayerPath(diffID digest.Digest) string {
	p, err := checkDigest(diffID)
	if err != nil {
		return s.path(dirLayers, "invalid")
	}
	return s.path(dirLayers, p)
}

// HasLayer reports whether there is a layer file for the diff ID. Within a
// Use it stays.
func (s *Store) HasLayer(diffID digest.Digest) bool {
	if _, err := checkDigest(diffID); err != nil {
		return false
	}
	fi, err := s.touch(s.LayerPath(diffID))
	return err == nil && fi.Size() > 0
}

// DropLayer removes a layer file that turned out to be damaged, so that it is
// made again when it is needed. Who has it open can still read it.
func (s *Store) DropLayer(diffID digest.Digest) error {
	if _, err := checkDigest(diffID); err != nil {
		return err
	}
	err := os.Remove(s.LayerPath(diffID))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// LayerWriter writes a layer file.
type LayerWriter struct {
	s *Store
	f *tmpFile
}

// NewLayer begins a layer file. Close must be called in the end.
func (s *Store) NewLayer() (*LayerWriter, error) {
	f, err := s.tempFile("layer")
	if err != nil {
		return nil, s.writing("layer", err)
	}
	return &LayerWriter{s: s, f: f}, nil
}

// File is where the layer file is to be written. The LayerWriter closes it.
func (w *LayerWriter) File() *os.File { return w.f.File }

// Commit makes the file visible as the layer file for diffID. The caller
// vouches for that it is; the store cannot tell.
func (w *LayerWriter) Commit(diffID digest.Digest) error {
	if w.f.done {
		return errors.New("commit layer: closed or committed before")
	}
	if _, err := checkDigest(diffID); err != nil {
		return err
	}
	p := w.s.LayerPath(diffID)
	if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
		return w.s.writing("layer", err)
	}
	if err := w.s.commitUnsynced(w.f, diffID); err != nil {
		return w.s.writing("layer", err)
	}
	return nil
}

// Close drops the file unless it was committed.
func (w *LayerWriter) Close() error {
	w.f.discard()
	return nil
}
