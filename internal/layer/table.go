package layer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
)

// What Linux allows, and one more bound for all attributes of one file.
const (
	maxXattrName  = 255
	maxXattrValue = 64 << 10
	maxXattrs     = 1 << 20
)

// xattrSet is a set of extended attributes, shared by all inodes that have just these.
type xattrSet struct {
	enc string
	id  uint32 // in the table; from 1
}

// encodeXattrs is one record of the table's first part, and unique for a map:
// sorted by name; each u16 length, name, u32 length, value.
func encodeXattrs(m map[string]string) string {
	names := make([]string, 0, len(m))
	for k := range m {
		names = append(names, k)
	}
	slices.Sort(names)
	var b []byte
	for _, k := range names {
		b = binary.LittleEndian.AppendUint16(b, uint16(len(k)))
		b = append(b, k...)
		b = binary.LittleEndian.AppendUint32(b, uint32(len(m[k])))
		b = append(b, m[k]...)
	}
	return string(b)
}

func (s *xattrSet) decode() map[string]string {
	m, err := decodeXattrs([]byte(s.enc))
	if err != nil {
		panic("layer: own encoding is wrong: " + err.Error()) // never: see encodeXattrs
	}
	return m
}

func decodeXattrs(b []byte) (map[string]string, error) {
	m := map[string]string{}
	c := cursor{b: b}
	for len(c.b) > 0 {
		k := string(c.take(uint64(c.u16())))
		m[k] = string(c.take(uint64(c.u32())))
		if c.bad {
			return nil, damaged("a set of extended attributes is cut off")
		}
	}
	return m, nil
}

// cursor reads little-endian values; past the end it gives zeros and is bad.
type cursor struct {
	b   []byte
	bad bool
}

func (c *cursor) take(n uint64) []byte {
	if n > uint64(len(c.b)) {
		c.bad, c.b = true, nil
		return nil
	}
	r := c.b[:n]
	c.b = c.b[n:]
	return r
}

func (c *cursor) u16() uint16 {
	if r := c.take(2); r != nil {
		return binary.LittleEndian.Uint16(r)
	}
	return 0
}

func (c *cursor) u32() uint32 {
	if r := c.take(4); r != nil {
		return binary.LittleEndian.Uint32(r)
	}
	return 0
}

func (c *cursor) u64() uint64 {
	if r := c.take(8); r != nil {
		return binary.LittleEndian.Uint64(r)
	}
	return 0
}

// Device is the number of a character or block device.
type Device struct{ Major, Minor uint32 }

// table is what a layer file says about inodes that EROFS, as gVisor reads it, does not.
type table struct {
	xattrs  map[uint64]map[string]string
	devices map[uint64]Device
}

// encodeTable writes the table's three parts: sets of attributes, inodes that
// have one, devices. order is the inodes in the order of their nids.
func encodeTable(sets []string, order []*inode, setOf func(*inode) uint32) []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, uint32(len(sets)))
	for _, s := range sets {
		b = le.AppendUint32(b, uint32(len(s)))
		b = append(b, s...)
	}
	count := func(at int) { le.PutUint32(b[at:], le.Uint32(b[at:])+1) }
	at := len(b)
	b = le.AppendUint32(b, 0)
	for _, in := range order {
		if id := setOf(in); id != 0 {
			b = le.AppendUint64(b, in.nid)
			b = le.AppendUint32(b, id)
			count(at)
		}
	}
	at = len(b)
	b = le.AppendUint32(b, 0)
	for _, in := range order {
		if in.isDevice() && in.block != 0 {
			b = le.AppendUint64(b, in.nid)
			b = le.AppendUint32(b, in.block)
			count(at)
		}
	}
	return b
}

func decodeTable(b []byte) (*table, error) {
	t := &table{xattrs: map[uint64]map[string]string{}, devices: map[uint64]Device{}}
	c := cursor{b: b}
	var sets []map[string]string
	for n := c.u32(); n > 0 && !c.bad; n-- {
		m, err := decodeXattrs(c.take(uint64(c.u32())))
		if err != nil {
			return nil, err
		}
		sets = append(sets, m)
	}
	for n := c.u32(); n > 0 && !c.bad; n-- {
		nid, id := c.u64(), c.u32()
		if id == 0 || int64(id) > int64(len(sets)) {
			return nil, damaged("the table has no attribute set %d", id)
		}
		t.xattrs[nid] = sets[id-1]
	}
	for n := c.u32(); n > 0 && !c.bad; n-- {
		nid := c.u64()
		major, minor := decodeDev(c.u32())
		t.devices[nid] = Device{major, minor}
	}
	if c.bad || len(c.b) != 0 {
		return nil, damaged("the table does not fit its length")
	}
	return t, nil
}

// ReadXattrs returns the extended attributes of the layer file f of size bytes:
// EROFS inode number (nid; what stat in gVisor and in Linux gives as st_ino) →
// name → value. Inodes that have none are not in it. Maps may be shared.
func ReadXattrs(f io.ReaderAt, size int64) (map[uint64]map[string]string, error) {
	t, err := readTable(f, size)
	if err != nil {
		return nil, err
	}
	return t.xattrs, nil
}

// ReadDevices returns the numbers of all devices in the layer file f of size bytes
// by EROFS inode number. A character device that is not in it is a whiteout.
// (gVisor's EROFS does not tell device numbers: to its overlay every character
// device in a lower layer is a whiteout unless it is told better.)
func ReadDevices(f io.ReaderAt, size int64) (map[uint64]Device, error) {
	t, err := readTable(f, size)
	if err != nil {
		return nil, err
	}
	return t.devices, nil
}

func readTable(f io.ReaderAt, size int64) (*table, error) {
	ft, err := readFooter(f, size)
	if err != nil {
		return nil, err
	}
	return ft.table(f)
}

func readFooter(f io.ReaderAt, size int64) (footer, error) {
	if size < 2*blockSize+footerSize {
		return footer{}, damaged("%d bytes are too few", size)
	}
	b := make([]byte, footerSize)
	if err := readFull(f, b, size-footerSize); err != nil {
		return footer{}, err
	}
	return decodeFooter(b, size)
}

func (ft *footer) table(f io.ReaderAt) (*table, error) {
	b := make([]byte, ft.tableLen)
	if err := readFull(f, b, ft.tableOff); err != nil {
		return nil, err
	}
	if crc32.Checksum(b, crcTable()) != ft.tableCRC {
		return nil, damaged("the table's checksum is wrong")
	}
	return decodeTable(b)
}

// readFull reads what must be there.
func readFull(f io.ReaderAt, b []byte, off int64) error {
	n, err := f.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		return damaged("it ends before byte %d", off+int64(len(b)))
	}
	return fmt.Errorf("read layer file: %w", err)
}
