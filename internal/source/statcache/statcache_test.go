package statcache

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"math"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

func sig(dev, ino uint64) Sig {
	return Sig{Dev: dev, Ino: ino, Size: 7, MTime: 1e18, CTime: 1e18 + int64(ino)}
}

func sum(n uint64) Sum { return sha256.Sum256(binary.LittleEndian.AppendUint64(nil, n)) }

func flush(t *testing.T, c *Cache) {
	t.Helper()
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
}

func wantHit(t *testing.T, c *Cache, s Sig, want Sum) {
	t.Helper()
	if got, ok := c.Get(s); !ok || got != want {
		t.Errorf("Get(%+v) = %x, %v; want %x", s, got[:4], ok, want[:4])
	}
}

func TestKeptOverFlush(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "dir")
	c := Open(dir)
	for i := range uint64(1000) {
		c.Put(sig(i%3, i), sum(i), time.Now())
	}
	wantHit(t, c, sig(0, 0), sum(0))
	flush(t, c)
	for _, c := range []*Cache{c, Open(dir)} {
		for i := range uint64(1000) {
			wantHit(t, c, sig(i%3, i), sum(i))
		}
		if _, ok := c.Get(sig(5, 5)); ok {
			t.Error("found a file that was never put")
		}
	}
}

func TestAnyDifferenceIsAMiss(t *testing.T) {
	dir := t.TempDir()
	c := Open(dir)
	s := sig(1, 2)
	c.Put(s, sum(1), time.Now())
	flush(t, c)
	c = Open(dir)
	for name, change := range map[string]func(*Sig){
		"device": func(s *Sig) { s.Dev++ }, "inode": func(s *Sig) { s.Ino++ }, "size": func(s *Sig) { s.Size++ },
		"mtime": func(s *Sig) { s.MTime++ }, "ctime": func(s *Sig) { s.CTime++ },
	} {
		other := s
		change(&other)
		if _, ok := c.Get(other); ok {
			t.Errorf("hit in spite of another %s", name)
		}
	}
	wantHit(t, c, s, sum(1))
}

func TestNewerStateReplacesOlder(t *testing.T) {
	dir := t.TempDir()
	c := Open(dir)
	old := sig(1, 2)
	c.Put(old, sum(1), time.Now())
	flush(t, c)
	now := old
	now.CTime++
	c.Put(now, sum(2), time.Now())
	flush(t, c)
	c = Open(dir)
	wantHit(t, c, now, sum(2))
	if _, ok := c.Get(old); ok {
		t.Error("the older state is still there")
	}
	if n := len(c.table) / recordSize; n != 1 {
		t.Errorf("%d records for one file", n)
	}
}

func TestYoungFilesAreNotKept(t *testing.T) {
	began := time.Now()
	at := func(d time.Duration) int64 { return began.Add(d).UnixNano() }
	for _, tc := range []struct {
		name         string
		mtime, ctime int64
		kept         bool
	}{
		{"old", at(-time.Hour), at(-time.Hour), true},
		{"just old enough", at(-Young), at(-Young), true},
		{"changed just before", at(-Young + 1), at(-Young + 1), false},
		{"old mtime was set just before", at(-time.Hour), at(-time.Second), false},
		{"ctime of a clock ahead of ours", at(-time.Hour), at(time.Hour), false},
		{"mtime in the future", at(time.Hour), at(-time.Hour), false},
		{"no ctime", at(-time.Hour), 0, false},
		{"ctime that cannot be", at(-time.Hour), math.MinInt64, false},
	} {
		c := Open(t.TempDir())
		s := Sig{Dev: 1, Ino: 1, MTime: tc.mtime, CTime: tc.ctime}
		c.Put(s, sum(1), began)
		if _, ok := c.Get(s); ok != tc.kept {
			t.Errorf("%s: kept is %v", tc.name, ok)
		}
	}
}

func TestDamagedFileIsNoCache(t *testing.T) {
	dir := t.TempDir()
	c := Open(dir)
	for i := range uint64(10) {
		c.Put(sig(1, i), sum(i), time.Now())
	}
	flush(t, c)
	name := filepath.Join(dir, fileName)
	whole, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for n := 0; n < len(whole); n += 13 {
		for _, b := range [][]byte{whole[:n], append(append([]byte(nil), whole[:n]...), whole[min(n+1, len(whole)):]...), flip(whole, n)} {
			if err := os.WriteFile(name, b, 0o600); err != nil {
				t.Fatal(err)
			}
			c := Open(dir)
			if len(c.table) != 0 {
				t.Fatalf("damage at byte %d was not seen", n)
			}
		}
	}
	c = Open(dir)
	c.Put(sig(1, 1), sum(9), time.Now())
	flush(t, c)
	wantHit(t, Open(dir), sig(1, 1), sum(9))
}

func flip(b []byte, at int) []byte {
	c := bytes.Clone(b)
	c[at] ^= 0x10
	return c
}

func TestOddFilesAreNoCache(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, fileName), 0o700); err != nil {
		t.Fatal(err)
	}
	c := Open(dir)
	c.Put(sig(1, 1), sum(1), time.Now())
	if err := c.Flush(); err == nil {
		t.Error("a directory was replaced")
	}
	wantHit(t, c, sig(1, 1), sum(1))
	es, _ := os.ReadDir(dir)
	for _, e := range es {
		if filepath.Ext(e.Name()) == ".tmp" {
			t.Errorf("%s was left behind", e.Name())
		}
	}
}

func TestSharedByManyBuilds(t *testing.T) {
	dir := t.TempDir()
	const builds, files = 8, 200
	var wg sync.WaitGroup
	for b := range uint64(builds) {
		wg.Go(func() {
			for round := range uint64(4) {
				c := Open(dir)
				for i := range uint64(files) {
					if i%4 == round {
						c.Put(sig(b, i), sum(b<<32|i), time.Now())
					}
				}
				if err := c.Flush(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	c := Open(dir)
	for b := range uint64(builds) {
		for i := range uint64(files) {
			wantHit(t, c, sig(b, i), sum(b<<32|i))
		}
	}
}

func TestEviction(t *testing.T) {
	fresh := map[fileID]record{}
	for i := range uint64(100) {
		s := sig(1, i)
		fresh[fileID{1, i}] = record{sig: s, used: uint32(i / 10), sum: sum(i)}
	}
	table := merge(nil, fresh, 35)
	if n := len(table) / recordSize; n != 35 {
		t.Fatalf("%d records are left of a limit of 35", n)
	}
	for i := range uint64(100) {
		_, ok := find(table, fileID{1, i})
		if i >= 70 && !ok {
			t.Errorf("record %d, used lately, is gone", i)
		}
		if i < 60 && ok {
			t.Errorf("record %d, not used for long, is still there", i)
		}
	}
	if parse(append(header(table), table...)) == nil {
		t.Error("what is left is not a valid cache")
	}
}

func TestUseKeepsARecord(t *testing.T) {
	dir := t.TempDir()
	old := record{sig: sig(1, 1), used: minutes(time.Now()) - touchAfter - 5, sum: sum(1)}
	if err := replace(dir, appendRecord(nil, old)); err != nil {
		t.Fatal(err)
	}
	c := Open(dir)
	wantHit(t, c, old.sig, old.sum)
	flush(t, c)
	if r := at(Open(dir).table, 0); r.used <= old.used || r.sum != old.sum || r.sig != old.sig {
		t.Errorf("record is %+v after use, was %+v", r, old)
	}
}

func FuzzParse(f *testing.F) {
	table := appendRecord(nil, record{sig: sig(1, 1), sum: sum(1)})
	f.Add(append(header(table), table...))
	f.Add([]byte(magic))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		// With a right checksum too, so that what is behind it is reached.
		if len(b) > headerSize {
			b = append(header(b[headerSize:]), b[headerSize:]...)
		}
		c := &Cache{table: parse(b), fresh: map[fileID]record{}}
		for i := range len(c.table) / recordSize {
			r := at(c.table, i)
			if got, ok := c.Get(r.sig); !ok || got != r.sum {
				t.Fatalf("record %d cannot be found", i)
			}
		}
		out := merge(c.table, map[fileID]record{{1, 1}: {sig: sig(1, 1)}}, 10)
		if parse(append(header(out), out...)) == nil {
			t.Fatal("merging made an invalid cache")
		}
	})
}
