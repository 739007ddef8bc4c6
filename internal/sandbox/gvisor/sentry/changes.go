package sentry

import (
	"bufio"
	"io"
	"slices"
	"time"

	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/errors/linuxerr"
	"gvisor.dev/gvisor/pkg/sentry/vfs"
	"gvisor.dev/gvisor/pkg/usermem"

	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/sandbox/gvisor/wire"
	"github.com/kiln-build/kiln/internal/tree"
)

// writer turns a frozen upper layer into a layer tar. gVisor's own tar of a
// tmpfs is made for restoring one, and keeps whiteouts and opaque directories
// as the overlay has them.
type writer struct {
	g   *guest
	tar *layer.TarWriter
}

// writeChanges writes what is in upper, which was stacked on below.
func (g *guest) writeChanges(upper, below *vfs.Mount, out io.Writer) error {
	buffered := bufio.NewWriterSize(out, wire.MaxPiece)
	w := &writer{g: g, tar: layer.NewTarWriter(buffered)}
	was := rootOf(below)
	if err := w.dir("", rootOf(upper), &was); err != nil {
		return err
	}
	if err := w.tar.Close(); err != nil {
		return err
	}
	return buffered.Flush()
}

// dir writes what is in an upper directory. below is the directory of the same
// name that it is merged with, nil if there is none: whiteouts and opaqueness
// say something only if there was something to hide. gVisor leaves a whiteout
// wherever a file is renamed, and makes every new directory opaque.
func (w *writer) dir(prefix string, vd vfs.VirtualDentry, below *vfs.VirtualDentry) error {
	names, err := w.names(vd)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := w.entry(prefix, name, vd, below); err != nil {
			return err
		}
	}
	return nil
}

func (w *writer) names(vd vfs.VirtualDentry) ([]string, error) {
	g := w.g
	fd, err := g.vfs.OpenAt(g.ctx, g.root, at(vd, ""), &vfs.OpenOptions{Flags: linux.O_RDONLY | linux.O_DIRECTORY})
	if err != nil {
		return nil, err
	}
	defer fd.DecRef(g.ctx)
	var names []string
	err = fd.IterDirents(g.ctx, vfs.IterDirentsCallbackFunc(func(d vfs.Dirent) error {
		if d.Name != "." && d.Name != ".." {
			names = append(names, d.Name)
		}
		return nil
	}))
	slices.Sort(names)
	return names, err
}

func (w *writer) entry(prefix, name string, dir vfs.VirtualDentry, below *vfs.VirtualDentry) error {
	g, p := w.g, at(dir, name)
	n, err := w.node(p)
	if err != nil {
		return err
	}
	was, err := w.lookup(below, name)
	if err != nil {
		return err
	}
	if was != nil {
		defer was.DecRef(g.ctx)
	}
	full := prefix + name
	switch {
	case n.IsWhiteout():
		if was == nil {
			return nil
		}
		return w.tar.Add(full, n, "", nil)
	case n.IsDir():
		return w.directory(full, p, n, was)
	case n.IsSymlink():
		target, err := g.vfs.ReadlinkAt(g.ctx, g.root, p)
		if err != nil {
			return err
		}
		return w.tar.Add(full, n, target, nil)
	}
	return w.tar.Add(full, n, "", func() (io.ReadCloser, error) { return w.open(p) })
}

func (w *writer) directory(full string, p *vfs.PathOperation, n tree.Node, was *vfs.VirtualDentry) error {
	g := w.g
	if was != nil {
		st, err := g.stat(at(*was, ""))
		if err != nil {
			return err
		}
		if !isType(st, linux.S_IFDIR) {
			was = nil
		}
	}
	opaque := n.IsOpaque()
	if was == nil {
		delete(n.Xattr, tree.XattrOpaque)
	}
	if err := w.tar.Add(full, n, "", nil); err != nil {
		return err
	}
	vd, err := g.vfs.GetDentryAt(g.ctx, g.root, p, &vfs.GetDentryOptions{})
	if err != nil {
		return err
	}
	defer vd.DecRef(g.ctx)
	if opaque {
		was = nil
	}
	return w.dir(full+"/", vd, was)
}

// lookup finds a name in the directory below. The caller drops the reference.
func (w *writer) lookup(below *vfs.VirtualDentry, name string) (*vfs.VirtualDentry, error) {
	if below == nil {
		return nil, nil
	}
	vd, err := w.g.vfs.GetDentryAt(w.g.ctx, w.g.root, at(*below, name), &vfs.GetDentryOptions{})
	if isMissing(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return &vd, nil
}

func (w *writer) node(p *vfs.PathOperation) (tree.Node, error) {
	st, err := w.g.stat(p)
	if err != nil {
		return tree.Node{}, err
	}
	n := tree.Node{
		Mode: uint32(st.Mode), UID: st.UID, GID: st.GID, Size: int64(st.Size),
		MTime: modTime(st.Mtime),
		Major: st.RdevMajor, Minor: st.RdevMinor, Inode: st.Ino, Nlink: st.Nlink,
	}
	if n.IsWhiteout() {
		return n, nil
	}
	n.Xattr, err = w.g.xattrs(p)
	return n, err
}

// modTime converts a time of gVisor's, whose nanoseconds are negative in
// disguise before 1970. In UTC, for a local time would need /etc/localtime.
func modTime(t linux.StatxTimestamp) time.Time {
	return time.Unix(t.Sec, int64(int32(t.Nsec))).UTC()
}

func (w *writer) open(p *vfs.PathOperation) (io.ReadCloser, error) {
	fd, err := w.g.vfs.OpenAt(w.g.ctx, w.g.root, p, &vfs.OpenOptions{Flags: linux.O_RDONLY})
	if err != nil {
		return nil, err
	}
	return &reader{g: w.g, fd: fd}, nil
}

// reader reads a file of the guest.
type reader struct {
	g  *guest
	fd *vfs.FileDescription
}

// Read implements io.Reader.
func (r *reader) Read(b []byte) (int, error) {
	n, err := r.fd.Read(r.g.ctx, usermem.BytesIOSequence(b), vfs.ReadOptions{})
	if n > 0 && linuxerr.Equals(linuxerr.ErrWouldBlock, err) {
		err = nil
	}
	if n == 0 && err == nil && len(b) > 0 {
		err = io.EOF
	}
	return int(n), err
}

// Close implements io.Closer.
func (r *reader) Close() error {
	r.fd.DecRef(r.g.ctx)
	return nil
}
