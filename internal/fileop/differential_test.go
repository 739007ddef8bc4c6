package fileop

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	cfs "github.com/containerd/continuity/fs"
	"github.com/containerd/continuity/sysx"
	"github.com/kiln-build/kiln/internal/tree"
	"github.com/kiln-build/kiln/internal/tree/memtree"
	fscopy "github.com/tonistiigi/fsutil/copy"
	"golang.org/x/sys/unix"
)

// differentialRuns is for a longer run by hand.
var differentialRuns = flag.Int("differential", 800, "random copies to compare with fsutil's")

// TestCopyAsFsutil copies random trees with random options with fsutil, as BuildKit
// does, on a real file system, and with Changes; the results must be the same.
func TestCopyAsFsutil(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: owners and devices")
	}
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	agreed, failed := 0, 0 // failed: on both sides, from the first copy
	for seed := range uint64(*differentialRuns) {
		ok, err := differential(t, seed)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		agreed++
		if !ok {
			failed++
		}
	}
	t.Logf("%d series agreed, in %d of them nothing could be copied", agreed, failed)
	if agreed-failed < agreed/4 {
		t.Error("too few copies succeeded to prove anything")
	}
}

func differential(t *testing.T, seed uint64) (succeeded bool, err error) {
	r := rand.New(rand.NewPCG(seed, 1))
	srcFiles, baseFiles := randomFiles(r), randomFiles(r)
	src, base := memtree.New(srcFiles), memtree.New(baseFiles)
	dir := t.TempDir()
	defer os.RemoveAll(dir)
	srcDir, dstDir := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	if err := materialize(src, srcDir); err != nil {
		return false, err
	}
	if err := materialize(base, dstDir); err != nil {
		return false, err
	}
	now := time.Now()
	c := New(base, Options{Now: now})
	for range 1 + r.IntN(3) {
		a := randomCopy(r)
		if have := slices.Sorted(maps.Keys(srcFiles)); len(have) > 0 && r.IntN(4) > 0 && strings.Trim(a.Src, "/.abcdx") == "" && a.Src != "/" {
			a.Src = have[r.IntN(len(have))] + []string{"", "", "/", "/."}[r.IntN(4)]
		}
		if strings.HasSuffix(a.Src, "/.") {
			// "file/." to "/" would replace the root itself.
			a.AlwaysReplaceExistingDestPaths = false
		}
		if strings.HasSuffix(a.Dest, "/.") && anyLink(srcFiles, baseFiles) {
			// continuity's RootPath takes a link to a link before "/." for a
			// directory; ours follows it.
			a.Dest = strings.TrimSuffix(a.Dest, ".")
		}
		desc := fmt.Sprintf("%+v (%s)\nsource:\n%s\ndest:\n%s", a, optional(a), list(srcFiles), list(baseFiles))
		want := fsutilCopy(srcDir, dstDir, a)
		got := c.Copy(context.Background(), src, a)
		if got == nil && (errors.Is(want, syscall.ENOTDIR) || errors.Is(want, syscall.ELOOP)) && len(a.IncludePatterns)+len(a.ExcludePatterns) > 0 {
			// fsutil looks at the destination of what it does not copy in the
			// end, and fails if a file is in the way, or a link, which it
			// follows outside of the image. Ours does not look.
			return succeeded, nil
		}
		if (want == nil) != (got == nil) {
			return false, fmt.Errorf("fsutil: %v\nours: %v\n%s", want, got, desc)
		}
		if want != nil {
			// What a failed copy leaves behind is of no use to anyone.
			return succeeded, nil
		}
		succeeded = true
		if err := compare(dstDir, c, now); err != nil {
			return false, fmt.Errorf("%w\n%s", err, desc)
		}
	}
	return succeeded, throughTar(c, base)
}

func anyLink(trees ...map[string]memtree.File) bool {
	for _, files := range trees {
		for _, f := range files {
			if f.Link != "" {
				return true
			}
		}
	}
	return false
}

func optional(a CopyAction) string {
	s := ""
	if a.Mode != nil {
		s += fmt.Sprintf(" mode=%#o", *a.Mode)
	}
	if a.Owner != nil {
		s += fmt.Sprintf(" user=%+v group=%+v", a.Owner.User, a.Owner.Group)
	}
	return s
}

func list(files map[string]memtree.File) string {
	s := ""
	for _, p := range slices.Sorted(maps.Keys(files)) {
		f := files[p]
		s += fmt.Sprintf("  %s %#o %d:%d link=%q hard=%q\n", p, f.Mode, f.UID, f.GID, f.Link, f.HardLink)
	}
	return s
}

// fsutilCopy is BuildKit's docopy (solver/llbsolver/file/backend.go), without archives.
func fsutilCopy(src, dest string, a CopyAction) error {
	srcPath, destPath := cleanPath(a.Src), cleanPath(a.Dest)
	if !a.CreateDestPath {
		p, err := cfs.RootPath(dest, filepath.Join("/", a.Dest))
		if err != nil {
			return err
		}
		if _, err := os.Lstat(filepath.Dir(p)); err != nil {
			return err
		}
	}
	opt := func(ci *fscopy.CopyInfo) {
		ci.IncludePatterns, ci.ExcludePatterns = a.IncludePatterns, a.ExcludePatterns
		ci.Chown = func(u *fscopy.User) (*fscopy.User, error) { return u, nil }
		if a.Owner != nil {
			uid, gid, _, _ := a.Owner.Resolve()
			ci.Chown = func(*fscopy.User) (*fscopy.User, error) {
				return &fscopy.User{UID: int(uid), GID: int(gid)}, nil
			}
		}
		ci.Utime, ci.ModeStr = a.Timestamp, a.ModeStr
		if a.ModeStr == "" && a.Mode != nil {
			m := int(*a.Mode)
			ci.Mode = &m
		}
		ci.CopyDirContents, ci.FollowLinks = a.DirCopyContents, a.FollowSymlink
		ci.AlwaysReplaceExistingDestPaths = a.AlwaysReplaceExistingDestPaths
		ci.XAttrErrorHandler = func(string, string, string, error) error { return nil }
	}
	m := []string{srcPath}
	if a.AllowWildcard {
		var err error
		if m, err = fscopy.ResolveWildcards(src, srcPath, a.FollowSymlink); err != nil {
			return err
		}
		if len(m) == 0 && !a.AllowEmptyWildcard {
			return errors.New("not found")
		}
	}
	for _, s := range m {
		if err := fscopy.Copy(context.Background(), src, s, dest, destPath, opt); err != nil {
			return err
		}
	}
	return nil
}

// compare compares a real directory with a tree.
func compare(dir string, t tree.Tree, now time.Time) error {
	var want []string
	first := map[uint64]string{}
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		s, err := describeReal(p, rel, first, now)
		want = append(want, s)
		return err
	})
	if err != nil {
		return err
	}
	var got []string
	links := map[uint64]string{}
	err = tree.Walk(t, ".", func(p string, n tree.Node) error {
		s, err := describeNode(t, p, n, links, now)
		got = append(got, s)
		return err
	})
	if err != nil {
		return err
	}
	if !slices.Equal(want, got) {
		return fmt.Errorf("want:\n  %s\ngot:\n  %s", strings.Join(want, "\n  "), strings.Join(got, "\n  "))
	}
	return nil
}

func describeReal(p, rel string, first map[uint64]string, now time.Time) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		return "", err
	}
	var content string
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		b, err := os.ReadFile(p)
		if err != nil {
			return "", err
		}
		content = string(b)
	case unix.S_IFLNK:
		content, _ = os.Readlink(p)
	case unix.S_IFCHR:
		content = fmt.Sprint(unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}
	link := ""
	if st.Mode&unix.S_IFMT == unix.S_IFREG && st.Nlink > 1 {
		if link = first[st.Ino]; link == "" {
			first[st.Ino] = rel
		}
	}
	xattr := map[string]string{}
	keys, _ := sysx.LListxattr(p)
	for _, k := range keys {
		v, _ := sysx.LGetxattr(p, k)
		xattr[k] = string(v)
	}
	return describe(rel, st.Mode, st.Uid, st.Gid, content, link, xattr, time.Unix(st.Mtim.Unix()), now), nil
}

func describeNode(t tree.Tree, p string, n tree.Node, first map[uint64]string, now time.Time) (string, error) {
	var content string
	switch n.Mode & tree.ModeType {
	case tree.ModeRegular:
		r, err := t.Open(p)
		if err != nil {
			return "", err
		}
		defer r.Close()
		b, err := io.ReadAll(r)
		if err != nil {
			return "", err
		}
		if int64(len(b)) != n.Size {
			return "", fmt.Errorf("%s: size %d, content %d bytes", p, n.Size, len(b))
		}
		content = string(b)
	case tree.ModeSymlink:
		var err error
		if content, err = t.Readlink(p); err != nil {
			return "", err
		}
	case tree.ModeChar:
		content = fmt.Sprint(n.Major, n.Minor)
	}
	link := ""
	if n.IsRegular() && n.Nlink > 1 && n.Inode != 0 {
		if link = first[n.Inode]; link == "" {
			first[n.Inode] = p
		}
	}
	return describe(p, n.Mode, n.UID, n.GID, content, link, n.Xattr, n.MTime, now), nil
}

func describe(p string, mode, uid, gid uint32, content, link string, xattr map[string]string, mtime, now time.Time) string {
	when := fmt.Sprint(mtime.UnixNano())
	if mtime.After(now.Add(-time.Hour)) {
		when = "now"
	}
	x := ""
	for _, k := range slices.Sorted(maps.Keys(xattr)) {
		x += fmt.Sprintf(" %s=%q", k, xattr[k])
	}
	return fmt.Sprintf("%s %#o %d:%d %q link=%q %s%s", p, mode, uid, gid, content, link, when, x)
}

// throughTar writes the changes as a layer and applies it to the base as a
// container runtime would: the result must be what Changes shows.
func throughTar(c *Changes, base tree.Tree) error {
	var buf bytes.Buffer
	if err := c.WriteTar(context.Background(), &buf); err != nil {
		return err
	}
	return sameAfterApply(&buf, c, base)
}

var (
	names   = []string{"a", "b", "c", "d.x"}
	targets = []string{"a", "b", "../a", "../b/c", "/a", "/b/a", "/c", "..", "../../..", "missing", "/missing/x", "."}
)

func randomPath(r *rand.Rand, max int) string {
	var p string
	for range 1 + r.IntN(max) {
		p = path.Join(p, names[r.IntN(len(names))])
	}
	return p
}

func randomFiles(r *rand.Rand) map[string]memtree.File {
	files := map[string]memtree.File{}
	dirs := []string{"."}
	var regular []string
	for range r.IntN(14) {
		p := path.Join(dirs[r.IntN(len(dirs))], names[r.IntN(len(names))])
		if _, ok := files[p]; ok || strings.Count(p, "/") > 3 {
			continue
		}
		f := memtree.File{
			UID: uint32(r.IntN(3)), GID: uint32(r.IntN(3)),
			MTime: time.Unix(1_000_000+int64(r.IntN(1000)), int64(r.IntN(1000))),
		}
		switch k := r.IntN(12); {
		case k < 5:
			f.Mode = tree.ModeDir | randomMode(r)
			dirs = append(dirs, p)
		case k < 8:
			f.Mode, f.Data = tree.ModeRegular|randomMode(r), strings.Repeat(p, r.IntN(3))
			regular = append(regular, p)
		case k < 10:
			f.Link, f.Mode = targets[r.IntN(len(targets))], tree.ModeSymlink|0o777
		case k == 10 && len(regular) > 0:
			f = memtree.File{HardLink: regular[r.IntN(len(regular))]}
		case r.IntN(2) == 0:
			f.Mode = tree.ModeFIFO | randomMode(r)
		default:
			f.Mode, f.Major, f.Minor = tree.ModeChar|randomMode(r), 1, 3
		}
		if f.HardLink == "" && f.Link == "" && f.Mode&tree.ModeType != tree.ModeFIFO && f.Mode&tree.ModeType != tree.ModeChar && r.IntN(5) == 0 {
			f.Xattr = map[string]string{"user.k" + fmt.Sprint(r.IntN(2)): fmt.Sprint("v", r.IntN(2))}
			if f.Mode&tree.ModeType == tree.ModeRegular && r.IntN(2) == 0 {
				f.Xattr["security.capability"] = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
			}
		}
		files[p] = f
	}
	return files
}

func randomMode(r *rand.Rand) uint32 {
	m := []uint32{0o755, 0o644, 0o700, 0o600, 0o777, 0o750}[r.IntN(6)]
	if r.IntN(5) == 0 {
		m |= []uint32{0o4000, 0o2000, 0o1000, 0o6000}[r.IntN(4)]
	}
	return m
}

func randomCopy(r *rand.Rand) CopyAction {
	yes := func(n int) bool { return r.IntN(n) > 0 }
	a := CopyAction{
		Src: randomPath(r, 3), Dest: randomPath(r, 3),
		FollowSymlink: yes(3), DirCopyContents: yes(3), CreateDestPath: yes(4), AllowWildcard: yes(3),
		AllowEmptyWildcard: yes(2), AlwaysReplaceExistingDestPaths: !yes(3),
	}
	switch r.IntN(8) {
	case 0, 1, 2:
		a.Src = "/"
	case 3:
		a.Src += []string{"/", "/.", "/..", "/../a"}[r.IntN(4)]
	case 4, 5:
		a.Src = []string{"*", "?", "a*", "*/a", "a/*", "[ab]", "b/[^a]", `\a`, "*/*", "./*", "[", "a[^x]b"}[r.IntN(12)]
	}
	switch r.IntN(6) {
	case 0:
		a.Dest = "/"
	case 1:
		a.Dest += "/"
	case 2:
		a.Dest += "/new/" + []string{"x", "", "x/.", "../y/"}[r.IntN(4)]
	case 3:
		a.Dest = "../" + a.Dest + "/."
	}
	if !yes(4) {
		m := randomMode(r)
		a.Mode = &m
	}
	if !yes(6) {
		a.ModeStr = []string{"u=rwX,go=rX", "a+x", "go-w", "u+s", "g+s,o=", "a-x+X"}[r.IntN(6)]
	}
	if !yes(4) {
		a.Owner = &Owner{User: &ID{Num: 7}, Group: &ID{Num: 8}}
	}
	if !yes(4) {
		ts := time.Unix(5000, 0)
		a.Timestamp = &ts
	}
	patterns := []string{"a", "**/a", "a/b", "*/c", "b/**", "*", "d.x", "**/*.x", "!a/b", "!**/c", "c/a"}
	if !yes(4) {
		a.IncludePatterns = []string{patterns[r.IntN(8)], patterns[r.IntN(len(patterns))]}
	}
	if !yes(4) {
		a.ExcludePatterns = []string{patterns[r.IntN(8)], patterns[r.IntN(len(patterns))]}
	}
	return a
}

// materialize writes a tree to a real directory.
func materialize(t tree.Tree, dir string) error {
	first := map[uint64]string{}
	var dirs []string
	mtimes := map[string]time.Time{}
	err := tree.Walk(t, ".", func(p string, n tree.Node) error {
		to := filepath.Join(dir, p)
		if f, ok := first[n.Inode]; ok && !n.IsDir() {
			return os.Link(f, to)
		}
		first[n.Inode] = to
		var err error
		switch n.Mode & tree.ModeType {
		case tree.ModeDir:
			err = os.Mkdir(to, 0o700)
		case tree.ModeRegular:
			r, oerr := t.Open(p)
			if oerr != nil {
				return oerr
			}
			b, _ := io.ReadAll(r)
			err = os.WriteFile(to, b, 0o600)
		case tree.ModeSymlink:
			target, _ := t.Readlink(p)
			err = os.Symlink(target, to)
		default:
			err = unix.Mknod(to, n.Mode, int(unix.Mkdev(n.Major, n.Minor)))
		}
		if err != nil {
			return err
		}
		if err := os.Lchown(to, int(n.UID), int(n.GID)); err != nil {
			return err
		}
		if !n.IsSymlink() {
			if err := unix.Chmod(to, n.Mode&tree.ModePerm); err != nil {
				return err
			}
		}
		for k, v := range n.Xattr {
			if err := unix.Lsetxattr(to, k, []byte(v), 0); err != nil {
				return fmt.Errorf("set %s on %s: %w", k, to, err)
			}
		}
		dirs = append(dirs, to)
		mtimes[to] = n.MTime
		return nil
	})
	if err != nil {
		return err
	}
	slices.Reverse(dirs)
	for _, d := range dirs {
		ts, _ := unix.TimeToTimespec(mtimes[d])
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, d, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
	}
	return nil
}
