package store

import (
	"bytes"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// What needs what is found without knowing any format: a document needs the
// content whose digests are written in it. A manifest names its config and its
// blobs so, a config the diff IDs of its layers, an index its manifests, a
// cache record its result. It can keep too much, never too little.

var digestPattern = regexp.MustCompile(`sha(256:[0-9a-f]{64}|384:[0-9a-f]{96}|512:[0-9a-f]{128})`)

func mentions(b []byte) []string {
	var ds []string
	for _, m := range digestPattern.FindAll(b, -1) {
		ds = append(ds, string(m))
	}
	return ds
}

// maxDocument is the size up to which a blob may be a document that names others.
const maxDocument = 8 << 20

// blobMentions returns what the blob at path needs, if it is a JSON document.
func blobMentions(path string, size int64) []string {
	f := openDocument(path, size)
	if f == nil {
		return nil
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxDocument))
	if err != nil {
		return nil
	}
	return mentions(b)
}

// isDocument reports whether the blob at path looks like a JSON document.
func isDocument(path string, size int64) bool {
	f := openDocument(path, size)
	if f != nil {
		f.Close()
	}
	return f != nil
}

// openDocument opens a blob if it looks like a JSON document; nil if not.
func openDocument(path string, size int64) *os.File {
	if size > maxDocument {
		return nil
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	first := make([]byte, 64)
	n, err := f.ReadAt(first, 0)
	if err != nil && err != io.EOF || !bytes.HasPrefix(bytes.TrimLeft(first[:n], " \t\r\n"), []byte("{")) {
		f.Close()
		return nil
	}
	return f
}

// object is one file of the store, as a Prune saw it first.
type object struct {
	path   string
	info   fs.FileInfo
	digest string // of a blob or layer
	marked bool
}

func (o *object) used() time.Time { return o.info.ModTime() }

// inventory is all content of the store by digest.
type inventory struct {
	blobs, layers map[string]*object
	records       []*object
	links         map[string][]*object // records of a LinkKind by key
}

func (s *Store) inventory() (*inventory, error) {
	inv := &inventory{blobs: map[string]*object{}, layers: map[string]*object{}, links: map[string][]*object{}}
	for dir, into := range map[string]map[string]*object{dirBlobs: inv.blobs, dirLayers: inv.layers} {
		err := eachFile(s.path(dir), func(p string, fi fs.FileInfo) error {
			d := filepath.Base(filepath.Dir(p)) + ":" + filepath.Base(p)
			into[d] = &object{path: p, info: fi, digest: d}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	err := eachFile(s.path(dirRecords), func(p string, fi fs.FileInfo) error {
		o := &object{path: p, info: fi}
		inv.records = append(inv.records, o)
		if o.isLink() {
			if key, _, err := readRecord(p); err == nil {
				inv.links[key] = append(inv.links[key], o)
			}
		}
		return nil
	})
	return inv, err
}

func (o *object) isLink() bool {
	return strings.HasPrefix(filepath.Base(filepath.Dir(o.path)), LinkKind)
}

// marking is a set of objects that were marked for one reason.
type marking []*object

func (m *marking) add(o *object) bool {
	if o.marked {
		return false
	}
	o.marked = true
	*m = append(*m, o)
	return true
}

func (m marking) bytes() (n int64) {
	for _, o := range m {
		n += allocated(o.info)
	}
	return n
}

// bytes is what all of it takes on disk.
func (inv *inventory) bytes() (n int64) {
	for _, objs := range []map[string]*object{inv.blobs, inv.layers} {
		for _, o := range objs {
			n += allocated(o.info)
		}
	}
	for _, o := range inv.records {
		n += allocated(o.info)
	}
	return n
}

func (m marking) undo() {
	for _, o := range m {
		o.marked = false
	}
}

// mark marks everything that the digests need.
func (inv *inventory) mark(m *marking, digests ...string) {
	seen := map[string]bool{}
	for todo := digests; len(todo) > 0; {
		d := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if seen[d] {
			continue
		}
		seen[d] = true
		l, b := inv.layers[d], inv.blobs[d]
		if l == nil && b == nil {
			continue
		}
		if l != nil {
			m.add(l)
		}
		if b != nil && m.add(b) {
			todo = append(todo, blobMentions(b.path, b.info.Size())...)
		}
		for _, o := range inv.links[d] {
			m.add(o)
			todo = append(todo, recordMentions(o)...)
		}
	}
}

// markRecord marks a record and everything that it needs.
func (inv *inventory) markRecord(m *marking, o *object) {
	m.add(o)
	inv.mark(m, recordMentions(o)...)
}

// record describes an object that is a record. One that cannot be read has no key.
func (o *object) record() Record {
	key, b, err := readRecord(o.path)
	if err != nil {
		b = nil
	}
	return Record{Kind: filepath.Base(filepath.Dir(o.path)), Key: key, Used: o.used(), Mentions: mentions(b), Body: b}
}

func recordMentions(o *object) []string {
	_, b, err := readRecord(o.path)
	if err != nil {
		return nil
	}
	return mentions(b)
}

// touchAll marks a blob and everything it needs as used now. The caller
// holds the gate.
func (s *Store) touchAll(root string) {
	now := time.Now()
	seen := map[string]bool{}
	for todo := []string{root}; len(todo) > 0; {
		d := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if seen[d] {
			continue
		}
		seen[d] = true
		name := strings.Replace(d, ":", string(filepath.Separator), 1)
		_ = os.Chtimes(s.path(dirLayers, name), now, now)
		p := s.path(dirBlobs, name)
		fi, err := lstatRegular(p)
		if err != nil {
			continue
		}
		_ = os.Chtimes(p, now, now)
		todo = append(todo, blobMentions(p, fi.Size())...)
	}
}
