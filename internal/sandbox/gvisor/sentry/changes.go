package sentry

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"maps"
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
	// pending are directories around the next entry, from the outermost on, which
	// are in the tar only if there is such an entry: they are as they were.
	pending []pendingDir
}

type pendingDir struct {
	name string
	node tree.Node
}

// writeChanges writes what is in upper, which was stacked on below. What is there and
// is as it was below is left out: a file moved away and back, or changed to what it was. Directories that are
// left out get their old times back: the next step here sees what one on the layer sees.
func (g *guest) writeChanges(upper, below *vfs.Mount, out io.Writer) error {
	buffered := bufio.NewWriterSize(out, wire.MaxPiece)
	w := &writer{g: g, tar: layer.NewTarWriter(buffered)}
	was := rootOf(below)
	if _, err := w.dir("", rootOf(upper), &was, false); err != nil {
		return err
	}
	if err := w.tar.Close(); err != nil {
		return err
	}
	return buffered.Flush()
}

// add writes an entry, after the directories that it is in.
func (w *writer) add(full string, n tree.Node, target string, open func() (io.ReadCloser, error)) error {
	for _, d := range w.pending {
		if err := w.tar.Add(d.name, d.node, "", nil); err != nil {
			return err
		}
	}
	w.pending = nil
	return w.tar.Add(full, n, target, open)
}

// dir writes what is in an upper directory; entries says how many that are, written or not. below is
// the directory of the same name, nil if there is none: whiteouts say something only if there was something
// to hide. gVisor leaves a whiteout wherever a file is renamed. If the upper directory hides the one below, what
// it has no more of that is said name by name: a layer that hides all there is would in another place,
// merged with other layers, hide what this step has never seen.
func (w *writer) dir(prefix string, vd vfs.VirtualDentry, below *vfs.VirtualDentry, hides bool) (entries int, err error) {
	names, err := w.names(vd)
	if err != nil {
		return 0, err
	}
	var gone []string
	if below != nil && hides {
		if gone, err = w.names(*below); err != nil {
			return 0, err
		}
		gone = slices.DeleteFunc(gone, func(n string) bool { _, there := slices.BinarySearch(names, n); return there })
	}
	for _, name := range names {
		for len(gone) > 0 && gone[0] < name {
			if err := w.whiteout(prefix + gone[0]); err != nil {
				return 0, err
			}
			gone = gone[1:]
		}
		if err := w.entry(prefix, name, vd, below, hides); err != nil {
			return 0, err
		}
	}
	for _, name := range gone {
		if err := w.whiteout(prefix + name); err != nil {
			return 0, err
		}
	}
	return len(names), nil
}

func (w *writer) whiteout(full string) error {
	return w.add(full, tree.Node{Mode: tree.ModeChar}, "", nil)
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

func (w *writer) entry(prefix, name string, dir vfs.VirtualDentry, below *vfs.VirtualDentry, hides bool) error {
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
		return w.whiteout(full)
	case n.IsDir():
		return w.directory(full, p, n, was, hides)
	}
	if same, err := w.unchanged(p, n, was); err != nil || same {
		return err
	}
	if n.IsSymlink() {
		target, err := g.vfs.ReadlinkAt(g.ctx, g.root, p)
		if err != nil {
			return err
		}
		return w.add(full, n, target, nil)
	}
	return w.add(full, n, "", func() (io.ReadCloser, error) { return w.open(p) })
}

func (w *writer) directory(full string, p *vfs.PathOperation, n tree.Node, was *vfs.VirtualDentry, hides bool) error {
	g := w.g
	hides = hides || n.IsOpaque() // gVisor makes every new directory opaque
	delete(n.Xattr, tree.XattrOpaque)
	var old tree.Node
	if was != nil {
		var err error
		if old, err = w.node(at(*was, "")); err != nil {
			return err
		}
		if !old.IsDir() {
			was = nil
		}
	}
	vd, err := g.vfs.GetDentryAt(g.ctx, g.root, p, &vfs.GetDentryOptions{})
	if err != nil {
		return err
	}
	defer vd.DecRef(g.ctx)
	if was == nil || !sameNode(n, old) {
		if err := w.add(full, n, "", nil); err != nil {
			return err
		}
		_, err := w.dir(full+"/", vd, was, hides)
		return err
	}
	w.pending = append(w.pending, pendingDir{full, n})
	entries, err := w.dir(full+"/", vd, was, hides)
	if err != nil || len(w.pending) == 0 { // or something in it was written
		return err
	}
	w.pending = w.pending[:len(w.pending)-1]
	switch {
	case n.MTime.Equal(old.MTime):
		return nil
	case entries == 0: // somebody set its time
		return w.add(full, n, "", nil)
	}
	st, err := g.stat(at(*was, ""))
	if err != nil {
		return err
	}
	st.Mask = linux.STATX_MTIME
	return g.vfs.SetStatAt(g.ctx, g.root, at(vd, ""), &vfs.SetStatOptions{Stat: st})
}

// sameNode reports whether two nodes of one name are the same but for their times and content.
func sameNode(a, b tree.Node) bool {
	return a.Mode == b.Mode && a.UID == b.UID && a.GID == b.GID && a.Major == b.Major && a.Minor == b.Minor && maps.Equal(a.Xattr, b.Xattr)
}

// unchanged reports whether what is no directory is as it was below, nil if there was nothing. One that
// has several names is taken for changed: the others may be new.
func (w *writer) unchanged(p *vfs.PathOperation, n tree.Node, was *vfs.VirtualDentry) (bool, error) {
	if was == nil || n.Nlink > 1 {
		return false, nil
	}
	op := at(*was, "")
	old, err := w.node(op)
	if err != nil || !sameNode(n, old) || !n.MTime.Equal(old.MTime) || n.Size != old.Size {
		return false, err
	}
	switch {
	case n.IsSymlink():
		return w.sameTarget(p, op)
	case n.IsRegular():
		return w.sameContent(p, op)
	}
	return true, nil
}

func (w *writer) sameTarget(a, b *vfs.PathOperation) (bool, error) {
	g := w.g
	ta, err := g.vfs.ReadlinkAt(g.ctx, g.root, a)
	if err != nil {
		return false, err
	}
	tb, err := g.vfs.ReadlinkAt(g.ctx, g.root, b)
	return ta == tb, err
}

func (w *writer) sameContent(a, b *vfs.PathOperation) (bool, error) {
	fa, err := w.open(a)
	if err != nil {
		return false, err
	}
	defer fa.Close()
	fb, err := w.open(b)
	if err != nil {
		return false, err
	}
	defer fb.Close()
	ba, bb := make([]byte, wire.MaxPiece), make([]byte, wire.MaxPiece)
	for {
		na, erra := io.ReadFull(fa, ba)
		nb, errb := io.ReadFull(fb, bb)
		switch {
		case !bytes.Equal(ba[:na], bb[:nb]):
			return false, nil
		case ended(erra) && ended(errb):
			return true, nil
		case erra != nil || errb != nil:
			return false, errors.Join(erra, errb)
		}
	}
}

// ended reports whether io.ReadFull has come to the end.
func ended(err error) bool { return err == io.EOF || err == io.ErrUnexpectedEOF }

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
