package fileop

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"path"
	"strings"
	"syscall"
	"time"

	"github.com/kiln-build/kiln/internal/decompress"
	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/tree"
)

// Limits bound what an archive may hold. Zero values stand for defaults.
type Limits struct {
	// Metadata bounds the memory for names, links and attributes, with some
	// 500 bytes for every entry; default 1 GiB.
	Metadata int64
	// Content bounds the bytes of all files; default 256 GiB.
	Content int64
}

const (
	defaultMetadata = 1 << 30
	defaultContent  = 256 << 30
	entryCost       = 512
)

// unpack unpacks the source s into dest if it is an archive, as BuildKit does for
// ADD: with moby/go-archive's Untar, in a chroot on dest. Owners are the
// archive's unless own is given, times and modes are always.
func (c *Changes) unpack(ctx context.Context, src tree.Tree, s, dest string, own *owner, t *time.Time) (bool, error) {
	p, err := rootfs.ResolveNew(src, path.Join("/", s), true)
	if err != nil {
		return false, err
	}
	if n, err := src.Lstat(p); err != nil || !n.IsRegular() {
		return false, nil //nolint:nilerr // the copy reports it
	}
	if ok, err := isArchive(src, p); err != nil || !ok {
		return false, err
	}
	into, err := rootfs.ResolveNew(c, dest, true)
	if err != nil {
		return false, err
	}
	if _, err := c.mkdirAll(into, defaultDirMode, own, t); err != nil {
		return false, err
	}
	f, err := src.Open(p)
	if err != nil {
		return false, err
	}
	defer f.Close()
	r, err := decompress.New(cancellable{ctx, f})
	if err != nil {
		return false, err
	}
	defer r.Close()
	u := unpacker{
		c: c, ctx: ctx, into: into, own: own,
		metadata: or(c.opt.Limits.Metadata, defaultMetadata), content: or(c.opt.Limits.Content, defaultContent),
		buf: make([]byte, 128<<10),
	}
	return true, u.run(tar.NewReader(r))
}

func or(n, def int64) int64 {
	if n == 0 {
		return def
	}
	return n
}

// isArchive says whether a file is a tar archive, by its content alone.
func isArchive(src tree.Tree, p string) (bool, error) {
	f, err := src.Open(p)
	if err != nil {
		return false, err
	}
	defer f.Close()
	r, err := decompress.New(f)
	if err != nil {
		return false, nil //nolint:nilerr // what cannot be decompressed is no archive
	}
	defer r.Close()
	_, err = tar.NewReader(r).Next()
	return err == nil, nil
}

type unpacker struct {
	c    *Changes
	ctx  context.Context //nolint:containedctx // lives for one call
	into string          // the directory that is the archive's root
	own  *owner
	// What is left of the limits.
	metadata, content int64
	dirs              []dirTime
	buf               []byte
}

// dirTime is a directory's time, set when it is full.
type dirTime struct {
	name string
	time time.Time
}

func (u *unpacker) run(tr *tar.Reader) error {
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if err := u.ctx.Err(); err != nil {
			return context.Cause(u.ctx)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if err := u.account(h); err != nil {
			return err
		}
		if err := u.entry(h, tr); err != nil {
			return fmt.Errorf("entry %q: %w", h.Name, err)
		}
	}
	return u.dirTimes()
}

// dirTimes sets the times of directories, by the name in the archive, whatever has
// it by now; it may be gone.
func (u *unpacker) dirTimes() error {
	for _, d := range u.dirs {
		p, err := rootfs.ResolveBelow(u.c, u.into, d.name, true)
		if err != nil {
			continue
		}
		if _, err := u.c.lstat(p); err != nil {
			continue
		}
		i, err := u.c.change(p)
		if err != nil {
			return err
		}
		i.node.MTime = d.time
	}
	return nil
}

func (u *unpacker) account(h *tar.Header) error {
	u.metadata -= int64(entryCost + len(h.Name) + len(h.Linkname))
	for k, v := range h.PAXRecords {
		u.metadata -= int64(len(k) + len(v))
	}
	if u.metadata < 0 {
		return errors.New("too many entries")
	}
	return nil
}

func (u *unpacker) entry(h *tar.Header, r io.Reader) error {
	h.Name = path.Clean(h.Name)
	name := tree.Clean(h.Name) // the root of the chroot stops ".."
	if strings.HasPrefix(path.Base(name), ".wh..wh.") && path.Base(name) != ".wh..wh..opq" {
		return nil // AUFS's own files, which nothing reads
	}
	if name == "." {
		return u.rootEntry(h)
	}
	dir, err := u.parent(path.Dir(name))
	if err != nil {
		return err
	}
	p := path.Join(dir, path.Base(name))
	old, err := u.c.lstat(p)
	exists := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	isDir := h.Typeflag == tar.TypeDir
	if exists && (!old.IsDir() || !isDir) {
		if err := u.c.remove(p); err != nil {
			return err
		}
		exists = false
		// What was removed may have been a link on the way here.
		if dir, err = u.follow(path.Join(u.into, path.Dir(name))); err != nil {
			return err
		}
		p = path.Join(dir, path.Base(name))
	}
	i, err := u.create(p, h, r, exists)
	if err != nil {
		return err
	}
	return u.metadataOf(i, h)
}

// rootEntry is an entry for the archive's root: as "." it says nothing about the
// directory that the archive is unpacked into; written otherwise it does.
func (u *unpacker) rootEntry(h *tar.Header) error {
	if h.Name == "." {
		return nil
	}
	if h.Typeflag != tar.TypeDir {
		return pathError("remove", u.into, syscall.EBUSY)
	}
	i, err := u.c.dir(u.into)
	if err != nil {
		return err
	}
	return u.metadataOf(i, h)
}

// parent finds the directory dir as a process in the chroot would, through links,
// and makes what is missing.
func (u *unpacker) parent(dir string) (string, error) {
	cur := u.into
	if dir == "." {
		return cur, nil
	}
	for name := range strings.SplitSeq(dir, "/") {
		next := path.Join(cur, name)
		n, err := u.c.lstat(next)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			i, err := u.c.make("mkdir", next, tree.ModeDir|defaultDirMode)
			if err != nil {
				return "", err
			}
			i.chown(&owner{})
		case err != nil:
			return "", err
		case n.IsSymlink():
			if next, err = u.follow(next); err != nil {
				return "", err
			}
		case !n.IsDir():
			return "", pathError("mkdir", next, syscall.ENOTDIR)
		}
		cur = next
	}
	return cur, nil
}

// follow follows a link that must lead to a directory.
func (u *unpacker) follow(p string) (string, error) {
	q, err := rootfs.ResolveBelow(u.c, u.into, u.below(p), true)
	if err != nil {
		return "", err
	}
	n, err := u.c.lstat(q)
	if err == nil && !n.IsDir() {
		err = pathError("mkdir", q, syscall.ENOTDIR)
	}
	return q, err
}

// below is a path of the image as the chroot has it.
func (u *unpacker) below(p string) string {
	if u.into == "." {
		return p
	}
	return strings.TrimPrefix(strings.TrimPrefix(p, u.into), "/")
}

// create makes what h describes at p; a directory may exist.
func (u *unpacker) create(p string, h *tar.Header, r io.Reader, exists bool) (*inode, error) {
	switch h.Typeflag {
	case tar.TypeDir:
		if exists {
			return u.c.dir(p)
		}
		return u.c.make("mkdir", p, tree.ModeDir)
	case tar.TypeReg, tar.TypeGNUSparse:
		return u.regular(p, h, r)
	case tar.TypeSymlink:
		if h.Linkname == "" {
			return nil, pathError("symlink", p, syscall.ENOENT)
		}
		i, err := u.c.make("symlink", p, tree.ModeSymlink|0o777)
		if err == nil {
			i.target = h.Linkname
		}
		return i, err
	case tar.TypeLink:
		return u.link(p, h.Linkname)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		mode := map[byte]uint32{tar.TypeChar: tree.ModeChar, tar.TypeBlock: tree.ModeBlock, tar.TypeFifo: tree.ModeFIFO}[h.Typeflag]
		if err := u.c.mknod(p, mode, uint32(h.Devmajor), uint32(h.Devminor)); err != nil {
			return nil, err
		}
		return u.c.change(p)
	}
	return nil, fmt.Errorf("unhandled tar header type %d", h.Typeflag)
}

func (u *unpacker) regular(p string, h *tar.Header, r io.Reader) (*inode, error) {
	i, err := u.c.make("open", p, tree.ModeRegular)
	if err != nil || h.Size == 0 {
		return i, err
	}
	if u.content -= h.Size; u.content < 0 || h.Size < 0 {
		return nil, errors.New("too much content")
	}
	at, err := u.c.spool.add(u.c.opt.Dir, r, h.Size, u.buf)
	if err != nil {
		return nil, err
	}
	i.node.Size, i.content = h.Size, content{spool: u.c.spool, at: at, size: h.Size}
	return i, nil
}

func (u *unpacker) link(p, target string) (*inode, error) {
	name := tree.Clean(target)
	dir := u.into
	if d := path.Dir(name); d != "." {
		var err error
		if dir, err = u.follow(path.Join(u.into, d)); err != nil {
			return nil, err
		}
	}
	old := path.Join(dir, path.Base(name))
	if err := u.c.link(old, p); err != nil {
		return nil, err
	}
	return u.c.change(p)
}

// metadataOf gives i what h says of owner, attributes, permissions and time.
func (u *unpacker) metadataOf(i *inode, h *tar.Header) error {
	own := u.own
	if own == nil {
		if h.Uid < 0 || h.Gid < 0 || int64(h.Uid) > math.MaxUint32 || int64(h.Gid) > math.MaxUint32 {
			return fmt.Errorf("owner %d:%d: out of range", h.Uid, h.Gid)
		}
		own = &owner{uint32(h.Uid), uint32(h.Gid)}
	}
	i.chown(own)
	xattr := map[string]string{}
	for k, v := range h.PAXRecords {
		k, ok := strings.CutPrefix(k, "SCHILY.xattr.")
		if ok && (i.node.IsRegular() || i.node.IsDir() || !strings.HasPrefix(k, "user.")) {
			xattr[k] = v
		}
	}
	i.addXattrs(xattr)
	if !i.node.IsSymlink() {
		i.chmod(uint32(h.Mode & tree.ModePerm))
	}
	t := bound(h.ModTime)
	if i.node.IsDir() {
		u.dirs = append(u.dirs, dirTime{tree.Clean(h.Name), t})
	}
	if h.Typeflag != tar.TypeLink || !i.node.IsSymlink() {
		i.node.MTime = t
	}
	return nil
}

// bound is go-archive's idea of times that a file system cannot keep.
func bound(t time.Time) time.Time {
	if t.Before(time.Unix(0, 0)) || t.After(time.Unix(0, math.MaxInt64)) {
		return time.Unix(0, 0)
	}
	return t
}
