package layer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/kiln-build/kiln/internal/tree"
)

// XattrImplied marks, with the value "y", a directory of a raw layer that the
// layer's tar has no entry for: it is there because something below it is, has
// mode 0755 and owner 0:0, and takes the metadata of the same directory in a
// lower layer if there is one. It is never written to a tar.
const XattrImplied = "trusted.overlay.kiln.implied"

// xattrPrivate is the namespace of what the layer file says about a node by
// way of an extended attribute, and a tar must not.
const xattrPrivate = "trusted.overlay."

// EROFS on disk (https://docs.kernel.org/filesystems/erofs.html), as far as a layer file uses it.
const (
	blockBits    = 12
	blockSize    = 1 << blockBits
	superOffset  = 1024
	superSize    = 128
	superMagic   = 0xe0f5e1e2
	compatSBSum  = 1
	inodeSize    = 64 // always extended
	nidBits      = 5
	rootNid      = 2 // the first inode; 0 is no inode number for readers of directories
	direntSize   = 12
	layoutPlain  = 0
	layoutInline = 2
	maxInline    = blockSize - inodeSize

	maxName   = 255
	maxPath   = 4095
	maxTarget = 4095
	maxMajor  = 0xfff
	maxMinor  = 0xfffff
)

// The footer, the last bytes of a layer file.
const (
	footerMagic   = "kilnlayr"
	footerVersion = 1
	footerSize    = 112
)

// ErrDamaged is in the chain of an error about a layer file that is torn,
// truncated, corrupt or none at all.
var ErrDamaged = errors.New("layer file is damaged")

func damaged(format string, a ...any) error {
	return fmt.Errorf("%w: %s", ErrDamaged, fmt.Sprintf(format, a...))
}

func crcTable() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

type footer struct {
	metaOff  int64 // start of the metadata: directory blocks, then inodes
	inodeOff int64 // start of the inodes; nid 0 is here
	tableOff int64
	tableLen int64
	entries  int64
	tarSize  int64
	diffID   [32]byte
	metaCRC  uint32 // of block 0 and [metaOff, tableOff)
	tableCRC uint32 // of [tableOff, tableOff+tableLen)
}

func (ft *footer) encode() []byte {
	b := append(make([]byte, 0, footerSize), footerMagic...)
	le := binary.LittleEndian
	b = le.AppendUint32(b, footerVersion)
	b = le.AppendUint32(b, ft.metaCRC)
	b = le.AppendUint32(b, ft.tableCRC)
	b = le.AppendUint32(b, 0)
	for _, v := range []int64{ft.metaOff, ft.inodeOff, ft.tableOff, ft.tableLen, ft.entries, ft.tarSize} {
		b = le.AppendUint64(b, uint64(v))
	}
	b = append(b, ft.diffID[:]...)
	b = le.AppendUint32(b, 0)
	return le.AppendUint32(b, crc32.Checksum(b, crcTable()))
}

// decodeFooter checks everything about a footer that does not need the rest of
// the file of size bytes: afterwards, its ranges are within the file and in order.
func decodeFooter(b []byte, size int64) (footer, error) {
	var ft footer
	le := binary.LittleEndian
	if string(b[:8]) != footerMagic {
		return ft, damaged("no footer")
	}
	if crc32.Checksum(b[:footerSize-4], crcTable()) != le.Uint32(b[footerSize-4:]) {
		return ft, damaged("footer's checksum is wrong")
	}
	if v := le.Uint32(b[8:]); v != footerVersion {
		return ft, fmt.Errorf("layer file has format version %d, this program reads version %d", v, footerVersion)
	}
	ft.metaCRC, ft.tableCRC = le.Uint32(b[12:]), le.Uint32(b[16:])
	for i, p := range []*int64{&ft.metaOff, &ft.inodeOff, &ft.tableOff, &ft.tableLen, &ft.entries, &ft.tarSize} {
		*p = int64(le.Uint64(b[24+8*i:]))
	}
	copy(ft.diffID[:], b[72:104])
	ok := ft.metaOff >= blockSize && ft.metaOff <= ft.inodeOff && ft.inodeOff < ft.tableOff &&
		ft.metaOff%blockSize == 0 && ft.inodeOff%blockSize == 0 && ft.tableOff%blockSize == 0 &&
		ft.tableOff <= size-footerSize && ft.tableLen == size-footerSize-ft.tableOff &&
		ft.entries >= 0 && ft.tarSize >= 0
	if !ok {
		return ft, damaged("footer's ranges do not fit a file of %d bytes", size)
	}
	return ft, nil
}

// encodeSuper returns block 0.
func encodeSuper(inodes uint64, blocks, metaBlock uint32, uuid [16]byte) []byte {
	b := make([]byte, blockSize)
	s, le := b[superOffset:], binary.LittleEndian
	le.PutUint32(s[0:], superMagic)
	le.PutUint32(s[8:], compatSBSum)
	s[12] = blockBits
	le.PutUint16(s[14:], rootNid)
	le.PutUint64(s[16:], inodes)
	le.PutUint32(s[36:], blocks)
	le.PutUint32(s[40:], metaBlock)
	copy(s[48:64], uuid[:])
	// The kernel's crc32c has no final inversion.
	le.PutUint32(s[4:], ^crc32.Checksum(s, crcTable()))
	return b
}

// diskInode is an extended inode as stored.
type diskInode struct {
	layout   uint16
	mode     uint16
	size     uint64
	block    uint32 // first block; the device number of a device
	ino      uint32
	uid, gid uint32
	mtime    int64
	nsec     uint32
	nlink    uint32
}

func (d *diskInode) append(b []byte) []byte {
	le := binary.LittleEndian
	b = le.AppendUint16(b, 1|d.layout<<1)
	b = le.AppendUint16(b, 0) // no xattrs: gVisor cannot read such an inode
	b = le.AppendUint16(b, d.mode)
	b = le.AppendUint16(b, 0)
	b = le.AppendUint64(b, d.size)
	b = le.AppendUint32(b, d.block)
	b = le.AppendUint32(b, d.ino)
	b = le.AppendUint32(b, d.uid)
	b = le.AppendUint32(b, d.gid)
	b = le.AppendUint64(b, uint64(d.mtime))
	b = le.AppendUint32(b, d.nsec)
	b = le.AppendUint32(b, d.nlink)
	return append(b, make([]byte, 16)...)
}

func decodeInode(b []byte) (diskInode, error) {
	le := binary.LittleEndian
	format := le.Uint16(b)
	d := diskInode{
		layout: format >> 1,
		mode:   le.Uint16(b[4:]), size: le.Uint64(b[8:]), block: le.Uint32(b[16:]), ino: le.Uint32(b[20:]),
		uid: le.Uint32(b[24:]), gid: le.Uint32(b[28:]),
		mtime: int64(le.Uint64(b[32:])), nsec: le.Uint32(b[40:]), nlink: le.Uint32(b[44:]),
	}
	if format&1 == 0 || d.layout != layoutPlain && d.layout != layoutInline || le.Uint16(b[2:]) != 0 {
		return d, damaged("an inode has format %#x", format)
	}
	if fileType(d.mode) == 0 || d.size > 1<<62 || d.nsec >= 1e9 {
		return d, damaged("an inode has mode %#o, size %d", d.mode, d.size)
	}
	return d, nil
}

// fileType is the EROFS directory entry's type for a mode; 0 if there is none.
func fileType(mode uint16) byte {
	switch mode & tree.ModeType {
	case tree.ModeRegular:
		return 1
	case tree.ModeDir:
		return 2
	case tree.ModeChar:
		return 3
	case tree.ModeBlock:
		return 4
	case tree.ModeFIFO:
		return 5
	case tree.ModeSymlink:
		return 7
	}
	return 0
}

// encodeDev and decodeDev are the kernel's new_encode_dev: 12 bits of major, 20 of minor.
func encodeDev(major, minor uint32) uint32 {
	return minor&0xff | major<<8 | (minor&^0xff)<<12
}

func decodeDev(d uint32) (major, minor uint32) {
	return d & 0xfff00 >> 8, d&0xff | d>>12&0xfff00
}
