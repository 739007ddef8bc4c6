package layer

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"

	goerofs "github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"
	gverofs "gvisor.dev/gvisor/pkg/erofs"

	"github.com/kiln-build/kiln/internal/tree"
)

// plain describes what any reader of EROFS can tell of a node.
func plain(p string, mode, uid, gid uint32, size, sec int64, nsec uint32, ino uint64, content string) string {
	if mode&tree.ModeType != tree.ModeRegular {
		size = 0
	}
	return fmt.Sprintf("%s %#o %d:%d %d %d.%09d #%d %q", p, mode, uid, gid, size, sec, nsec, ino, content)
}

func plainTree(t *testing.T, r *Reader) []string {
	t.Helper()
	var out []string
	err := tree.Walk(r, ".", func(p string, n tree.Node) error {
		var content string
		switch {
		case n.IsRegular():
			f, err := r.Open(p)
			if err != nil {
				return err
			}
			b, err := io.ReadAll(f)
			if err != nil {
				return err
			}
			content = string(b)
		case n.IsSymlink():
			var err error
			if content, err = r.Readlink(p); err != nil {
				return err
			}
		}
		out = append(out, plain(p, n.Mode, n.UID, n.GID, n.Size, n.MTime.Unix(), uint32(n.MTime.Nanosecond()), n.Inode, content))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func gvisorTree(t *testing.T, p string) []string {
	t.Helper()
	f, err := os.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	img, err := gverofs.OpenImage(f)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	var out []string
	var walk func(p string, nid, parent uint64)
	walk = func(p string, nid, parent uint64) {
		in, err := img.Inode(nid)
		if err != nil {
			t.Fatalf("%q: %v", p, err)
		}
		var content string
		switch {
		case in.IsRegular():
			// As gVisor maps it: page-aligned, in the image.
			off, err := in.DataOffset()
			if err != nil || in.Size() > 0 && off%4096 != 0 {
				t.Errorf("%q cannot be mapped: offset %#x, %v", p, off, err)
			}
			if in.Size() > 0 {
				b, err := img.BytesAt(off, (in.Size()+4095)&^4095)
				if err != nil {
					t.Fatalf("%q: %v", p, err)
				}
				if strings.Trim(string(b[in.Size():]), "\x00") != "" {
					t.Errorf("%q: bytes behind the end, in its last page", p)
				}
				content = string(b[:in.Size()])
			}
		case in.IsSymlink():
			if content, err = in.Readlink(); err != nil {
				t.Fatalf("%q: %v", p, err)
			}
		}
		out = append(out, plain(p, uint32(in.Mode()), in.UID(), in.GID(), int64(in.Size()), int64(in.Mtime()), in.MtimeNsec(), in.Nid(), content))
		if !in.IsDir() {
			return
		}
		seen := map[string]uint64{}
		subdirs := uint32(0)
		err = in.IterDirents(func(name string, typ uint8, kid uint64) error {
			seen[name] = kid
			if found, err := in.Lookup(name); err != nil || found != kid {
				t.Errorf("%q: lookup of %q: %d, %v, want %d", p, name, found, err, kid)
			}
			k, err := img.Inode(kid)
			if err != nil {
				return err
			}
			if fileType(k.Mode()) != typ {
				t.Errorf("%q in %q: type %d, mode %#o", name, p, typ, k.Mode())
			}
			if name != "." && name != ".." {
				if k.IsDir() {
					subdirs++
				}
				walk(path.Join(p, name), kid, nid)
			}
			return nil
		})
		if err != nil {
			t.Fatalf("%q: %v", p, err)
		}
		if seen["."] != nid || seen[".."] != parent || in.Nlink() != 2+subdirs {
			t.Errorf("%q: . is %d, .. is %d, nlink %d", p, seen["."], seen[".."], in.Nlink())
		}
	}
	walk(".", img.RootNid(), img.RootNid())
	return out
}

func goerofsTree(t *testing.T, p string) []string {
	t.Helper()
	f, err := os.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	img, err := goerofs.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	// Not fs.WalkDir, which stats through names that fs.ValidPath refuses.
	var walk func(p string, d fs.DirEntry)
	walk = func(p string, d fs.DirEntry) {
		fi, err := d.Info()
		if err != nil {
			t.Fatalf("%q: %v", p, err)
		}
		st := fi.Sys().(*goerofs.Stat)
		content := ""
		if fs.ValidPath(p) && fi.Mode().IsRegular() {
			b, err := fs.ReadFile(img, p)
			if err != nil {
				t.Fatalf("%q: %v", p, err)
			}
			content = string(b)
		}
		out = append(out, fmt.Sprintf("%s %v %d:%d %d.%d #%d %d %x", p, fi.Mode()&(fs.ModeType|fs.ModePerm), st.UID, st.GID, int64(st.Mtime), st.MtimeNs, st.Ino, st.Nlink, content))
		if !fi.IsDir() || !fs.ValidPath(p) {
			return
		}
		es, err := fs.ReadDir(img, p)
		if err != nil {
			t.Fatalf("%q: %v", p, err)
		}
		for _, e := range es {
			walk(path.Join(p, e.Name()), e)
		}
	}
	root, err := fs.Stat(img, ".")
	if err != nil {
		t.Fatal(err)
	}
	walk(".", fs.FileInfoToDirEntry(root))
	return out
}

func goerofsWant(t *testing.T, r *Reader) []string {
	t.Helper()
	var out []string
	err := tree.Walk(r, ".", func(p string, n tree.Node) error {
		in, err := r.inode(n.Inode)
		if err != nil {
			return err
		}
		content := ""
		if n.IsRegular() && fs.ValidPath(p) {
			f, err := r.Open(p)
			if err != nil {
				return err
			}
			b, err := io.ReadAll(f)
			if err != nil {
				return err
			}
			content = string(b)
		}
		out = append(out, fmt.Sprintf("%s %v %d:%d %d.%d #%d %d %x", p, goMode(n.Mode), n.UID, n.GID, n.MTime.Unix(), n.MTime.Nanosecond(), n.Inode, in.nlink, content))
		if n.IsDir() && !fs.ValidPath(p) {
			return fs.SkipDir
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// goMode leaves out setuid, setgid and sticky, which go-erofs' FileInfo does.
func goMode(m uint32) fs.FileMode {
	o := fs.FileMode(m & 0o777)
	switch m & tree.ModeType {
	case tree.ModeDir:
		o |= fs.ModeDir
	case tree.ModeSymlink:
		o |= fs.ModeSymlink
	case tree.ModeFIFO:
		o |= fs.ModeNamedPipe
	case tree.ModeBlock:
		o |= fs.ModeDevice
	case tree.ModeChar:
		o |= fs.ModeDevice | fs.ModeCharDevice
	}
	return o
}

func sameLines(t *testing.T, who string, got, want []string) {
	t.Helper()
	for i := range max(len(got), len(want)) {
		g, w := "(nothing)", "(nothing)"
		if i < len(got) {
			g = got[i]
		}
		if i < len(want) {
			w = want[i]
		}
		if g != w {
			t.Fatalf("%s sees\n%.300s\nwant\n%.300s", who, g, w)
		}
	}
}

// Whoever reads EROFS sees in a layer file what Reader sees.
func TestOtherReaders(t *testing.T) {
	for seed := range uint64(12) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		p := convert(t, randomTree(rnd, 400, 20_000).tar(t))
		r := open(t, p)
		want := plainTree(t, r)
		sameLines(t, "gVisor", gvisorTree(t, p), want)
		sameLines(t, "go-erofs", goerofsTree(t, p), goerofsWant(t, r))
		if fsck, err := exec.LookPath("fsck.erofs"); err == nil {
			if out, err := exec.Command(fsck, "--extract", p).CombinedOutput(); err != nil {
				t.Fatalf("fsck.erofs: %v: %s", err, out)
			}
		}
	}
}

// mountErofs mounts a layer file with the kernel's EROFS, or skips.
func mountErofs(t *testing.T, p string) string {
	t.Helper()
	fss, err := os.ReadFile("/proc/filesystems")
	if err != nil || !strings.Contains(string(fss), "\terofs\n") || os.Geteuid() != 0 {
		t.Skip("cannot mount erofs here")
	}
	dir := t.TempDir()
	err = unix.Mount(p, dir, "erofs", unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID, "")
	if errors.Is(err, unix.ENOTBLK) { // a kernel that wants a block device
		out, lerr := exec.Command("mount", "-t", "erofs", "-o", "ro,loop,nodev,nosuid", p, dir).CombinedOutput()
		if lerr != nil {
			t.Skipf("cannot mount erofs here: %s", out)
		}
	} else if errors.Is(err, unix.EPERM) {
		t.Skip("cannot mount here")
	} else if err != nil {
		t.Fatalf("mount: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestKernelReader(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 5))
	p := convert(t, randomTree(rnd, 2000, 20_000).tar(t))
	r := open(t, p)
	mnt := mountErofs(t, p)
	var got []string
	err := filepath.WalkDir(mnt, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(name, &st); err != nil {
			return err
		}
		content := ""
		switch st.Mode & tree.ModeType {
		case tree.ModeRegular:
			b, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			content = string(b)
		case tree.ModeSymlink:
			if content, err = os.Readlink(name); err != nil {
				return err
			}
		}
		rel, err := filepath.Rel(mnt, name)
		if err != nil {
			return err
		}
		got = append(got, plain(rel, st.Mode, st.Uid, st.Gid, st.Size, st.Mtim.Sec, uint32(st.Mtim.Nsec), st.Ino, content))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	sameLines(t, "Linux", got, plainTree(t, r))
}
