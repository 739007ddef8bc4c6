package fileop

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/tree"
	"github.com/kiln-build/kiln/internal/tree/memtree"
)

type files = map[string]memtree.File

// fromDockerfile is how BuildKit's front end asks for COPY src dest.
func fromDockerfile(src, dest string) CopyAction {
	return CopyAction{
		Src: src, Dest: dest, FollowSymlink: true, DirCopyContents: true, CreateDestPath: true,
		AllowWildcard: true, AllowEmptyWildcard: true,
	}
}

func perm(m uint32) *uint32 { return &m }

// layerOf returns the entries of the layer that the changes make, one a line: name,
// mode, owner, and what it holds.
func layerOf(t *testing.T, c *Changes) []string {
	t.Helper()
	var buf bytes.Buffer
	if err := c.WriteTar(context.Background(), &buf); err != nil {
		t.Fatal(err)
	}
	l, names, err := readLayer(&buf)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, name := range names {
		p := tree.Clean(name)
		n, err := l.Lstat(p)
		if err != nil { // a marker
			out = append(out, name)
			continue
		}
		s := fmt.Sprintf("%s %#o %d:%d", name, n.Mode&tree.ModePerm, n.UID, n.GID)
		if n.IsRegular() {
			b, err := read(l, p)
			if err != nil {
				t.Fatal(err)
			}
			s += " " + b
		}
		if n.IsSymlink() {
			target, _ := l.Readlink(p)
			s += " -> " + target
		}
		out = append(out, s)
	}
	return out
}

func TestCopy(t *testing.T) {
	src := memtree.New(files{
		"f":           {Data: "f", Mode: 0o640, UID: 5, GID: 6},
		"d":           {Mode: tree.ModeDir | 0o711, UID: 1},
		"d/a.go":      {Data: "a"},
		"d/b.md":      {Data: "b"},
		"d/sub/c.go":  {Data: "c"},
		"link":        memtree.Symlink("f"),
		"linkdir":     memtree.Symlink("/d"),
		"d2/a.go":     {Data: "a2"},
		"x/y/z/deep":  {Data: "deep"},
		"x/y/other":   {Data: "o"},
		"hard/1":      {Data: "same"},
		"hard/2":      {HardLink: "hard/1"},
		"odd/[a].txt": {Data: "odd"},
		"up":          memtree.Symlink("../../../f"),
		"empty":       memtree.Dir(0o755),
	})
	base := memtree.New(files{
		"etc":         {Mode: tree.ModeDir | 0o750, UID: 9},
		"etc/f":       {Data: "old"},
		"usr/lib/x":   {},
		"lib":         memtree.Symlink("usr/lib"),
		"abslib":      memtree.Symlink("/usr/lib"),
		"evil":        memtree.Symlink("../../../../usr"),
		"dangling":    memtree.Symlink("/var/made"),
		"d/old":       {Data: "old"},
		"etc/link":    memtree.Symlink("f"),
		"tmp":         {Mode: tree.ModeDir | 0o1777},
		"var/mail":    {Mode: tree.ModeDir | 0o2775, GID: 8},
		"dir/f/keep":  {Data: "kept"},
		"dir/d":       {Data: "a file"},
		"opt/x/y/old": {Data: "old"},
	})
	with := func(a CopyAction, f func(*CopyAction)) CopyAction {
		f(&a)
		return a
	}
	own := &Owner{User: &ID{Num: 7}, Group: &ID{Num: 8}}
	for _, c := range []struct {
		name string
		a    CopyAction
		want string // the layer's entries; or "!" and what the error says
	}{
		{"file to new file", fromDockerfile("f", "/new"), "new 0640 5:6 f"},
		{"file into directory", fromDockerfile("f", "/etc"), "etc/ 0750 9:0; etc/f 0640 5:6 f"},
		{"file into new directory", fromDockerfile("f", "/made/deep/"), "made/ 0755 0:0; made/deep/ 0755 0:0; made/deep/f 0640 5:6 f"},
		{"file over file", fromDockerfile("f", "/d/old"), "d/ 0755 0:0; d/old 0640 5:6 f"},
		{"file over link follows it", fromDockerfile("f", "/etc/link"), "etc/ 0750 9:0; etc/f 0640 5:6 f"},
		{"file through linked directory", fromDockerfile("f", "/lib/"), "usr/ 0755 0:0; usr/lib/ 0755 0:0; usr/lib/f 0640 5:6 f"},
		{"file through absolute link", fromDockerfile("f", "/abslib/"), "usr/ 0755 0:0; usr/lib/ 0755 0:0; usr/lib/f 0640 5:6 f"},
		{"link out of the root stays in", fromDockerfile("f", "/evil/"), "usr/ 0755 0:0; usr/f 0640 5:6 f"},
		{"dangling destination is made", fromDockerfile("f", "/dangling/"), "var/ 0755 0:0; var/made/ 0755 0:0; var/made/f 0640 5:6 f"},
		{"dots out of the root stay in", fromDockerfile("../../f", "../../x"), "x 0640 5:6 f"},
		{"directory's content to new directory", fromDockerfile("d", "/new"), "new/ 0755 0:0; new/a.go 0644 0:0 a; new/b.md 0644 0:0 b; new/sub/ 0755 0:0; new/sub/c.go 0644 0:0 c"},
		{"directory's content into directory", fromDockerfile("d/", "/d/"), "d/ 0755 0:0; d/a.go 0644 0:0 a; d/b.md 0644 0:0 b; d/sub/ 0755 0:0; d/sub/c.go 0644 0:0 c"},
		{"directory itself to new", with(fromDockerfile("d2", "/new"), func(a *CopyAction) { a.DirCopyContents = false }), "new/ 0755 0:0; new/a.go 0644 0:0 a2"},
		{"directory itself into directory", with(fromDockerfile("d2", "/etc"), func(a *CopyAction) { a.DirCopyContents = false }), "etc/ 0750 9:0; etc/d2/ 0755 0:0; etc/d2/a.go 0644 0:0 a2"},
		{"directory's metadata", with(fromDockerfile("d", "/new"), func(a *CopyAction) { a.DirCopyContents = false; a.IncludePatterns = []string{"*.md"} }), "new/ 0711 1:0; new/b.md 0644 0:0 b"},
		{"empty directory to new", fromDockerfile("empty", "/new"), "new/ 0755 0:0"},
		{"empty directory to old is no change", fromDockerfile("empty", "/etc"), ""},
		{"glob", fromDockerfile("d/*.go", "/new/"), "new/ 0755 0:0; new/a.go 0644 0:0 a"},
		{"glob of directories", fromDockerfile("d*", "/new/"), "new/ 0755 0:0; new/a.go 0644 0:0 a2; new/b.md 0644 0:0 b; new/sub/ 0755 0:0; new/sub/c.go 0644 0:0 c"},
		{"glob above", fromDockerfile("*/a.go", "/new/"), "new/ 0755 0:0; new/a.go 0644 0:0 a2"},
		{"glob through a link", fromDockerfile("linkdir/*.md", "/"), "b.md 0644 0:0 b"},
		{"empty glob", fromDockerfile("*.none", "/new/"), ""},
		{"empty glob refused", with(fromDockerfile("*.none", "/new/"), func(a *CopyAction) { a.AllowEmptyWildcard = false }), "!/*.none not found"},
		{"no glob", with(fromDockerfile("odd/[a].txt", "/n"), func(a *CopyAction) { a.AllowWildcard = false }), "n 0644 0:0 odd"},
		{"escaped glob", fromDockerfile(`odd/[[]a].txt`, "/n"), "n 0644 0:0 odd"},
		{"missing", fromDockerfile("sub/../nothing", "/new/"), `!"/nothing": not found`},
		{"missing in a file", fromDockerfile("f/x", "/new/"), "!not a directory"},
		{"link followed", fromDockerfile("link", "/n"), "n 0640 5:6 f"},
		{"link into directory keeps the link's name", fromDockerfile("link", "/etc/"), "etc/ 0750 9:0; etc/link 0640 5:6 f"},
		{"link itself", with(fromDockerfile("link", "/n"), func(a *CopyAction) { a.FollowSymlink = false }), "n 0777 0:0 -> f"},
		{"link out of the source stays in", fromDockerfile("up", "/n"), "n 0640 5:6 f"},
		{"linked directory", fromDockerfile("linkdir", "/d2/"), "d2/ 0755 0:0; d2/a.go 0644 0:0 a; d2/b.md 0644 0:0 b; d2/sub/ 0755 0:0; d2/sub/c.go 0644 0:0 c"},
		{"chmod goes to implied directories", with(fromDockerfile("f", "/new/sub/"), func(a *CopyAction) { a.Mode = perm(0o4700) }), "new/ 0700 0:0; new/sub/ 0700 0:0; new/sub/f 04700 5:6 f"},
		{"chmod leaves old directories", with(fromDockerfile("f", "/tmp/"), func(a *CopyAction) { a.Mode = perm(0o700) }), "tmp/ 01777 0:0; tmp/f 0700 5:6 f"},
		{"chmod goes to directories copied", with(fromDockerfile("d", "/new"), func(a *CopyAction) { a.Mode = perm(0o700); a.IncludePatterns = []string{"sub"} }), "new/ 0700 0:0; new/sub/ 0700 0:0; new/sub/c.go 0700 0:0 c"},
		{"symbolic chmod", with(fromDockerfile("d", "/new"), func(a *CopyAction) { a.ModeStr = "go=,u+X"; a.IncludePatterns = []string{"sub"} }), "new/ 0755 0:0; new/sub/ 0700 0:0; new/sub/c.go 0600 0:0 c"},
		{"bad symbolic chmod", with(fromDockerfile("d", "/new"), func(a *CopyAction) { a.ModeStr = "zz" }), "!invalid mode"},
		{"chown goes to implied directories", with(fromDockerfile("f", "/new/sub/"), func(a *CopyAction) { a.Owner = own }), "new/ 0755 7:8; new/sub/ 0755 7:8; new/sub/f 0640 7:8 f"},
		{"chown leaves old directories", with(fromDockerfile("f", "/etc/n/"), func(a *CopyAction) { a.Owner = own }), "etc/ 0750 9:0; etc/n/ 0755 7:8; etc/n/f 0640 7:8 f"},
		{"setgid directory", fromDockerfile("f", "/var/mail/x/"), "var/ 0755 0:0; var/mail/ 02775 0:8; var/mail/x/ 0755 0:8; var/mail/x/f 0640 5:6 f"},
		{"exclude", with(fromDockerfile("d", "/new/"), func(a *CopyAction) { a.ExcludePatterns = []string{"**/*.go"} }), "new/ 0755 0:0; new/b.md 0644 0:0 b; new/sub/ 0755 0:0"},
		{"exclude but", with(fromDockerfile("d", "/new/"), func(a *CopyAction) { a.ExcludePatterns = []string{"*", "!sub/c.go"} }), "new/ 0755 0:0; new/sub/ 0755 0:0; new/sub/c.go 0644 0:0 c"},
		{"exclude all", with(fromDockerfile("d", "/new/"), func(a *CopyAction) { a.ExcludePatterns = []string{"*"} }), "new/ 0755 0:0"},
		{"bad exclude", with(fromDockerfile("d", "/new/"), func(a *CopyAction) { a.ExcludePatterns = []string{"[a-"} }), "!invalid excludepatterns"},
		{"parents", with(fromDockerfile("/", "/opt/"), func(a *CopyAction) {
			a.IncludePatterns = []string{"x/y/z/deep"}
			a.RequiredPaths = []string{"/x/y/z/deep"}
		}), "opt/ 0755 0:0; opt/x/ 0755 0:0; opt/x/y/ 0755 0:0; opt/x/y/z/ 0755 0:0; opt/x/y/z/deep 0644 0:0 deep"},
		{"parents of nothing", with(fromDockerfile("/", "/opt/"), func(a *CopyAction) {
			a.IncludePatterns = []string{"x/y/nothing"}
			a.RequiredPaths = []string{"/x/y/nothing"}
		}), `!"/x/y/nothing": not found`},
		{"hard links", fromDockerfile("hard", "/h/"), "h/ 0755 0:0; h/1 0644 0:0 same; h/2 0644 0:0 same"},
		{"directory over file", fromDockerfile("d", "/etc/f"), "!cannot copy to non-directory"},
		{"directory of a name over file of it", fromDockerfile("/", "/dir/"), "!cannot"},
		{"file over directory of its name", fromDockerfile("f", "/dir/"), "!cannot replace to directory /dir/f with file"},
		{"replaced", with(fromDockerfile("f", "/dir/"), func(a *CopyAction) { a.AlwaysReplaceExistingDestPaths = true }), "dir/ 0755 0:0; dir/f 0640 5:6 f"},
		{"replaced by directory", with(fromDockerfile("/", "/dir/"), func(a *CopyAction) {
			a.AlwaysReplaceExistingDestPaths = true
			a.IncludePatterns = []string{"d/b.md", "d"}
			a.ExcludePatterns = []string{"d/sub", "d/a.go"}
		}), "dir/ 0755 0:0; dir/d/ 0711 1:0; dir/d/b.md 0644 0:0 b"},
		{"no parents", with(fromDockerfile("f", "/new/f"), func(a *CopyAction) { a.CreateDestPath = false }), "!failed to stat /new/f"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ch := New(base, Options{Now: time.Unix(77, 0)})
			err := ch.Copy(context.Background(), src, c.a)
			if msg, bad := strings.CutPrefix(c.want, "!"); bad {
				if err == nil || !strings.Contains(err.Error(), msg) {
					t.Errorf("got %v, want %q", err, msg)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(layerOf(t, ch), "; "); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
			if err := throughTar(ch, base); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestChain: each action sees what those before did; the layer has just the outcome.
func TestChain(t *testing.T) {
	base := memtree.New(files{"app/old/a": {Data: "a"}, "app/old/b": {Data: "b"}, "file": {Data: "x"}, "app/keep": {}})
	c := New(base, Options{Now: time.Unix(77, 0)})
	ctx := context.Background()
	steps := []func() error{
		func() error { return c.Mkdir(ctx, MkdirAction{Path: "/srv/www", Mode: 0o750, MakeParents: true}) },
		func() error {
			return c.Mkfile(ctx, MkfileAction{Path: "/srv/www/index", Mode: 0o600, Data: []byte("hello"), Owner: &Owner{User: &ID{Num: 3}}})
		},
		func() error { return c.Symlink(ctx, SymlinkAction{Oldpath: "/srv/www", Newpath: "/www"}) },
		func() error { return c.Copy(ctx, c, fromDockerfile("/www/index", "/www/copy")) },
		func() error { return c.Remove(ctx, RemoveAction{Path: "/app/old"}) },
		func() error { return c.Mkdir(ctx, MkdirAction{Path: "/app/old", Mode: 0o700}) },
		func() error { return c.Mkfile(ctx, MkfileAction{Path: "/app/old/c", Mode: 0o644}) },
		func() error { return c.Remove(ctx, RemoveAction{Path: "/fi*", AllowWildcard: true}) },
		func() error { return c.Mkfile(ctx, MkfileAction{Path: "/tmpfile", Mode: 0o644}) },
		func() error { return c.Remove(ctx, RemoveAction{Path: "/tmpfile"}) },
		func() error { return c.Remove(ctx, RemoveAction{Path: "/nothing", AllowNotFound: true}) },
		func() error { return c.Mkdir(ctx, MkdirAction{Path: "/app/old/..", Mode: 0o700}) },
	}
	for i, s := range steps {
		if err := s(); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
	}
	want := []string{
		".wh.file", "app/ 0755 0:0", "app/old/ 0700 0:0", "app/old/.wh..wh..opq", "app/old/c 0644 0:0 ",
		"srv/ 0750 0:0", "srv/www/ 0750 0:0", "srv/www/copy 0600 3:3 hello", "srv/www/index 0600 3:3 hello", "www 0777 0:0 -> /srv/www",
	}
	got := layerOf(t, c)
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if err := throughTar(c, base); err != nil {
		t.Error(err)
	}
	for _, err := range []error{
		c.Remove(ctx, RemoveAction{Path: "/nothing"}),
		c.Symlink(ctx, SymlinkAction{Oldpath: "x", Newpath: "/www"}),
		c.Mkfile(ctx, MkfileAction{Path: "/"}),
		c.Mkfile(ctx, MkfileAction{Path: "/no/parent"}),
		c.Mkfile(ctx, MkfileAction{Path: "/app"}),
		c.Mkdir(ctx, MkdirAction{Path: "/no/parent"}),
		c.Mkdir(ctx, MkdirAction{Path: "/app/keep/x", MakeParents: true}),
		c.Remove(ctx, RemoveAction{Path: "/"}),
	} {
		if err == nil {
			t.Error("no error")
		}
	}
}

// TestFork: a clone and a second Changes on top go their own ways.
func TestFork(t *testing.T) {
	ctx := context.Background()
	c := New(memtree.New(files{"a": {Data: "a"}}), Options{})
	src := memtree.New(files{"1": {Data: "x"}, "2": {HardLink: "1"}})
	if err := c.Copy(ctx, src, fromDockerfile("/", "/d/")); err != nil {
		t.Fatal(err)
	}
	clone, top := c.Clone(), New(c, Options{})
	for _, x := range []*Changes{clone, top} {
		if err := x.Remove(ctx, RemoveAction{Path: "/d/1"}); err != nil {
			t.Fatal(err)
		}
		if err := x.Copy(ctx, src, fromDockerfile("/", "/e/")); err != nil {
			t.Fatal(err)
		}
	}
	inodes := map[uint64]int{}
	tree.Walk(top, ".", func(p string, n tree.Node) error {
		if n.IsRegular() && n.Nlink > 1 {
			inodes[n.Inode]++
		}
		return nil
	})
	if len(inodes) != 2 {
		t.Errorf("inodes of linked files: %v", inodes)
	}
	if n, err := c.Lstat("d/1"); err != nil || n.Nlink != 2 {
		t.Errorf("the original changed: %+v, %v", n, err)
	}
	if got := layerOf(t, top); strings.Join(got, "; ") != "d/ 0755 0:0; d/.wh.1; e/ 0755 0:0; e/1 0644 0:0 x; e/2 0644 0:0 x" {
		t.Errorf("got %q", got)
	}
	if got := layerOf(t, clone); strings.Join(got, "; ") != "d/ 0755 0:0; d/2 0644 0:0 x; e/ 0755 0:0; e/1 0644 0:0 x; e/2 0644 0:0 x" {
		t.Errorf("got %q", got)
	}
}

// TestItselfIsNoChange: COPY / / of an image onto its own base makes no new layer of what
// is the base's.
func TestItselfIsNoChange(t *testing.T) {
	base := memtree.New(files{
		"bin/a": {Data: "a", MTime: time.Unix(5, 5)}, "bin/b": {HardLink: "bin/a"}, "etc/x": {Data: "x"}, "etc/l": memtree.Symlink("x"),
		"etc/y": {Data: "y"}, "etc/z": {Data: "z"}, "etc/k": memtree.Symlink("x"),
	})
	top := memtree.New(files{
		"etc/x": {Data: "X"}, "etc/y": {Data: "y", UID: 1}, "etc/z": {Data: "z"}, "etc/k": memtree.Symlink("x"),
	})
	built := rootfs.New(base, top)
	c := New(rootfs.New(base), Options{})
	if err := c.Copy(context.Background(), built, fromDockerfile("/", "/")); err != nil {
		t.Fatal(err)
	}
	// Also z and k, which are equal: whether they would be on another day is not known.
	if got := strings.Join(layerOf(t, c), "; "); got != "etc/ 0755 0:0; etc/k 0777 0:0 -> x; etc/x 0644 0:0 X; etc/y 0644 1:0 y; etc/z 0644 0:0 z" {
		t.Errorf("got %s", got)
	}
	// Nor is what is changed, and changed back.
	c = New(built, Options{})
	if err := c.Copy(context.Background(), built, fromDockerfile("etc/x", "/etc/x")); err != nil {
		t.Fatal(err)
	}
	if got := layerOf(t, c); len(got) != 0 {
		t.Errorf("got %q", got)
	}
	// A build context is of no layer: what comes from there is a change, whatever its time.
	c = New(base, Options{})
	if err := c.Copy(context.Background(), untraced{base}, fromDockerfile("etc/x", "/etc/x")); err != nil {
		t.Fatal(err)
	}
	if got := layerOf(t, c); len(got) != 2 {
		t.Errorf("got %q", got)
	}
	unlinked := rootfs.New(base, memtree.New(files{"bin/b": {Data: "a", MTime: time.Unix(5, 5)}}))
	c = New(base, Options{})
	if err := c.Copy(context.Background(), unlinked, fromDockerfile("bin", "/bin")); err != nil {
		t.Fatal(err)
	}
	if got := layerOf(t, c); len(got) != 3 {
		t.Errorf("a link that is no more is a change: got %q", got)
	}
}

// untraced is a tree without layers.
type untraced struct{ tree.Tree }

// TestRefused: what an image layer cannot hold is an error, not something else.
func TestRefused(t *testing.T) {
	ctx := context.Background()
	for name, f := range (files{
		"d/.wh.passwd":             {},
		"d/null":                   {Mode: tree.ModeChar | 0o666},
		strings.Repeat("x", 256):   {},
		strings.Repeat("x/", 2100): {Mode: tree.ModeDir | 0o755},
	}) {
		c := New(nil, Options{})
		src := memtree.New(files{name: f})
		if err := c.Copy(ctx, src, fromDockerfile("/", "/etc/")); err == nil {
			t.Errorf("%.20q was copied", name)
		}
		if _, err := Digest(ctx, src, fromDockerfile("/", "/etc/")); err == nil {
			t.Errorf("%.20q has a digest", name)
		}
	}
	c := New(nil, Options{})
	if err := c.Mkfile(ctx, MkfileAction{Path: "/.wh..wh..opq"}); err == nil {
		t.Error("an opaque marker was made")
	}
}

func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancelCause(context.Background())
	cause := errors.New("enough")
	cancel(cause)
	src := memtree.New(files{"a": {Data: "a"}})
	if err := New(nil, Options{}).Copy(ctx, src, fromDockerfile("a", "/")); !errors.Is(err, cause) {
		t.Errorf("Copy: %v", err)
	}
	if _, err := Digest(ctx, src, fromDockerfile("a", "/")); !errors.Is(err, cause) {
		t.Errorf("Digest: %v", err)
	}
}

func TestOwnerNames(t *testing.T) {
	img := rootfs.New(memtree.New(files{
		"etc/passwd": {Data: "app:x:1000:1001::/:\n"}, "etc/group": {Data: "staff:x:50:\n"},
	}))
	o := Owner{User: &ID{Name: "app", Tree: img}, Group: &ID{Name: "nobody", Tree: img}}
	uid, gid, unknown, err := o.Resolve()
	if uid != 1000 || gid != 1001 || !slices.Equal(unknown, []string{"nobody"}) || err != nil {
		t.Errorf("got %d:%d, %q, %v", uid, gid, unknown, err)
	}
	o.Group.Name = "staff"
	if _, gid, _, _ := o.Resolve(); gid != 50 {
		t.Errorf("group is %d", gid)
	}
	o = Owner{User: &ID{Num: 4}}
	if uid, gid, _, _ := o.Resolve(); uid != 4 || gid != 4 {
		t.Errorf("got %d:%d", uid, gid)
	}
}
