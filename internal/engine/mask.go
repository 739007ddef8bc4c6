package engine

import (
	"bytes"
	"cmp"
	"io"
	"slices"
)

// masked is printed instead of a secret.
const masked = "***"

// minMasked is the length from which on a secret's value, or a line of it, is masked. To
// mask what is shorter would make output unreadable and tell the value at once.
const minMasked = 4

// mask is a writer that hides the values of secrets, and each of their lines, in what
// is written through it. What may be the beginning of one is held back until it is
// known, so that it does not matter how the text comes in pieces. It knows values as they are,
// not what a program makes of them: base64, say.
type mask struct {
	w io.Writer
	// byStart are the values by their first bytes, the longest first.
	byStart map[[minMasked]byte][][]byte
	starts  map[string]bool // all that may become such first bytes
	held    []byte
}

func newMask(w io.Writer, secrets [][]byte) *mask {
	m := &mask{w: w, byStart: map[[minMasked]byte][][]byte{}, starts: map[string]bool{}}
	for _, s := range secrets {
		// With all its lines masked, nothing is left of the whole.
		for line := range bytes.Lines(s) {
			m.add(bytes.TrimSpace(line))
		}
	}
	for _, vs := range m.byStart {
		slices.SortFunc(vs, func(a, b []byte) int { return cmp.Compare(len(b), len(a)) })
	}
	return m
}

func (m *mask) add(value []byte) {
	if len(value) < minMasked {
		return
	}
	k := [minMasked]byte(value)
	m.byStart[k] = append(m.byStart[k], value)
	for n := range minMasked {
		m.starts[string(value[:n])] = true
	}
}

// Write implements io.Writer.
func (m *mask) Write(p []byte) (int, error) {
	if len(m.byStart) == 0 {
		return m.w.Write(p)
	}
	m.held = append(m.held, p...)
	if err := m.pass(false); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Flush writes what is held back: nothing will come after it.
func (m *mask) Flush() error { return m.pass(true) }

// pass writes as much as can be told by now; all of it at the end.
func (m *mask) pass(end bool) error {
	var out []byte
	from, i := 0, 0 // held[from:i] is known to be no secret
	for i < len(m.held) {
		n, wait := m.match(m.held[i:])
		if wait && !end {
			break
		}
		if n == 0 {
			i++
			continue
		}
		out = append(append(out, m.held[from:i]...), masked...)
		i += n
		from = i
	}
	out = append(out, m.held[from:i]...)
	m.held = append(m.held[:0], m.held[i:]...)
	if len(out) == 0 {
		return nil
	}
	_, err := m.w.Write(out)
	return err
}

// match is the length of the longest secret that b begins with. wait: with more to come
// it may be another.
func (m *mask) match(b []byte) (n int, wait bool) {
	if len(b) < minMasked {
		return 0, m.starts[string(b)]
	}
	for _, v := range m.byStart[[minMasked]byte(b)] {
		switch {
		case bytes.HasPrefix(b, v):
			return len(v), wait
		case len(b) < len(v) && bytes.HasPrefix(v, b):
			wait = true
		}
	}
	return 0, wait
}
