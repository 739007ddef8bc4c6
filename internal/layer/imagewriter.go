package layer

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math"
	"slices"
	"strings"

	"github.com/kiln-build/kiln/internal/tree"
)

// imageWriter writes the metadata of a layer file, behind its files' content.
//
// Inodes are numbered so that a directory's entries are next to each other, in the
// order of their names, and after the directory itself: reading a directory
// with its entries' metadata is one sweep.
type imageWriter struct {
	b     *builder
	w     *blockWriter
	order []*inode
	off   int64  // end of the inodes placed so far, from the first one's block
	block uint32 // next block for directories and targets that are not inline
	ents  int64
	sets  []string
	buf   []byte
}

func (in *inode) isDevice() bool {
	t := in.mode & tree.ModeType
	return t == tree.ModeChar || t == tree.ModeBlock
}

func (in *inode) isSymlink() bool { return in.mode&tree.ModeType == tree.ModeSymlink }

// write writes everything behind the content, then block 0. It returns the number of entries.
func (iw *imageWriter) write(tarSize int64, diffID [32]byte) (int64, error) {
	w := iw.w
	if err := w.align(blockSize); err != nil {
		return 0, err
	}
	ft := footer{metaOff: w.pos(), tarSize: tarSize, diffID: diffID}
	first, err := blockOf(w.pos())
	if err != nil {
		return 0, err
	}
	iw.block, iw.off = first, rootNid<<nidBits
	iw.place(iw.b.root, iw.b.root)
	iw.b.root.nlink = 2
	iw.visit(iw.b.root)
	ft.inodeOff = int64(iw.block) << blockBits
	ft.tableOff = ft.inodeOff + (iw.off+blockSize-1)&^(blockSize-1)
	end, err := blockOf(ft.tableOff)
	if err != nil {
		return 0, err
	}
	super := encodeSuper(uint64(len(iw.order)), end, iw.block, [16]byte(diffID[:16]))

	w.summing, w.sum = true, crc32.Checksum(super, crcTable())
	if err := iw.writeBlocks(); err != nil {
		return 0, err
	}
	if err := iw.writeInodes(); err != nil {
		return 0, err
	}
	ft.metaCRC, w.sum = w.sum, 0
	t := encodeTable(iw.sets, iw.order, func(in *inode) uint32 { return in.setID() })
	if err := w.append(t); err != nil {
		return 0, err
	}
	ft.tableLen, ft.tableCRC, ft.entries = int64(len(t)), w.sum, iw.ents
	w.summing = false
	if err := w.append(ft.encode()); err != nil {
		return 0, err
	}
	if err := w.finish(); err != nil {
		return 0, err
	}
	// Last: without it, nobody takes the file for an image.
	if _, err := w.f.WriteAt(super, 0); err != nil {
		return 0, fmt.Errorf("write layer file: %w", err)
	}
	return iw.ents, nil
}

func blockOf(off int64) (uint32, error) {
	if off>>blockBits > math.MaxUint32 {
		return 0, fmt.Errorf("layer file would have more than %d blocks", uint32(math.MaxUint32))
	}
	return uint32(off >> blockBits), nil
}

// place gives an inode its number, and its content, if that is metadata, its place.
func (iw *imageWriter) place(in, parent *inode) {
	var n int64
	switch {
	case in.isDir():
		in.dir.sort(in, parent)
		in.size = direntBytes(in.dir.sorted)
		n = in.size
	case in.isSymlink():
		in.size = int64(len(in.target))
		n = in.size
	}
	if n > maxInline {
		in.block = iw.block
		iw.block += uint32((n + blockSize - 1) >> blockBits)
		n = 0
	} else if n > 0 {
		in.layout = layoutInline
	}
	// Neither an inode nor what is inline with it may cross a block.
	if iw.off%blockSize+inodeSize+n > blockSize {
		iw.off = (iw.off + blockSize - 1) &^ (blockSize - 1)
	}
	in.nid = uint64(iw.off >> nidBits)
	iw.off += (inodeSize + n + 31) &^ 31
	iw.order = append(iw.order, in)
	iw.intern(in)
}

// visit places everything below a directory that has been placed.
func (iw *imageWriter) visit(dir *inode) {
	for _, e := range dir.dir.sorted {
		if e.name == "." || e.name == ".." {
			continue
		}
		iw.ents++
		e.in.nlink++
		if e.in.isDir() {
			e.in.nlink = 2
			dir.nlink++
		}
		if e.in.nid == 0 {
			iw.place(e.in, dir)
		}
	}
	for _, e := range dir.dir.sorted {
		if e.in.isDir() && e.name != "." && e.name != ".." {
			iw.visit(e.in)
		}
	}
}

// sort turns the directory's entries, with "." and "..", into a sorted list.
func (d *directory) sort(self, parent *inode) {
	d.sorted = make([]dirent, 0, len(d.kids)+2)
	for name, in := range d.kids {
		d.sorted = append(d.sorted, dirent{name, in})
	}
	d.sorted = append(d.sorted, dirent{".", self}, dirent{"..", parent})
	slices.SortFunc(d.sorted, func(a, b dirent) int { return strings.Compare(a.name, b.name) })
	d.kids = nil
}

// direntBlock returns how many of es fit one directory block, and the bytes that they take.
func direntBlock(es []dirent) (n, size int) {
	for _, e := range es {
		s := direntSize + len(e.name)
		if size+s > blockSize {
			break
		}
		size += s
		n++
	}
	return n, size
}

func direntBytes(es []dirent) int64 {
	var total int64
	for {
		n, size := direntBlock(es)
		if es = es[n:]; len(es) == 0 {
			return total + int64(size)
		}
		total += blockSize
	}
}

// appendDirents appends the blocks of a directory, the last one not filled up.
func appendDirents(b []byte, es []dirent) []byte {
	le := binary.LittleEndian
	for len(es) > 0 {
		n, size := direntBlock(es)
		nameOff := n * direntSize
		for _, e := range es[:n] {
			b = le.AppendUint64(b, e.in.nid)
			b = le.AppendUint16(b, uint16(nameOff))
			b = append(b, fileType(e.in.mode), 0)
			nameOff += len(e.name)
		}
		for _, e := range es[:n] {
			b = append(b, e.name...)
		}
		if es = es[n:]; len(es) > 0 {
			b = append(b, make([]byte, blockSize-size)...)
		}
	}
	return b
}

// content is what a directory or symbolic link has as its data.
func (iw *imageWriter) content(in *inode) []byte {
	iw.buf = iw.buf[:0]
	switch {
	case in.isDir():
		iw.buf = appendDirents(iw.buf, in.dir.sorted)
	case in.isSymlink():
		iw.buf = append(iw.buf, in.target...)
	}
	return iw.buf
}

// writeBlocks writes the directories and targets that are not inline.
func (iw *imageWriter) writeBlocks() error {
	for _, in := range iw.order {
		if in.layout == layoutInline || !in.isDir() && !in.isSymlink() {
			continue
		}
		if err := iw.w.append(iw.content(in)); err != nil {
			return err
		}
		if err := iw.w.align(blockSize); err != nil {
			return err
		}
	}
	return nil
}

func (iw *imageWriter) writeInodes() error {
	w, start := iw.w, iw.w.pos()
	var b []byte
	for i, in := range iw.order {
		for gap := start + int64(in.nid)<<nidBits - w.pos(); gap > 0; {
			n := min(gap, blockSize)
			if err := w.append(w.zero[:n]); err != nil {
				return err
			}
			gap -= n
		}
		d := diskInode{
			layout: uint16(in.layout), mode: in.mode, size: uint64(in.size), block: in.block, ino: uint32(i + 1),
			uid: in.uid, gid: in.gid, mtime: in.mtime, nsec: in.nsec, nlink: in.nlink,
		}
		b = d.append(b[:0])
		if in.layout == layoutInline {
			b = append(b, iw.content(in)...)
		}
		if err := w.append(b); err != nil {
			return err
		}
	}
	return w.align(blockSize)
}

// intern finds the inode's set of attributes, with those that only the layer
// file has, its place in the table.
func (iw *imageWriter) intern(in *inode) {
	if in.flags&(flagOpaque|flagImplied) != 0 {
		m := map[string]string{}
		if in.xattrs != nil {
			m = in.xattrs.decode()
		}
		if in.flags&flagOpaque != 0 {
			m[tree.XattrOpaque] = "y"
		}
		if in.flags&flagImplied != 0 {
			m[XattrImplied] = "y"
		}
		enc := encodeXattrs(m)
		if iw.b.xattrs[enc] == nil {
			iw.b.xattrs[enc] = &xattrSet{enc: enc}
		}
		in.xattrs = iw.b.xattrs[enc]
	}
	if s := in.xattrs; s != nil && s.id == 0 {
		iw.sets = append(iw.sets, s.enc)
		s.id = uint32(len(iw.sets))
	}
}

func (in *inode) setID() uint32 {
	if in.xattrs == nil {
		return 0
	}
	return in.xattrs.id
}
