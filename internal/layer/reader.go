package layer

import (
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/tree"
)

// Reader is an open layer file: the layer as a tree.Tree, raw. Whiteouts are
// character devices 0:0, opaque directories have tree.XattrOpaque, directories
// that the layer's tar had no entry for have XattrImplied.
//
// Node.Inode is the EROFS inode number. Safe for concurrent use. An error about
// a file that is not as Convert wrote it has ErrDamaged in its chain.
type Reader struct {
	f    *os.File
	ft   footer
	tab  func() (*table, error)
	bufs sync.Pool // *[]byte of blockSize
	last atomic.Pointer[place]
}

var _ tree.Tree = (*Reader)(nil)

// Open opens a layer file. It verifies the checksum of all metadata; that of the
// extended attributes when they are first needed. Files' content has none.
func Open(name string) (*Reader, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("open layer file: %w", err)
	}
	r, err := newReader(f)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open layer file %q: %w", name, err)
	}
	return r, nil
}

func newReader(f *os.File) (*Reader, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, damaged("it is not a regular file")
	}
	ft, err := readFooter(f, fi.Size())
	if err != nil {
		return nil, err
	}
	if err := ft.verify(f); err != nil {
		return nil, err
	}
	r := &Reader{f: f, ft: ft}
	r.tab = sync.OnceValues(func() (*table, error) { return ft.table(f) })
	r.bufs.New = func() any { b := make([]byte, blockSize); return &b }
	if in, err := r.inode(rootNid); err != nil || in.mode&tree.ModeType != tree.ModeDir {
		return nil, damaged("it has no root directory")
	}
	return r, nil
}

// verify reads all metadata once and compares its checksum.
func (ft *footer) verify(f io.ReaderAt) error {
	b := make([]byte, min(64<<10, max(blockSize, ft.tableOff-ft.metaOff)))
	if err := readFull(f, b[:blockSize], 0); err != nil {
		return err
	}
	sum := crc32.Checksum(b[:blockSize], crcTable())
	for off := ft.metaOff; off < ft.tableOff; {
		n := min(int64(len(b)), ft.tableOff-off)
		if err := readFull(f, b[:n], off); err != nil {
			return err
		}
		sum = crc32.Update(sum, crcTable(), b[:n])
		off += n
	}
	if sum != ft.metaCRC {
		return damaged("the metadata's checksum is wrong")
	}
	return nil
}

// Close closes the file. Files opened from it cannot be read any more.
func (r *Reader) Close() error { return r.f.Close() }

// Info says what the layer's tar was when the file was made.
func (r *Reader) Info() Info {
	return Info{
		DiffID:  digest.NewDigestFromBytes(digest.SHA256, r.ft.diffID[:]),
		TarSize: r.ft.tarSize, Entries: int(r.ft.entries),
	}
}

// inode is the inode with the number nid.
func (r *Reader) inode(nid uint64) (diskInode, error) {
	off, err := r.nidOff(nid)
	if err != nil {
		return diskInode{}, err
	}
	p := r.bufs.Get().(*[]byte)
	defer r.bufs.Put(p)
	b := (*p)[:inodeSize]
	if err := readFull(r.f, b, off); err != nil {
		return diskInode{}, err
	}
	return decodeInode(b)
}

// nidOff is where an inode is, which is within the inodes' part of the file.
func (r *Reader) nidOff(nid uint64) (int64, error) {
	if nid > uint64(r.ft.tableOff)>>nidBits || r.ft.inodeOff+int64(nid)<<nidBits > r.ft.tableOff-inodeSize {
		return 0, damaged("no inode has the number %d", nid)
	}
	return r.ft.inodeOff + int64(nid)<<nidBits, nil
}

// span returns where the content of an inode is, and that it is where its kind may be.
func (r *Reader) span(nid uint64, in *diskInode) (int64, error) {
	size := int64(in.size)
	if in.layout == layoutInline {
		off, err := r.nidOff(nid)
		if err == nil && (in.mode&tree.ModeType == tree.ModeRegular || size > maxInline || off+inodeSize+size > r.ft.tableOff) {
			err = damaged("inode %d has inline content out of place", nid)
		}
		return off + inodeSize, err
	}
	lo, hi := r.ft.metaOff, r.ft.inodeOff
	if in.mode&tree.ModeType == tree.ModeRegular {
		lo, hi = blockSize, r.ft.metaOff
	}
	off := int64(in.block) << blockBits
	if size > 0 && (off < lo || off > hi || size > hi-off) {
		return 0, damaged("inode %d has content out of place", nid)
	}
	return off, nil
}

// node is what tree.Tree tells of an inode.
func (r *Reader) node(nid uint64, in *diskInode) (tree.Node, error) {
	n := tree.Node{
		Mode: uint32(in.mode), UID: in.uid, GID: in.gid, MTime: time.Unix(in.mtime, int64(in.nsec)),
		Inode: nid, Nlink: in.nlink,
	}
	switch n.Mode & tree.ModeType {
	case tree.ModeDir:
		n.Nlink = 1
	case tree.ModeRegular:
		n.Size = int64(in.size)
	case tree.ModeChar, tree.ModeBlock:
		n.Major, n.Minor = decodeDev(in.block)
	}
	t, err := r.tab()
	if err != nil {
		return tree.Node{}, err
	}
	n.Xattr = t.xattrs[nid]
	return n, nil
}

func pathError(op, p string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: p, Err: err}
}

// Lstat implements tree.Tree. Its cost grows with the path's length and the
// logarithm of the directories' sizes.
func (r *Reader) Lstat(p string) (tree.Node, error) {
	nid, in, err := r.walk(p)
	if err != nil {
		return tree.Node{}, pathError("lstat", p, err)
	}
	n, err := r.node(nid, &in)
	return n, pathError("lstat", p, err)
}

// Origin implements tree.Tracer.
func (r *Reader) Origin(p string) (tree.Origin, error) {
	nid, _, err := r.walk(p)
	return tree.Origin{Layer: string(r.Info().DiffID), Inode: nid}, pathError("lstat", p, err)
}

// ReadDir implements tree.Tree.
func (r *Reader) ReadDir(p string) ([]tree.Entry, error) {
	nid, in, err := r.walk(p)
	if err != nil {
		return nil, pathError("readdir", p, err)
	}
	es, err := r.readDir(nid, &in)
	return es, pathError("readdir", p, err)
}

func (r *Reader) readDir(nid uint64, in *diskInode) ([]tree.Entry, error) {
	if in.mode&tree.ModeType != tree.ModeDir {
		return nil, syscall.ENOTDIR
	}
	off, err := r.span(nid, in)
	if err != nil {
		return nil, err
	}
	data := make([]byte, in.size) // within the file, as span has checked
	if err := readFull(r.f, data, off); err != nil {
		return nil, err
	}
	var es []tree.Entry
	win := window{r: r}
	for len(data) > 0 {
		b := data[:min(blockSize, len(data))]
		data = data[len(b):]
		d, err := parseDirents(b)
		if err != nil {
			return nil, err
		}
		for i := range d.n {
			b, child, err := d.at(i)
			if err != nil {
				return nil, err
			}
			name := string(b)
			if name == "." || name == ".." {
				continue
			}
			if len(es) > 0 && es[len(es)-1].Name >= name {
				return nil, damaged("directory %d is not sorted", nid)
			}
			n, err := win.node(nid, child)
			if err != nil {
				return nil, err
			}
			es = append(es, tree.Entry{Name: name, Node: n})
		}
	}
	return es, nil
}

// window reads inodes that are mostly next to each other.
type window struct {
	r   *Reader
	off int64
	b   []byte
}

func (w *window) node(dir, nid uint64) (tree.Node, error) {
	off, err := w.r.nidOff(nid)
	if err != nil {
		return tree.Node{}, err
	}
	if off < w.off || off+inodeSize > w.off+int64(len(w.b)) {
		size := 16 << 10
		if w.b == nil {
			size = blockSize // most directories are small
		}
		w.off, w.b = off, make([]byte, min(int64(size), w.r.ft.tableOff-off))
		if err := readFull(w.r.f, w.b, off); err != nil {
			return tree.Node{}, err
		}
	}
	in, err := decodeInode(w.b[off-w.off:])
	if err != nil {
		return tree.Node{}, err
	}
	if nid <= dir && in.mode&tree.ModeType == tree.ModeDir {
		return tree.Node{}, damaged("directory %d contains %d", dir, nid)
	}
	return w.r.node(nid, &in)
}

// Readlink implements tree.Tree.
func (r *Reader) Readlink(p string) (string, error) {
	nid, in, err := r.walk(p)
	if err == nil && (in.mode&tree.ModeType != tree.ModeSymlink || in.size > maxTarget) {
		err = fs.ErrInvalid
	}
	var off int64
	if err == nil {
		off, err = r.span(nid, &in)
	}
	if err != nil {
		return "", pathError("readlink", p, err)
	}
	b := make([]byte, in.size)
	if err := readFull(r.f, b, off); err != nil {
		return "", pathError("readlink", p, err)
	}
	return string(b), nil
}

// Open implements tree.Tree. What it returns is also an io.ReaderAt, io.Seeker and io.WriterTo.
func (r *Reader) Open(p string) (io.ReadCloser, error) {
	nid, in, err := r.walk(p)
	if err == nil && in.mode&tree.ModeType != tree.ModeRegular {
		err = fmt.Errorf("not a regular file: %w", fs.ErrInvalid)
	}
	var off int64
	if err == nil {
		off, err = r.span(nid, &in)
	}
	if err != nil {
		return nil, pathError("open", p, err)
	}
	return file{io.NewSectionReader(r.f, off, int64(in.size))}, nil
}

// file is an open regular file.
type file struct{ *io.SectionReader }

func (file) Close() error { return nil }
