package fileop

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/tree"
	"github.com/kiln-build/kiln/internal/tree/memtree"
	"github.com/opencontainers/go-digest"
)

func read(t tree.Tree, p string) (string, error) {
	r, err := t.Open(p)
	if err != nil {
		return "", err
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	return string(b), err
}

func baseFiles() files {
	return files{
		"d/a":       {Data: "a", Mode: 0o644},
		"d/b":       {Data: "b"},
		"d/sub/c":   {Data: "c", Xattr: map[string]string{"user.k": "v"}},
		"d/link":    memtree.Symlink("a"),
		"other":     {Data: "o"},
		"d/dev":     {Mode: tree.ModeChar | 0o600, Major: 1, Minor: 3},
		"linked":    memtree.Symlink("d"),
		"d/log/log": {Data: "log"},
	}
}

// TestDigest: what the copy takes changes the digest, and nothing else does.
func TestDigest(t *testing.T) {
	a := fromDockerfile("linked", "/x/")
	a.ExcludePatterns = []string{"log"}
	sum := func(f files, as ...CopyAction) digest.Digest {
		t.Helper()
		d, err := Digest(context.Background(), memtree.New(f), as...)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	first := sum(baseFiles(), a)
	for name, c := range map[string]struct {
		same   bool
		change func(files)
	}{
		"nothing":       {true, func(files) {}},
		"a touch":       {true, func(f files) { set(f, "d/a", func(x *memtree.File) { x.MTime = time.Unix(99, 9) }) }},
		"another file":  {true, func(f files) { f["other"] = memtree.File{Data: "p"} }},
		"excluded":      {true, func(f files) { f["d/log/new"] = memtree.File{} }},
		"the directory": {true, func(f files) { f["d"] = memtree.Dir(0o700) }},
		"a hard link":   {true, func(f files) { f["d/b"] = memtree.File{Data: "b"}; f["n"] = memtree.File{HardLink: "d/b"} }},
		"host's label": {true, func(f files) {
			set(f, "d/a", func(x *memtree.File) { x.Xattr = map[string]string{"security.selinux": "x"} })
		}},
		"content":           {false, func(f files) { set(f, "d/a", func(x *memtree.File) { x.Data = "b" }) }},
		"permission":        {false, func(f files) { set(f, "d/a", func(x *memtree.File) { x.Mode = 0o645 }) }},
		"owner":             {false, func(f files) { set(f, "d/a", func(x *memtree.File) { x.UID = 1 }) }},
		"group":             {false, func(f files) { set(f, "d/a", func(x *memtree.File) { x.GID = 1 }) }},
		"a new file":        {false, func(f files) { f["d/new"] = memtree.File{} }},
		"a file less":       {false, func(f files) { delete(f, "d/b") }},
		"a name":            {false, func(f files) { f["d/bb"] = f["d/b"]; delete(f, "d/b") }},
		"a target":          {false, func(f files) { f["d/link"] = memtree.Symlink("b") }},
		"an attribute":      {false, func(f files) { set(f, "d/sub/c", func(x *memtree.File) { x.Xattr = map[string]string{"user.k": "w"} }) }},
		"a directory's":     {false, func(f files) { f["d/sub"] = memtree.Dir(0o700) }},
		"a device's number": {false, func(f files) { set(f, "d/dev", func(x *memtree.File) { x.Minor = 5 }) }},
		"a type":            {false, func(f files) { f["d/b"] = memtree.Symlink("b") }},
		"moved below":       {false, func(f files) { f["d/sub/b"] = f["d/b"]; delete(f, "d/b") }},
	} {
		f := baseFiles()
		c.change(f)
		if got := sum(f, a); (got == first) != c.same {
			t.Errorf("%s: same is %v", name, got == first)
		}
	}
	f := baseFiles()
	if sum(f, a, a) == first || sum(f) == first || sum(f, fromDockerfile("d/a", "")) == sum(f, fromDockerfile("d/b", "")) {
		t.Error("different selections have one digest")
	}
	if sum(f, fromDockerfile("d/*", "")) == sum(f, fromDockerfile("d/a", "")) {
		t.Error("a wildcard that matches more has the same digest")
	}
	if sum(f, fromDockerfile("none*", "/a")) != sum(f, fromDockerfile("nothing*", "/b")) {
		t.Error("two selections of nothing differ")
	}
	// Where it goes and with which mode is no part of it.
	b := a
	b.Dest, b.Mode, b.Owner = "/elsewhere", perm(0o700), &Owner{User: &ID{Num: 4}}
	if sum(f, b) != first {
		t.Error("the destination is part of the digest")
	}
}

// TestDigestRootMetadata: a directory copied as itself, even if it is the root.
func TestDigestRootMetadata(t *testing.T) {
	a := CopyAction{Src: "/", Dest: "/new", CreateDestPath: true}
	one, err := Digest(context.Background(), memtree.New(files{".": memtree.Dir(0o755)}), a)
	if err != nil {
		t.Fatal(err)
	}
	two, err := Digest(context.Background(), memtree.New(files{".": memtree.Dir(0o700)}), a)
	if err != nil || one == two {
		t.Errorf("%v, same %v", err, one == two)
	}
}

// TestDigestArchiveBehindLink: an archive is unpacked through a link that a copy
// would not follow.
func TestDigestArchiveBehindLink(t *testing.T) {
	a := CopyAction{Src: "l", Dest: "/new", AttemptUnpackDockerCompatibility: true}
	one, err := Digest(context.Background(), memtree.New(files{"l": memtree.Symlink("f"), "f": {Data: "1"}}), a)
	if err != nil {
		t.Fatal(err)
	}
	two, err := Digest(context.Background(), memtree.New(files{"l": memtree.Symlink("f"), "f": {Data: "2"}}), a)
	if err != nil || one == two {
		t.Errorf("%v, same %v", err, one == two)
	}
	if _, err := Digest(context.Background(), memtree.New(files{"l": memtree.Symlink("gone")}), a); err != nil {
		t.Error(err)
	}
}

func TestDigestMissing(t *testing.T) {
	src := memtree.New(files{"a": {}})
	for path, want := range map[string]string{
		"missing":     `failed to calculate checksum: "/missing": not found`,
		"./no/../way": `failed to calculate checksum: "/way": not found`,
	} {
		_, err := Digest(context.Background(), src, fromDockerfile(path, "/"))
		if err == nil || err.Error() != want || !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: got %v", path, err)
		}
	}
	a := fromDockerfile("/", "/")
	a.IncludePatterns, a.RequiredPaths = []string{"b/c"}, []string{"/b/c"}
	if _, err := Digest(context.Background(), src, a); err == nil || !strings.Contains(err.Error(), `"/b/c": not found`) {
		t.Errorf("got %v", err)
	}
}

// known is a tree that knows its files' digests, and cannot be read.
type known struct{ *memtree.Tree }

func (k known) ContentDigest(p string) (digest.Digest, error) {
	s, err := read(k.Tree, p)
	return digest.FromString(s), err
}

func (k known) Open(string) (io.ReadCloser, error) { return nil, errors.New("must not be read") }

func TestContentDigest(t *testing.T) {
	m := memtree.New(baseFiles())
	a := fromDockerfile("d", "/x/")
	want, err := Digest(context.Background(), m, a)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Digest(context.Background(), known{m}, a)
	if err != nil || got != want {
		t.Errorf("got %s, %v, want %s", got, err, want)
	}
	// Through changes too, and what they made.
	c := New(known{m}, Options{})
	if err := c.Mkfile(context.Background(), MkfileAction{Path: "/n", Data: []byte("n")}); err != nil {
		t.Fatal(err)
	}
	if got, err = Digest(context.Background(), c, a); err != nil || got != want {
		t.Errorf("got %s, %v, want %s", got, err, want)
	}
	if d, err := c.ContentDigest("n"); err != nil || d != digest.FromString("n") {
		t.Errorf("got %s, %v", d, err)
	}
}

func set(f files, p string, change func(*memtree.File)) {
	x := f[p]
	change(&x)
	f[p] = x
}
