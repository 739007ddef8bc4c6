// Package statcache remembers the SHA-256 of files' content by what stat(2)
// says of them, so that an unchanged build context is not read again.
//
// The cache is one file in a directory that any number of builds, of any
// number of contexts, share at the same time. It is only ever replaced as a
// whole, is bounded, and is no cache at all when it is damaged: nothing a
// caller does depends on it but time.
//
// An entry is found by device, inode, size, modification time and change time,
// all of them equal. The change time cannot be set by a program, so content
// cannot change and keep all five, but for one case: a second change within the
// same tick of the file system's clock. Entries for files as young as that are
// not made (see Sig.Settled).
package statcache

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"hash/crc64"
	"slices"
	"sync"
	"time"
)

// Sum is the SHA-256 of a file's content.
type Sum [32]byte

// Sig is what tells one state of a file from every other. Times are in
// nanoseconds since 1970.
type Sig struct {
	Dev, Ino     uint64
	Size         int64
	MTime, CTime int64
}

// Young is how long before it was read a file must have changed last for its
// state to be trusted: file systems' clocks have granularities of up to two
// seconds, and a server's clock may be a little behind.
const Young = 2500 * time.Millisecond

const (
	magic       = "kiln-statcache-1"
	headerSize  = len(magic) + 8 // and the checksum of the records
	recordSize  = 5*8 + 4 + 32
	maxRecords  = 1 << 18 // 20 MB
	maxFileSize = headerSize + maxRecords*recordSize
	touchAfter  = 24 * 60 // minutes
)

// record is one entry. used is minutes since 1970.
type record struct {
	sig  Sig
	used uint32
	sum  Sum
}

// Cache is a cache as it was when opened and what was put since. It is safe
// for concurrent use.
type Cache struct {
	dir string

	mu    sync.Mutex
	table []byte // sorted records, as in the file
	fresh map[fileID]record
}

// fileID is a file; there is one record, the newest state, for each.
type fileID struct{ dev, ino uint64 }

// Open opens the cache in dir, which need not exist yet. A cache that cannot be
// read is empty.
func Open(dir string) *Cache {
	return &Cache{dir: dir, table: load(dir), fresh: map[fileID]record{}}
}

// Get returns the content's sum for a file in state s.
func (c *Cache) Get(s Sig) (Sum, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	id := fileID{s.Dev, s.Ino}
	if r, ok := c.fresh[id]; ok {
		return r.sum, r.sig == s
	}
	i, ok := find(c.table, id)
	if !ok {
		return Sum{}, false
	}
	r := at(c.table, i)
	if r.sig != s {
		return Sum{}, false
	}
	if now := minutes(time.Now()); now > r.used+touchAfter {
		r.used = now
		c.fresh[id] = r
	}
	return r.sum, true
}

// Settled reports whether a file that was in state s at a time has another state
// as soon as it has another content. It need not if it had changed so shortly
// before that a later change can bear the same times, or if its times make no
// sense.
func (s Sig) Settled(at time.Time) bool {
	limit := at.Add(-Young).UnixNano()
	return s.CTime > 0 && s.CTime <= limit && s.MTime <= limit
}

// Put records the sum of a file that was in state s before and after it was
// read; began is when reading began. Nothing is recorded if s was not settled.
func (c *Cache) Put(s Sig, sum Sum, began time.Time) {
	if !s.Settled(began) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fresh[fileID{s.Dev, s.Ino}] = record{sig: s, used: minutes(time.Now()), sum: sum}
}

// merge returns the table with fresh records put in place of older ones of the
// same file, bounded to the limit most recently used.
func merge(table []byte, fresh map[fileID]record, limit int) []byte {
	add := make([]record, 0, len(fresh))
	for _, r := range fresh {
		add = append(add, r)
	}
	slices.SortFunc(add, func(a, b record) int { return compare(id(a), id(b)) })

	out := make([]byte, 0, len(table)+len(add)*recordSize)
	n := len(table) / recordSize
	for i := 0; i < n || len(add) > 0; {
		if i == n {
			out, add = appendRecord(out, add[0]), add[1:]
			continue
		}
		order := -1
		if len(add) > 0 {
			order = compare(idAt(table, i), id(add[0]))
		}
		switch {
		case order < 0:
			out = append(out, table[i*recordSize:(i+1)*recordSize]...)
			i++
		case order == 0:
			i++
		default:
			out, add = appendRecord(out, add[0]), add[1:]
		}
	}
	return evict(out, limit)
}

// evict drops the least recently used records beyond limit, keeping the order.
func evict(table []byte, limit int) []byte {
	n := len(table) / recordSize
	if n <= limit {
		return table
	}
	used := make([]uint32, n)
	for i := range used {
		used[i] = at(table, i).used
	}
	slices.Sort(used)
	oldest := used[n-limit]
	room := limit // how many of age oldest may stay
	for _, u := range used[n-limit:] {
		if u > oldest {
			room--
		}
	}
	out := table[:0]
	for i := range n {
		u := at(table, i).used
		if u < oldest || u == oldest && room == 0 {
			continue
		}
		if u == oldest {
			room--
		}
		out = append(out, table[i*recordSize:(i+1)*recordSize]...)
	}
	return out
}

// parse returns the records of a cache file, or nil if it is not whole.
func parse(b []byte) []byte {
	if len(b) < headerSize || len(b) > maxFileSize || !bytes.HasPrefix(b, []byte(magic)) {
		return nil
	}
	table := b[headerSize:]
	if len(table)%recordSize != 0 || checksum(table) != binary.LittleEndian.Uint64(b[len(magic):]) {
		return nil
	}
	for i := 1; i < len(table)/recordSize; i++ {
		if compare(idAt(table, i-1), idAt(table, i)) >= 0 {
			return nil
		}
	}
	return table
}

func header(table []byte) []byte {
	return binary.LittleEndian.AppendUint64([]byte(magic), checksum(table))
}

func checksum(b []byte) uint64 { return crc64.Checksum(b, crc64.MakeTable(crc64.ECMA)) }

func find(table []byte, want fileID) (int, bool) {
	lo, hi := 0, len(table)/recordSize
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		if compare(idAt(table, mid), want) < 0 {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo, lo < len(table)/recordSize && idAt(table, lo) == want
}

func compare(a, b fileID) int {
	return cmp.Or(cmp.Compare(a.dev, b.dev), cmp.Compare(a.ino, b.ino))
}

func id(r record) fileID { return fileID{r.sig.Dev, r.sig.Ino} }

func idAt(table []byte, i int) fileID {
	b := table[i*recordSize:]
	return fileID{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])}
}

func at(table []byte, i int) record {
	b := table[i*recordSize : (i+1)*recordSize]
	u := func(o int) uint64 { return binary.LittleEndian.Uint64(b[o:]) }
	r := record{
		sig:  Sig{Dev: u(0), Ino: u(8), Size: int64(u(16)), MTime: int64(u(24)), CTime: int64(u(32))},
		used: binary.LittleEndian.Uint32(b[40:]),
	}
	copy(r.sum[:], b[44:])
	return r
}

func appendRecord(b []byte, r record) []byte {
	for _, v := range []uint64{r.sig.Dev, r.sig.Ino, uint64(r.sig.Size), uint64(r.sig.MTime), uint64(r.sig.CTime)} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	b = binary.LittleEndian.AppendUint32(b, r.used)
	return append(b, r.sum[:]...)
}

func minutes(t time.Time) uint32 { return uint32(max(0, t.Unix()/60)) }
