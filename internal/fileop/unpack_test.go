package fileop

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	cfs "github.com/containerd/continuity/fs"
	"github.com/kiln-build/kiln/internal/tree"
	"github.com/kiln-build/kiln/internal/tree/memtree"
	"github.com/klauspost/compress/zstd"
	"github.com/moby/go-archive"
	fscopy "github.com/tonistiigi/fsutil/copy"
)

// TestUnpackAsDocker unpacks random archives over random trees with the code
// that BuildKit uses for ADD, on a real file system, and with Changes.
func TestUnpackAsDocker(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: owners and devices")
	}
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	if err := inChroot(t.TempDir(), func() error { return nil }); err != nil {
		t.Skipf("needs to change the root directory: %v", err)
	}
	agreed, failed := 0, 0
	for seed := range uint64(*differentialRuns) / 3 {
		ok, err := differentialUnpack(t, seed)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		agreed++
		if !ok {
			failed++
		}
	}
	t.Logf("%d archives agreed, %d of them failed on both sides", agreed, failed)
	if agreed-failed < agreed/3 {
		t.Error("too few archives could be unpacked to prove anything")
	}
}

func differentialUnpack(t *testing.T, seed uint64) (bool, error) {
	r := rand.New(rand.NewPCG(seed, 2))
	baseFiles := randomFiles(r)
	// overlayfs, on which BuildKit unpacks, separates the names of a file below
	// when one is changed; a plain directory does not.
	maps.DeleteFunc(baseFiles, func(_ string, f memtree.File) bool { return f.HardLink != "" })
	base := memtree.New(baseFiles)
	archive, listing := randomTar(r)
	dest := []string{"/", "/a", "/b/", "/a/b", "/new/x"}[r.IntN(5)]
	a := CopyAction{Src: "x", Dest: dest, CreateDestPath: true, AttemptUnpackDockerCompatibility: true, FollowSymlink: true}
	if r.IntN(4) == 0 {
		a.Owner = &Owner{User: &ID{Num: 7}, Group: &ID{Num: 8}}
	}
	dir := t.TempDir()
	defer os.RemoveAll(dir)
	dst := filepath.Join(dir, "dst")
	if err := materialize(base, dst); err != nil {
		return false, err
	}
	now := time.Now()
	desc := fmt.Sprintf("dest %s%s\nbase:\n%sarchive:\n%s", dest, optional(a), list(baseFiles), listing)
	c := New(base, Options{Now: now, Dir: dir})
	defer c.Close()
	src := memtree.New(map[string]memtree.File{"x": {Data: string(archive)}})
	want := dockerUnpack(archive, dst, a)
	got := c.Copy(context.Background(), src, a)
	if got == nil && want != nil && strings.Contains(want.Error(), "chtimes") {
		return false, nil // a directory of the archive was replaced later in it: no reason to fail
	}
	if (want == nil) != (got == nil) {
		return false, fmt.Errorf("go-archive: %v\nours: %v\n%s", want, got, desc)
	}
	if want != nil {
		return false, nil
	}
	if err := compare(dst, c, now); err != nil {
		return false, fmt.Errorf("%w\n%s", err, desc)
	}
	return true, throughTar(c, base)
}

// dockerUnpack is unpack of BuildKit's solver/llbsolver/file/unpack.go.
func dockerUnpack(dt []byte, root string, a CopyAction) error {
	dest, err := cfs.RootPath(root, cleanPath(a.Dest))
	if err != nil {
		return err
	}
	opts := &archive.TarOptions{BestEffortXattrs: true}
	ch := func(u *fscopy.User) (*fscopy.User, error) { return u, nil }
	if a.Owner != nil {
		uid, gid, _, _ := a.Owner.Resolve()
		opts.ChownOpts = &archive.ChownOpts{UID: int(uid), GID: int(gid)}
		ch = func(*fscopy.User) (*fscopy.User, error) { return &fscopy.User{UID: int(uid), GID: int(gid)}, nil }
	}
	if _, err := fscopy.MkdirAll(dest, 0o755, ch, nil); err != nil {
		return err
	}
	return inChroot(dest, func() error { return archive.Unpack(bytes.NewReader(dt), "/", opts) })
}

// inChroot runs f with another root directory, as go-archive's chrootarchive does.
func inChroot(dir string, f func() error) error {
	done := make(chan error)
	go func() {
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		done <- func() error {
			if err := syscall.Unshare(syscall.CLONE_FS); err != nil {
				return err
			}
			if err := syscall.Chroot(dir); err != nil {
				return err
			}
			if err := syscall.Chdir("/"); err != nil {
				return err
			}
			return f()
		}()
	}()
	return <-done
}

func randomTar(r *rand.Rand) ([]byte, string) {
	var hs []tar.Header
	for range 1 + r.IntN(8) {
		h := tar.Header{
			Name: randomPath(r, 3), Mode: int64(randomMode(r)), Uid: r.IntN(3), Gid: r.IntN(3),
			ModTime: time.Unix(2_000_000+int64(r.IntN(100)), 0),
		}
		if r.IntN(8) == 0 {
			h.Name = []string{"./", ".", "./a", "../b", "/c", "a/../b", "/", ".."}[r.IntN(8)]
		}
		switch k := r.IntN(10); {
		case k < 4 || h.Name == "/" || h.Name == ".." || strings.HasSuffix(h.Name, "/"):
			h.Typeflag = tar.TypeDir
		case k < 7:
			h.Typeflag, h.Size = tar.TypeReg, int64(r.IntN(20))
		case k < 8:
			h.Typeflag, h.Linkname = tar.TypeSymlink, targets[r.IntN(len(targets))]
		case k < 9:
			h.Typeflag, h.Linkname = tar.TypeLink, randomPath(r, 2)
			if len(hs) > 0 && r.IntN(3) > 0 {
				h.Linkname = path.Clean(hs[r.IntN(len(hs))].Name)
			}
		default:
			h.Typeflag, h.Devmajor, h.Devminor = tar.TypeChar, 1, 3
		}
		if r.IntN(6) == 0 {
			h.PAXRecords = map[string]string{"SCHILY.xattr.user.k": "v"}
		}
		hs = append(hs, h)
	}
	s := ""
	for _, h := range hs {
		s += fmt.Sprintf("  %q %c %#o %d:%d -> %q size %d %v\n", h.Name, h.Typeflag, h.Mode, h.Uid, h.Gid, h.Linkname, h.Size, h.PAXRecords)
	}
	return makeTar(hs), s
}

func makeTar(hs []tar.Header) []byte {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for i, h := range hs {
		if err := tw.WriteHeader(&h); err != nil {
			panic(err)
		}
		io.CopyN(tw, strings.NewReader(strings.Repeat(string(rune('a'+i)), 20)), h.Size)
	}
	tw.Close()
	return buf.Bytes()
}

func compressors(t *testing.T) map[string]func([]byte) []byte {
	command := func(name string, args ...string) func([]byte) []byte {
		return func(b []byte) []byte {
			cmd := exec.Command(name, args...)
			cmd.Stdin = bytes.NewReader(b)
			out, err := cmd.Output()
			if errors.Is(err, exec.ErrNotFound) {
				t.Skipf("no %s here", name)
			}
			if err != nil {
				t.Fatal(err)
			}
			return out
		}
	}
	return map[string]func([]byte) []byte{
		"none": func(b []byte) []byte { return b },
		"gzip": func(b []byte) []byte {
			var buf bytes.Buffer
			w := gzip.NewWriter(&buf)
			w.Write(b)
			w.Close()
			return buf.Bytes()
		},
		"zstd": func(b []byte) []byte {
			w, _ := zstd.NewWriter(nil)
			return w.EncodeAll(b, nil)
		},
		"bzip2":     command("bzip2", "-c"),
		"xz":        command("xz", "-c"),
		"xz blocks": command("xz", "-c", "--block-size=65536", "--check=sha256"),
		"xz twice": func(b []byte) []byte {
			half := len(b) / 2
			out := append(command("xz", "-c")(b[:half]), 0, 0, 0, 0)
			return append(out, command("xz", "-c")(b[half:])...)
		},
	}
}

func TestUnpackCompressed(t *testing.T) {
	big := make([]byte, 300<<10)
	for i := range big {
		big[i] = byte(i * i >> 7)
	}
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	tw.WriteHeader(&tar.Header{Name: "dir/big", Mode: 0o600, Size: int64(len(big)), Uid: 5})
	tw.Write(big)
	tw.Close()
	for name, z := range compressors(t) {
		t.Run(name, func(t *testing.T) {
			src := memtree.New(map[string]memtree.File{"no-suffix": {Data: string(z(buf.Bytes()))}})
			c := New(nil, Options{Dir: t.TempDir()})
			defer c.Close()
			a := CopyAction{Src: "no-suffix", Dest: "/to/", AttemptUnpackDockerCompatibility: true, CreateDestPath: true}
			if err := c.Copy(context.Background(), src, a); err != nil {
				t.Fatal(err)
			}
			n, err := c.Lstat("to/dir/big")
			if err != nil || n.Mode != tree.ModeRegular|0o600 || n.UID != 5 {
				t.Fatalf("got %+v, %v", n, err)
			}
			r, err := c.Open("to/dir/big")
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(r)
			if err != nil || !bytes.Equal(got, big) {
				t.Fatalf("content differs, %d bytes, %v", len(got), err)
			}
			if es, _ := os.ReadDir(c.opt.Dir); len(es) > 0 {
				t.Errorf("scratch file has a name: %v", es)
			}
		})
	}
}

// FuzzUnpack: whatever an archive holds, nothing leaves the destination, and what
// comes of it is a layer.
func FuzzUnpack(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 5))
	for range 20 {
		b, _ := randomTar(r)
		f.Add(b)
	}
	f.Add(makeTar([]tar.Header{
		{Typeflag: tar.TypeSymlink, Name: "a", Linkname: "../../outside"},
		{Typeflag: tar.TypeReg, Name: "a/x", Size: 3},
		{Typeflag: tar.TypeReg, Name: ".wh.b"},
		{Typeflag: tar.TypeLink, Name: "l", Linkname: "a/../../outside/secret"},
	}))
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	w.Write(makeTar([]tar.Header{{Typeflag: tar.TypeDir, Name: "d/"}}))
	w.Close()
	f.Add(z.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		base := memtree.New(map[string]memtree.File{
			"into/b/c": {Data: "c"}, "into/link": memtree.Symlink("/b"), "outside/secret": {Data: "s"},
		})
		src := memtree.New(map[string]memtree.File{"x": {Data: string(b)}})
		c := New(base, Options{Now: time.Unix(1, 0), Dir: t.TempDir(), Limits: Limits{Metadata: 1 << 20, Content: 1 << 20}})
		defer c.Close()
		a := CopyAction{Src: "x", Dest: "/into", AttemptUnpackDockerCompatibility: true, CreateDestPath: true}
		err := c.Copy(context.Background(), src, a)
		es, lerr := c.ReadDir("outside")
		if lerr != nil || len(es) != 1 || c.root != nil && len(c.root.kids) > 1 {
			t.Fatalf("outside of the destination: %v, %v", es, lerr)
		}
		if err != nil {
			return
		}
		if err := c.WriteTar(context.Background(), io.Discard); err != nil && !strings.Contains(err.Error(), "tar") {
			t.Fatal(err)
		}
	})
}
