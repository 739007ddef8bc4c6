// Package cachemount keeps what RUN --mount=type=cache shows from build to build.
//
// A cache mount is a value, as everything here: a stack of layers. A step sees them
// merged, and what it changed comes back as one more layer on top (Mount.Add). So nothing
// is ever changed in place: a builder that is killed leaves the value as it was,
// any number of steps may use one at a time, and a stack of layers can be exported and
// imported like an image's. docs/design/cache-mounts.md tells more.
package cachemount

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/kiln-build/kiln/internal/tree"
)

// Sharing says what happens when several steps use one cache mount at the same time.
type Sharing int

// The ways of sharing.
const (
	// Shared: each begins with what is there, and their changes are laid on top of
	// each other as they end.
	Shared Sharing = iota
	// Private: each has one that no other has, a new one if need be.
	Private
	// Locked: one waits for the other, in whatever process.
	Locked
)

// RecordKind is the name under which the store keeps cache mounts.
const RecordKind = "cachemount"

// Key names a cache mount.
type Key struct {
	ID string
	// Base names what the mount began with, in the words of whoever made it; empty: nothing.
	// One with another base is another mount.
	Base string
	// Instance tells private ones of one ID apart; all others are 0.
	Instance int
}

// record is what the store keeps of a cache mount.
type record struct {
	Key
	Layers []image.Layer
	// Began is how many of the layers are what it began with.
	Began int
}

// Store keeps cache mounts in a store. Safe for concurrent use.
type Store struct{ st *store.Store }

// New returns the cache mounts of st.
func New(st *store.Store) *Store { return &Store{st} }

func (k Key) record() string {
	b, err := json.Marshal(k)
	if err != nil {
		return k.ID // never: a string and numbers
	}
	return string(b)
}

// RecordKey is the key of the store's record of the mount, whose kind is RecordKind.
func (k Key) RecordKey() string { return k.record() }

func (k Key) lock(what string) string { return "cache mount " + what + " " + k.record() }

// Mount is a cache mount in the hands of one step.
type Mount struct {
	Key Key
	// Layers are what it is now, the bottom first.
	Layers []image.Layer

	s      *Store
	began  int
	unlock func() // nil if it is not locked
}

// Acquire takes a cache mount for a step, waiting for it if it is Locked: waits, if not nil,
// is called then. If there is no such mount it begins with base. Release must be called in the end.
// The caller is within a Use of the store.
func (s *Store) Acquire(ctx context.Context, k Key, sharing Sharing, base []image.Layer, waits func()) (*Mount, error) {
	if len(k.record()) > store.MaxKey {
		return nil, fmt.Errorf("the id of a cache mount has %d bytes, which are too many", len(k.ID))
	}
	m := &Mount{Key: k, s: s}
	var err error
	switch sharing {
	case Locked:
		m.unlock, err = s.lock(ctx, k, waits)
	case Private:
		m.Key, m.unlock, err = s.lockFree(k)
	}
	if err != nil {
		return nil, err
	}
	r, err := s.read(m.Key)
	if err != nil {
		m.Release()
		return nil, err
	}
	if r == nil {
		r = &record{Layers: base, Began: len(base)}
	}
	m.Layers, m.began = r.Layers, r.Began
	return m, nil
}

func (s *Store) lock(ctx context.Context, k Key, waits func()) (func(), error) {
	unlock, ok, err := s.st.TryLock(k.lock("use"))
	if ok || err != nil {
		return unlock, err
	}
	if waits != nil {
		waits()
	}
	return s.st.Lock(ctx, k.lock("use"))
}

// lockFree locks the first private instance that nobody uses.
func (s *Store) lockFree(k Key) (Key, func(), error) {
	for {
		unlock, ok, err := s.st.TryLock(k.lock("use"))
		if ok || err != nil {
			return k, unlock, err
		}
		k.Instance++
	}
}

// Release lets others have the mount. Later calls do nothing.
func (m *Mount) Release() {
	if m.unlock != nil {
		m.unlock()
	}
	m.unlock = nil
}

// Add puts what a step changed on top of the mount: l is a layer on Layers, in the
// store. If others changed the mount meanwhile it goes on top of that: of each
// file the last version counts, and none is lost.
func (m *Mount) Add(ctx context.Context, l image.Layer) error {
	unlock, err := m.s.st.Lock(ctx, m.Key.lock("change"))
	if err != nil {
		return err
	}
	defer unlock()
	now, err := m.s.read(m.Key)
	if err != nil {
		return err
	}
	switch {
	case now == nil:
		now = &record{Key: m.Key, Layers: m.Layers, Began: m.began}
	case !sameLayers(now.Layers, m.Layers):
		if l, err = m.s.rebase(ctx, l, m.Layers); err != nil {
			return err
		}
	}
	now.Layers = append(now.Layers[:len(now.Layers):len(now.Layers)], l)
	if err := m.s.write(*now); err != nil {
		return err
	}
	if now.Layers, err = m.s.compact(ctx, now.Layers, now.Began); err != nil {
		return fmt.Errorf("merge layers of cache mount %q: %w", m.Key.ID, err)
	}
	if now.Layers == nil {
		return nil
	}
	return m.s.write(*now)
}

func sameLayers(a, b []image.Layer) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i].DiffID != b[i].DiffID {
			return false
		}
	}
	return true
}

// read returns nil if there is no such mount, or if a layer of it is lost: it is a
// cache, and begins anew.
func (s *Store) read(k Key) (*record, error) {
	b, err := s.st.GetRecord(RecordKind, k.record())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	r, ok := parse(b)
	if !ok {
		return nil, nil
	}
	for _, l := range r.Layers {
		if !s.usable(l) {
			return nil, nil
		}
	}
	return r, nil
}

func parse(b []byte) (*record, bool) {
	var r record
	if json.Unmarshal(b, &r) != nil || r.Began < 0 || r.Began > len(r.Layers) {
		return nil, false
	}
	for _, l := range r.Layers {
		if l.DiffID.Validate() != nil {
			return nil, false
		}
	}
	return &r, true
}

// usable reports whether a layer can be had, and drops its file if that is damaged.
func (s *Store) usable(l image.Layer) bool {
	if s.st.HasLayer(l.DiffID) {
		f, err := layer.Open(s.st.LayerPath(l.DiffID))
		if err == nil {
			f.Close()
			return true
		}
		if errors.Is(err, layer.ErrDamaged) {
			_ = s.st.DropLayer(l.DiffID)
		}
	}
	return image.Available(s.st, l)
}

func (s *Store) write(r record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return s.st.PutRecord(RecordKind, r.record(), b)
}

// Own returns the layers of a mount on top of what it began with, the bottom first;
// nil if there is no such mount.
func (s *Store) Own(k Key) ([]image.Layer, error) {
	r, err := s.read(k)
	if r == nil || err != nil {
		return nil, err
	}
	return r.Layers[r.Began:], nil
}

// Import makes a mount of which there is none: of what it begins with, and layers on top,
// which are in the store. If there is one by now it stays as it is.
func (s *Store) Import(ctx context.Context, k Key, base, own []image.Layer) error {
	unlock, err := s.st.Lock(ctx, k.lock("change"))
	if err != nil {
		return err
	}
	defer unlock()
	if r, err := s.read(k); r != nil || err != nil {
		return err
	}
	return s.write(record{Key: k, Layers: append(base[:len(base):len(base)], own...), Began: len(base)})
}

// Info describes a cache mount.
type Info struct {
	Key
	// Layers are its value, the bottom first; the first Began of them are what it began with.
	Layers []image.Layer
	Began  int
	Size   int64     // bytes on disk, without what it began with
	Used   time.Time // when a step last took it
}

// List describes all cache mounts, in no particular order. It does not count as a use.
func (s *Store) List(ctx context.Context) ([]Info, error) {
	var all []Info
	err := s.st.Records(RecordKind, func(key string, used time.Time) error {
		b, err := s.st.PeekRecord(RecordKind, key)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // just removed
		}
		if err != nil {
			return err
		}
		r, ok := parse(b)
		if !ok {
			return nil
		}
		i := Info{Key: r.Key, Layers: r.Layers, Began: r.Began, Used: used}
		for _, l := range r.Layers[r.Began:] {
			if fi, err := os.Stat(s.st.LayerPath(l.DiffID)); err == nil {
				i.Size += fi.Size()
			}
		}
		all = append(all, i)
		return context.Cause(ctx)
	})
	if err != nil {
		return nil, fmt.Errorf("list cache mounts: %w", err)
	}
	return all, nil
}

// Remove forgets a cache mount; its layers go with the next Prune of the store. A step
// that has it goes on with it, and keeps what it then adds.
func (s *Store) Remove(k Key) error { return s.st.DeleteRecord(RecordKind, k.record()) }

// RemoveAll forgets all cache mounts of an ID, private ones too: those that began with something if
// based, else those that began with nothing.
func (s *Store) RemoveAll(ctx context.Context, id string, based bool) error {
	all, err := s.List(ctx)
	if err != nil {
		return err
	}
	for _, m := range all {
		if m.ID != id || (m.Base != "") != based {
			continue
		}
		if err := s.Remove(m.Key); err != nil {
			return err
		}
	}
	return nil
}

// EmptyDir is the one directory in the layer that Empty makes.
const EmptyDir = "cache"

// Empty makes the layer that a mount begins with if it has no base. It has one directory,
// and that is what is mounted: unlike the root of a layer, it can have an owner and a mode.
func (s *Store) Empty(ctx context.Context) (image.Layer, error) {
	return image.Commit(ctx, s.st, image.CommitOptions{}, func(w io.Writer) error {
		tw := layer.NewTarWriter(w)
		if err := tw.Add(EmptyDir, tree.Node{Mode: tree.ModeDir | 0o755, MTime: time.Unix(0, 0)}, "", nil); err != nil {
			return err
		}
		return tw.Close()
	})
}
