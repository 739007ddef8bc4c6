package engine

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
)

func masks(secrets ...string) (*mask, *bytes.Buffer) {
	var bs [][]byte
	for _, s := range secrets {
		bs = append(bs, []byte(s))
	}
	var out bytes.Buffer
	return newMask(&out, bs), &out
}

// TestMask: however output comes in pieces, no value is in it, and all else is.
func TestMask(t *testing.T) {
	for _, x := range []struct {
		name, in, want string
		secrets        []string
	}{
		{"value", "the token is tok3n!, yes: tok3n!", "the token is ***, yes: ***", []string{"tok3n!"}},
		{"trailing newline", "a tok3n! b", "a *** b", []string{"tok3n!\n"}},
		{"lines", "BEGIN\nline one\r\n  line two\nEND", "***\n***\r\n  ***\nEND", []string{"BEGIN\nline one\n  line two\nEND\n"}},
		{"a part is shown", "tok3n tok3 tok3n!", "tok3n tok3 ***", []string{"tok3n!"}},
		{"short", "abc ab", "abc ab", []string{"abc", "ab", ""}},
		{"one begins another", "secrets secret secretly", "*** *** ***ly", []string{"secret", "secrets"}},
		{"overlapping", "abcdefgh", "***gh", []string{"abcdef", "defgh"}},
		{"repeated beginning", "aaaaaab aaaab", "aa*** ***", []string{"aaaab"}},
		{"adjacent", "tok3n!tok3n!", "******", []string{"tok3n!"}},
		{"binary", "\x00\xff\xfe\x01\x02 \xff", "\x00*** \xff", []string{"\xff\xfe\x01\x02"}},
		{"none", "anything", "anything", nil},
		{"held at the end", "what is tok3n", "what is tok3n", []string{"tok3n!"}},
	} {
		for size := range len(x.in) {
			m, out := masks(x.secrets...)
			for rest := x.in; rest != ""; {
				n := min(size+1, len(rest))
				if w, err := m.Write([]byte(rest[:n])); w != n || err != nil {
					t.Fatal(w, err)
				}
				for _, s := range x.secrets {
					if v := strings.TrimSpace(s); len(v) >= minMasked && strings.Contains(out.String(), v) {
						t.Errorf("%s in pieces of %d: %q has %q", x.name, size+1, out, v)
					}
				}
				rest = rest[n:]
			}
			if err := m.Flush(); err != nil || out.String() != x.want {
				t.Errorf("%s in pieces of %d: %q, want %q", x.name, size+1, out, x.want)
			}
		}
	}
}

// TestMaskHoldsBackLittle: what cannot be the beginning of a secret is shown at once.
func TestMaskHoldsBackLittle(t *testing.T) {
	m, out := masks("tok3n!")
	for _, x := range []struct{ in, shown string }{
		{"Password? ", "Password? "}, {"to", ""}, {"day", "today"}, {"tok3n", ""}, {"!", "***"}, {"t", ""},
	} {
		out.Reset()
		if _, err := m.Write([]byte(x.in)); err != nil || out.String() != x.shown {
			t.Errorf("%q shows %q, want %q", x.in, out, x.shown)
		}
	}
}

// TestMaskRandom compares with replacing in the whole text.
func TestMaskRandom(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	word := func(n int) string {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte('a' + rnd.IntN(2))
		}
		return string(b)
	}
	for range 3000 {
		secret := word(4 + rnd.IntN(4))
		in := word(rnd.IntN(60))
		m, out := masks(secret)
		for rest := in; rest != ""; {
			n := 1 + rnd.IntN(len(rest))
			if _, err := m.Write([]byte(rest[:n])); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		if err := m.Flush(); err != nil || out.String() != strings.ReplaceAll(in, secret, masked) {
			t.Fatalf("%q in %q: %q", secret, in, out)
		}
	}
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, errors.New("full") }

func TestMaskFailingWriter(t *testing.T) {
	for _, secrets := range [][][]byte{nil, {[]byte("tok3n!")}} {
		if _, err := newMask(full{}, secrets).Write([]byte("x y z")); err == nil {
			t.Error("no error")
		}
	}
}

func BenchmarkMask(b *testing.B) {
	var key strings.Builder
	for i := range 1000 {
		key.WriteString(strings.Repeat(string(rune('a'+i%26)), 60) + "\n")
	}
	m := newMask(&bytes.Buffer{}, [][]byte{[]byte("tok3n!"), []byte(key.String())})
	text := []byte(strings.Repeat("some output of a compiler, and more of it\n", 1000))
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		m.w = &bytes.Buffer{}
		if _, err := m.Write(text); err != nil {
			b.Fatal(err)
		}
	}
}
