package layer

import (
	"bytes"
	"encoding/binary"
	"io/fs"
)

// dirents is one block of a directory.
type dirents struct {
	b []byte
	n int
}

func parseDirents(b []byte) (dirents, error) {
	d := dirents{b: b}
	if len(b) <= direntSize {
		return d, damaged("a directory block has %d bytes", len(b))
	}
	first := d.nameOff(0)
	if first%direntSize != 0 || first == 0 || first >= len(b) {
		return d, damaged("a directory block's first name is at %d", first)
	}
	d.n = first / direntSize
	return d, nil
}

func (d dirents) nameOff(i int) int {
	return int(binary.LittleEndian.Uint16(d.b[i*direntSize+8:]))
}

// at returns name and inode number of entry i < d.n, the name as part of the block.
// The block's last name may be followed by NULs.
func (d dirents) at(i int) ([]byte, uint64, error) {
	lo, hi := d.nameOff(i), len(d.b)
	if i < d.n-1 {
		hi = d.nameOff(i + 1)
	}
	if lo < d.n*direntSize || lo >= hi || hi > len(d.b) {
		return nil, 0, damaged("a directory entry's name is at [%d, %d)", lo, hi)
	}
	name := d.b[lo:hi]
	if i == d.n-1 {
		if end := bytes.IndexByte(name, 0); end >= 0 {
			name = name[:end]
		}
	}
	if len(name) == 0 || len(name) > maxName || bytes.IndexByte(name, '/') >= 0 || bytes.IndexByte(name, 0) >= 0 {
		return nil, 0, damaged("a directory entry has the name %.64q", name)
	}
	return name, binary.LittleEndian.Uint64(d.b[i*direntSize:]), nil
}

// find looks name up. before and after say on which side of the block's names it is.
func (d dirents) find(name []byte) (nid uint64, before, after bool, err error) {
	lo, hi := 0, d.n
	for lo < hi {
		mid := (lo + hi) / 2
		s, nid, err := d.at(mid)
		if err != nil {
			return 0, false, false, err
		}
		switch c := bytes.Compare(name, s); {
		case c == 0:
			return nid, false, false, nil
		case c < 0:
			hi = mid
		default:
			lo = mid + 1
		}
	}
	return 0, lo == 0, lo == d.n, fs.ErrNotExist
}
