// Package cache remembers what operations produced: cache key → Record.
//
// A key covers everything that the result depends on (docs/design/cache-key.md), so
// a record is never wrong, only gone. Index is the seam behind which the local
// store stands, and caches in registries, directories and images (package
// remote). Package cachetest is what all of them have to do.
package cache

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/image"
)

// Record is what one operation produced.
type Record struct {
	// Layers of the resulting root file system, the bottom first: the whole
	// chain, so that a hit needs no other record.
	Layers []image.Layer `json:"layers"`
	// Content is the operation's key by the content of its inputs, if this is
	// the record of its key by definition: whoever saves it saves it under both.
	Content digest.Digest `json:"content,omitempty"`
}

// Reader looks records up by key. Safe for concurrent use.
type Reader interface {
	// Lookup returns nil and no error if there is no record.
	Lookup(ctx context.Context, key digest.Digest) (*Record, error)
}

// Index is a Reader that can be added to. Safe for concurrent use.
type Index interface {
	Reader
	// Save keeps a record; a record of the same key is replaced.
	Save(ctx context.Context, key digest.Digest, r Record) error
}

// recordKind is the name under which the store keeps cache records.
const recordKind = "cache"

// Records is the part of the store that Local needs.
type Records interface {
	GetRecord(kind, key string) ([]byte, error)
	PutRecord(kind, key string, b []byte) error
}

// Local is the Index of the local store.
type Local struct{ records Records }

// NewLocal returns the Index that keeps its records in s.
func NewLocal(s Records) *Local { return &Local{records: s} }

// Lookup implements Index. A record that cannot be read is no record.
func (l *Local) Lookup(_ context.Context, key digest.Digest) (*Record, error) {
	b, err := l.records.GetRecord(recordKind, key.String())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up cache record: %w", err)
	}
	if r, ok := Parse(recordKind, b); ok {
		return &r, nil
	}
	return nil, nil
}

// Parse reads a record of the store's as Local writes them; ok is false for any other.
func Parse(kind string, body []byte) (r Record, ok bool) {
	ok = kind == recordKind && json.Unmarshal(body, &r) == nil && valid(r)
	return r, ok
}

func valid(r Record) bool {
	if r.Content != "" && r.Content.Validate() != nil {
		return false
	}
	for _, l := range r.Layers {
		if l.DiffID.Validate() != nil {
			return false
		}
		if l.Blob.Digest != "" && (l.Blob.Digest.Validate() != nil || l.Blob.Size < 0) {
			return false
		}
	}
	return true
}

// Save implements Index.
func (l *Local) Save(_ context.Context, key digest.Digest, r Record) error {
	if r.Content != "" && r.Content != key {
		if err := l.put(r.Content, Record{Layers: r.Layers}); err != nil {
			return err
		}
	}
	return l.put(key, r)
}

func (l *Local) put(key digest.Digest, r Record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("save cache record: %w", err)
	}
	if err := l.records.PutRecord(recordKind, key.String(), b); err != nil {
		return fmt.Errorf("save cache record: %w", err)
	}
	return nil
}
