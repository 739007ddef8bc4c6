package remote

import (
	"cmp"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/image"
)

// freshFor is how long the time of an entry's last use is good enough, so that a
// build which finds all it needs writes nothing.
const freshFor = time.Hour

// fresh is an entry of this build with its layers as they are to be described.
type fresh struct {
	key, content digest.Digest
	layers       []image.Layer
}

// merged are the contents of a cache with what a build adds, within bounds.
type merged struct {
	contents
	numbers map[layerID]uint32
}

// layerID is what makes two layers of a cache one.
type layerID struct{ diffID, blob digest.Digest }

// number is that of a layer in the contents.
func (m *merged) number(l image.Layer) uint32 {
	id := layerID{l.DiffID, l.Blob.Digest}
	n, ok := m.numbers[id]
	if !ok {
		n = uint32(len(m.layers))
		l.Origin = ""
		m.layers = append(m.layers, l)
		m.numbers[id] = n
	}
	return n
}

// merge adds a build's entries to what there is. changed says whether it is worth
// writing. With replace the build's own results go before others' under the same key.
func merge(old *contents, mine []fresh, now time.Time, b cache.Bounds, replace bool) (out *contents, changed bool) {
	m := &merged{numbers: map[layerID]uint32{}}
	entries := map[digest.Digest]entry{}
	for _, e := range old.entries {
		if e.used.After(now) {
			e.used = now // by a clock that is wrong
		}
		if have, ok := entries[e.key]; ok && have.used.After(e.used) {
			continue
		}
		entries[e.key] = entry{e.key, e.content, m.numbersOf(old.expand(e)), e.used}
	}
	own := map[digest.Digest]bool{}
	for _, f := range mine {
		own[f.key] = true
		e := entry{f.key, f.content, nil, now}
		have, ok := entries[f.key]
		if ok && (!replace || m.same(have, f)) {
			if now.Sub(have.used) < freshFor {
				continue
			}
			e.content, e.layers = have.content, have.layers
		} else {
			e.layers = m.numbersOf(f.layers)
		}
		entries[f.key], changed = e, true
	}
	m.keep(entries, own, now, b)
	return &m.contents, changed
}

func (m *merged) numbersOf(ls []image.Layer) []uint32 {
	out := make([]uint32, 0, len(ls))
	for _, l := range ls {
		out = append(out, m.number(l))
	}
	return out
}

// expand returns an entry's layers.
func (c *contents) expand(e entry) []image.Layer {
	out := make([]image.Layer, 0, len(e.layers))
	for _, n := range e.layers {
		out = append(out, c.layers[n])
	}
	return out
}

func (m *merged) same(e entry, f fresh) bool {
	if e.content != f.content && f.content != "" || len(e.layers) != len(f.layers) {
		return false
	}
	for i, n := range e.layers {
		have, want := m.layers[n], f.layers[i]
		if have.DiffID != want.DiffID || have.Blob.Digest != want.Blob.Digest {
			return false
		}
	}
	return true
}

// keep chooses the entries that stay: the build's own, and of the others the ones
// used last, as long as there is room.
func (m *merged) keep(entries map[digest.Digest]entry, own map[digest.Digest]bool, now time.Time, b cache.Bounds) {
	order := make([]entry, 0, len(entries))
	for _, e := range entries {
		order = append(order, e)
	}
	slices.SortFunc(order, func(x, y entry) int {
		if mx, my := own[x.key], own[y.key]; mx != my {
			if mx {
				return -1
			}
			return 1
		}
		return cmp.Or(y.used.Compare(x.used), cmp.Compare(x.key, y.key))
	})
	size := int64(0)
	counted := map[digest.Digest]bool{}
	for _, e := range order {
		more := int64(0)
		for _, n := range e.layers {
			if blob := m.layers[n].Blob; !counted[blob.Digest] {
				more += blob.Size
			}
		}
		if !own[e.key] && (len(m.entries) >= b.MaxRecords || size+more > b.MaxSize || now.Sub(e.used) > b.TTL) {
			return
		}
		for _, n := range e.layers {
			counted[m.layers[n].Blob.Digest] = true
		}
		size += more
		m.add(e)
	}
}
