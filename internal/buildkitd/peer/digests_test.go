package peer

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/tonistiigi/fsutil/types"

	"github.com/kiln-build/kiln/internal/source/statcache"
)

// TestSeen: a file that has not changed since an earlier build is not asked for, and one whose time cannot be
// trusted always is.
func TestSeen(t *testing.T) {
	dir, cache := t.TempDir(), t.TempDir()
	natural, tool, young := time.Now().Add(-time.Hour).Truncate(time.Second).Add(12345*time.Nanosecond), time.Unix(1, 0), time.Now().Add(time.Minute)
	write := func(name, content string, at time.Time) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(filepath.Join(dir, name), at, at); err != nil {
			t.Fatal(err)
		}
	}
	// build is one: what the files' digests are, and for which the client was asked.
	build := func(where string, then func(*files)) (digests map[string]digest.Digest, asked int) {
		t.Helper()
		known := &seen{cache: statcache.Open(cache), space: where, began: time.Now()}
		f, end := fromClient(t, dir, known, func(p *types.Packet) {
			if p.Type == types.PACKET_REQ {
				asked++
			}
		})
		digests = map[string]digest.Digest{}
		for _, name := range []string{"natural", "tool", "young"} {
			var err error
			if digests[name], err = f.ContentDigest(name); err != nil {
				t.Fatal(err)
			}
		}
		if then != nil {
			then(f)
		}
		end()
		if err := known.cache.Flush(); err != nil {
			t.Fatal(err)
		}
		return digests, asked
	}
	reads := func(f *files, name string) (string, error) {
		r, err := f.Open(name)
		if err != nil {
			return "", err
		}
		b, err := io.ReadAll(r)
		return string(b), err
	}

	write("natural", "one", natural)
	write("tool", "one", tool)
	write("young", "one", young)
	one, two := digest.FromString("one"), digest.FromString("two")
	if got, asked := build("here", nil); asked != 3 || got["natural"] != one || got["tool"] != one || got["young"] != one {
		t.Errorf("the first build asks for %d files: %v", asked, got)
	}
	got, asked := build("here", func(f *files) {
		if s, err := reads(f, "natural"); s != "one" || err != nil { // it can be had all the same
			t.Errorf("natural is %q, %v", s, err)
		}
	})
	if asked != 3 || got["natural"] != one {
		t.Errorf("a build that reads a known file asks for %d files: %v", asked, got)
	}
	if _, asked := build("here", nil); asked != 2 {
		t.Errorf("an unchanged build asks for %d files, not for the two that cannot be trusted", asked)
	}
	if _, asked := build("elsewhere", nil); asked != 3 {
		t.Errorf("another context's build asks for %d files", asked)
	}
	write("tool", "two", tool)
	write("young", "two", young)
	if got, _ := build("here", nil); got["tool"] != two || got["young"] != two {
		t.Errorf("files that were changed under a false time are %v", got)
	}
	write("natural", "two", natural.Add(time.Nanosecond))
	if got, asked := build("here", nil); asked != 3 || got["natural"] != two {
		t.Errorf("a changed file is %v", got)
	}

	// Whoever sets a file's time by hand is believed, but the old digest is never said of the new content.
	write("natural", "six", natural.Add(time.Nanosecond))
	got, _ = build("here", func(f *files) {
		if s, err := reads(f, "natural"); !errors.Is(err, errChanged) {
			t.Errorf("natural, which should be two, is %q, %v", s, err)
		}
	})
	if got["natural"] != two {
		t.Errorf("natural is %v", got)
	}
	if got, _ := build("here", nil); got["natural"] != digest.FromString("six") {
		t.Errorf("after a failed build natural is %v", got)
	}
}

func TestSpace(t *testing.T) {
	if space("a", "b", "c") == space("a", "bc", "") || space("", "", "context", "") == space("", "", "", "context") {
		t.Error("different contexts share a space")
	}
}
