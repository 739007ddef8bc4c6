package cache

import (
	"encoding/binary"
	"hash"

	"github.com/opencontainers/go-digest"
)

// Hasher makes a key from a structure: every value is framed by its kind and
// length, so that no two different sequences of calls give the same bytes.
type Hasher struct {
	d digest.Digester
	h hash.Hash
}

// NewHasher begins a key for one kind of operation. version is raised when
// the meaning of the operation's fields, or what it produces, changes.
func NewHasher(operation string, version int) *Hasher {
	d := digest.Canonical.Digester()
	h := &Hasher{d: d, h: d.Hash()}
	h.String(operation)
	h.Int(int64(version))
	return h
}

func (h *Hasher) frame(kind byte, n int) {
	var b [9]byte
	b[0] = kind
	binary.BigEndian.PutUint64(b[1:], uint64(n))
	h.h.Write(b[:])
}

// String adds a string.
func (h *Hasher) String(s string) {
	h.frame('s', len(s))
	h.h.Write([]byte(s))
}

// Strings adds a list of strings.
func (h *Hasher) Strings(ss []string) {
	h.frame('l', len(ss))
	for _, s := range ss {
		h.String(s)
	}
}

// Bytes adds a byte string.
func (h *Hasher) Bytes(b []byte) {
	h.frame('b', len(b))
	h.h.Write(b)
}

// Int adds a number.
func (h *Hasher) Int(n int64) { h.frame('i', int(n)) }

// Bool adds a truth value.
func (h *Hasher) Bool(b bool) {
	n := 0
	if b {
		n = 1
	}
	h.frame('t', n)
}

// Key ends the structure.
func (h *Hasher) Key() digest.Digest { return h.d.Digest() }
