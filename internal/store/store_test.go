package store

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func open(t *testing.T) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.awaitSyncs(time.Minute) })
	return s
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func putLayer(t testing.TB, s *Store, content string) digest.Digest {
	t.Helper()
	w := must(s.NewLayer())(t)
	defer w.Close()
	if _, err := w.File().WriteString(content); err != nil {
		t.Fatal(err)
	}
	d := digest.FromString(content)
	if err := w.Commit(d); err != nil {
		t.Fatal(err)
	}
	return d
}

func wantMissing(t testing.TB, err error) {
	t.Helper()
	if !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("error is %v, want fs.ErrNotExist", err)
	}
}

func tmpNames(t testing.TB, s *Store) []string {
	t.Helper()
	var names []string
	for _, e := range must(os.ReadDir(s.path(dirTmp)))(t) {
		names = append(names, e.Name())
	}
	return names
}

func TestBlob(t *testing.T) {
	s := open(t)
	d := digest.FromString("hello")
	_, err := s.StatBlob(d)
	wantMissing(t, err)
	_, err = s.OpenBlob(d)
	wantMissing(t, err)

	if got := must(s.PutBlob([]byte("hello")))(t); got != d {
		t.Fatalf("digest %s, want %s", got, d)
	}
	if n := must(s.StatBlob(d))(t); n != 5 {
		t.Fatalf("size %d", n)
	}
	if b := must(s.ReadBlob(d, 5))(t); string(b) != "hello" {
		t.Fatalf("content %q", b)
	}
	if _, err := s.ReadBlob(d, 4); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("a blob over the bound gave %v", err)
	}
	empty := must(s.PutBlob(nil))(t)
	if b := must(s.ReadBlob(empty, 0))(t); len(b) != 0 {
		t.Fatalf("content of the empty blob: %q", b)
	}
	if names := tmpNames(t, s); len(names) > 0 {
		t.Fatalf("left in tmp: %q", names)
	}
}

func TestBlobWriter(t *testing.T) {
	s := open(t)
	other := digest.FromString("other")
	w := must(s.NewBlob())(t)
	io.WriteString(w, "hello")
	if w.Size() != 5 {
		t.Fatalf("size %d", w.Size())
	}
	if _, err := w.Commit(other); !errors.Is(err, ErrMismatch) {
		t.Fatalf("a wrong digest gave %v", err)
	}
	for _, d := range []digest.Digest{other, digest.FromString("hello")} {
		_, err := s.StatBlob(d)
		wantMissing(t, err)
	}
	long := digest.SHA512.FromString("hello")
	if got := must(w.Commit(long))(t); got != long {
		t.Fatalf("digest %s", got)
	}
	if _, err := w.Commit(""); err == nil {
		t.Fatal("committed twice")
	}
	w.Close()
	if b := must(s.ReadBlob(long, 100))(t); string(b) != "hello" {
		t.Fatalf("content %q", b)
	}

	w = must(s.NewBlob())(t)
	io.WriteString(w, "dropped")
	w.Close()
	_, err := s.StatBlob(digest.FromString("dropped"))
	wantMissing(t, err)
	if names := tmpNames(t, s); len(names) > 0 {
		t.Fatalf("left in tmp: %q", names)
	}
}

func TestCorruptBlob(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789abcdef"), 10_000)
	for name, damage := range map[string]func(f *os.File) error{
		"one bit":       func(f *os.File) error { _, err := f.WriteAt([]byte{'X'}, 100_000); return err },
		"last byte":     func(f *os.File) error { _, err := f.WriteAt([]byte{'X'}, 159_999); return err },
		"cut":           func(f *os.File) error { return f.Truncate(80_000) },
		"zeros":         func(f *os.File) error { f.Truncate(0); return f.Truncate(160_000) },
		"longer":        func(f *os.File) error { return f.Truncate(160_001) },
		"nothing there": func(f *os.File) error { return f.Truncate(0) },
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t)
			d := must(s.PutBlob(content))(t)
			p := must(s.blobPath(d))(t)
			os.Chmod(p, 0o600)
			f := must(os.OpenFile(p, os.O_RDWR, 0))(t)
			if err := damage(f); err != nil {
				t.Fatal(err)
			}
			f.Close()
			if name != "nothing there" {
				r := must(s.OpenBlob(d))(t)
				n, err := io.Copy(io.Discard, r)
				if !errors.Is(err, ErrCorrupt) {
					t.Fatalf("reading %d damaged bytes gave %v", n, err)
				}
				if n >= int64(len(content)) {
					t.Fatalf("%d bytes were handed out before the error", n)
				}
				r.Close()
			}
			_, err := s.StatBlob(d)
			wantMissing(t, err)
			must(s.PutBlob(content))(t)
			if b := must(s.ReadBlob(d, 1<<20))(t); !bytes.Equal(b, content) {
				t.Fatal("the blob put again differs")
			}
		})
	}
}

// A reader of a bad blob must not remove the good one that replaced it.
func TestCorruptBlobReplacedMeanwhile(t *testing.T) {
	s := open(t)
	content := []byte("some content of some length")
	d := must(s.PutBlob(content))(t)
	p := must(s.blobPath(d))(t)
	os.Chmod(p, 0o600)
	os.WriteFile(p, []byte("some content of some lengtX"), 0o600)
	r := must(s.OpenBlob(d))(t)
	defer r.Close()
	must(s.PutBlob(content))(t)
	if _, err := io.ReadAll(r); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("error is %v", err)
	}
	if b := must(s.ReadBlob(d, 100))(t); !bytes.Equal(b, content) {
		t.Fatalf("content %q", b)
	}
}

func TestLayer(t *testing.T) {
	s := open(t)
	d := digest.FromString("layer")
	if s.HasLayer(d) {
		t.Fatal("there is a layer in an empty store")
	}
	if got := putLayer(t, s, "layer"); got != d || !s.HasLayer(d) {
		t.Fatalf("layer %s is not there", got)
	}
	if b := must(os.ReadFile(s.LayerPath(d)))(t); string(b) != "layer" {
		t.Fatalf("content %q", b)
	}
	if err := s.DropLayer(d); err != nil || s.HasLayer(d) {
		t.Fatalf("dropped layer: %v", err)
	}
	w := must(s.NewLayer())(t)
	w.Close()
	if err := w.Commit(d); err == nil {
		t.Fatal("committed after Close")
	}
}

// A layer that was not on disk yet when the machine went down is not there.
func TestLayerOfEarlierBoot(t *testing.T) {
	s := open(t)
	d := putLayer(t, s, "layer")
	safe := putLayer(t, s, "synced layer")
	s.awaitSyncs(time.Minute)
	if es := must(os.ReadDir(s.path(dirUnsynced)))(t); len(es) != 0 {
		t.Fatalf("%d markers after the sync", len(es))
	}
	if err := os.WriteFile(s.markerPath(d), []byte("another boot"), 0o600); err != nil {
		t.Fatal(err)
	}
	s2 := must(Open(s.Root()))(t)
	if s2.HasLayer(d) {
		t.Error("the unsynced layer of another boot is still there")
	}
	if !s2.HasLayer(safe) {
		t.Error("the synced layer is gone")
	}
	if exists(s.markerPath(d)) {
		t.Error("the marker is still there")
	}
	// One of this boot, whose process ended too early, is synced now.
	d = putLayer(t, s, "layer")
	s.awaitSyncs(time.Minute)
	os.WriteFile(s.markerPath(d), []byte(bootID()), 0o600)
	s2 = must(Open(s.Root()))(t)
	s2.awaitSyncs(time.Minute)
	if !s2.HasLayer(d) || exists(s.markerPath(d)) {
		t.Error("the layer of this boot was not taken over")
	}
}

func TestTags(t *testing.T) {
	s := open(t)
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("m"), Size: 1}
	_, err := s.Tag("a:1")
	wantMissing(t, err)
	wantMissing(t, s.DeleteTag("a:1"))
	for _, ref := range []string{"b:1", "a:1", "../../etc/passwd", "/abs", ".", "nul\x00byte", strings.Repeat("x", MaxKey)} {
		if err := s.SetTag(ref, d); err != nil {
			t.Fatalf("set tag %q: %v", ref, err)
		}
		if got := must(s.Tag(ref))(t); got.Digest != d.Digest {
			t.Fatalf("tag %q is %v", ref, got)
		}
	}
	tags := must(s.Tags())(t)
	if len(tags) != 7 || !slices.IsSortedFunc(tags, func(a, b Tag) int { return strings.Compare(a.Ref, b.Ref) }) {
		t.Fatalf("tags: %v", tags)
	}
	if time.Since(tags[0].Time) > time.Minute {
		t.Fatalf("time of tag: %v", tags[0].Time)
	}
	if err := s.DeleteTag("a:1"); err != nil {
		t.Fatal(err)
	}
	_, err = s.Tag("a:1")
	wantMissing(t, err)
	for _, ref := range []string{"", strings.Repeat("x", MaxKey+1)} {
		if s.SetTag(ref, d) == nil {
			t.Errorf("reference of %d bytes was taken", len(ref))
		}
	}
	if s.SetTag("x", ocispec.Descriptor{Digest: "sha256:../../../x"}) == nil {
		t.Error("tag with a bad digest was taken")
	}
}

func TestRecords(t *testing.T) {
	s := open(t)
	_, err := s.GetRecord("k", "a")
	wantMissing(t, err)
	for _, key := range []string{"a", "", "../../x", "nul\x00", strings.Repeat("k", MaxKey)} {
		if err := s.PutRecord("k", key, []byte("value of "+key)); err != nil {
			t.Fatal(err)
		}
		if b := must(s.GetRecord("k", key))(t); string(b) != "value of "+key {
			t.Fatalf("record %q is %q", key, b)
		}
	}
	n := 0
	if err := s.Records("k", func(key string, used time.Time) error {
		n++
		if time.Since(used) > time.Minute {
			t.Errorf("record %q was used at %v", key, used)
		}
		return nil
	}); err != nil || n != 5 {
		t.Fatalf("%d records, %v", n, err)
	}
	if err := s.Records("none", func(string, time.Time) error { return errors.New("called") }); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteRecord("k", "a"); err != nil {
		t.Fatal(err)
	}
	_, err = s.GetRecord("k", "a")
	wantMissing(t, err)
	if err := s.DeleteRecord("k", "a"); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"", "..", ".x", "a/b", "A", "a\x00", strings.Repeat("a", 65)} {
		if s.PutRecord(kind, "k", nil) == nil {
			t.Errorf("kind %q was taken", kind)
		}
	}
	if s.PutRecord("k", strings.Repeat("k", MaxKey+1), nil) == nil || s.PutRecord("k", "big", make([]byte, MaxRecord+1)) == nil {
		t.Error("a record over the bounds was taken")
	}
}

func TestTornRecord(t *testing.T) {
	s := open(t)
	if err := s.PutRecord("k", "key", []byte("some content")); err != nil {
		t.Fatal(err)
	}
	p := must(s.recordPath("k", "key"))(t)
	whole := must(os.ReadFile(p))(t)
	try := func(what string, b []byte) {
		t.Helper()
		os.Chmod(p, 0o600)
		os.WriteFile(p, b, 0o600)
		if got, err := s.GetRecord("k", "key"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %q, %v", what, got, err)
		}
		if err := s.Records("k", func(key string, _ time.Time) error { return errors.New(key) }); err != nil {
			t.Errorf("%s: Records has %v", what, err)
		}
	}
	for i := range whole {
		try("cut", whole[:i])
		b := bytes.Clone(whole)
		b[i] ^= 1
		try("flipped", b)
	}
	try("zeros", make([]byte, len(whole)))
	// A whole record under another one's name is not that one's.
	os.WriteFile(p, whole, 0o600)
	q := must(s.recordPath("k", "other"))(t)
	os.WriteFile(q, whole, 0o600)
	_, err := s.GetRecord("k", "other")
	wantMissing(t, err)
}

func TestHostileDigests(t *testing.T) {
	s := open(t)
	for _, d := range []digest.Digest{
		"", "sha256", "sha256:", "sha256:..", "../../x:" + digest.Digest(strings.Repeat("a", 64)),
		"sha256:../../../../../../../../../../../../../../etc/passwd/aaaaaaaaaaaaaaa", "md5:d41d8cd98f00b204e9800998ecf8427e",
		"sha256:" + digest.Digest(strings.Repeat("A", 64)), "sha256:" + digest.Digest(strings.Repeat("a", 63)),
		"sha256:" + digest.Digest(strings.Repeat("a", 63)) + "/", "sha256:" + digest.Digest(strings.Repeat("a", 1<<20)),
		"sha256:" + digest.Digest(strings.Repeat("a", 64)) + "\x00",
	} {
		if _, err := s.StatBlob(d); err == nil || errors.Is(err, fs.ErrNotExist) || len(err.Error()) > 1000 {
			t.Errorf("stat %.100q: %.300v", d, err)
		}
		if _, err := s.OpenBlob(d); err == nil {
			t.Errorf("open %.100q: no error", d)
		}
		if s.HasLayer(d) || !strings.HasPrefix(s.LayerPath(d), s.Root()+"/layers/invalid") {
			t.Errorf("layer path of %.100q: %.300q", d, s.LayerPath(d))
		}
		if d == "" {
			continue
		}
		w := must(s.NewBlob())(t)
		if _, err := w.Commit(d); err == nil {
			t.Errorf("commit %.100q: no error", d)
		}
		w.Close()
		l := must(s.NewLayer())(t)
		if err := l.Commit(d); err == nil {
			t.Errorf("commit layer %.100q: no error", d)
		}
		l.Close()
	}
}

func TestTempDir(t *testing.T) {
	s := open(t)
	dir, cleanup, err := s.TempDir("../RUN step\x00 " + strings.Repeat("x", 1000))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(dir, s.path(dirTmp)+"/") {
		t.Fatalf("dir is %q", dir)
	}
	os.WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o600)
	locked := filepath.Join(dir, "no/permission")
	os.MkdirAll(locked, 0o700)
	os.WriteFile(filepath.Join(locked, "f"), nil, 0o600)
	os.Chmod(locked, 0)
	must(Open(s.Root()))(t) // must not sweep what is in use
	must(s.Prune(context.Background(), PruneOptions{}))(t)
	if _, err := os.Stat(filepath.Join(dir, "f")); err != nil {
		t.Fatalf("a sweep took a directory that is in use: %v", err)
	}
	cleanup()
	if names := tmpNames(t, s); len(names) > 0 {
		t.Fatalf("left in tmp: %q", names)
	}
}

func TestOpenRefuses(t *testing.T) {
	base := t.TempDir()
	hint := func(name, root, want string) {
		t.Helper()
		_, err := Open(root)
		var d *diag.Error
		if !errors.As(err, &d) || d.Hint == "" || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error is %v, want %q and a hint", name, err, want)
		}
	}
	file := filepath.Join(base, "file")
	os.WriteFile(file, nil, 0o600)
	hint("a file", file, "not a directory")

	full := filepath.Join(base, "full")
	os.MkdirAll(filepath.Join(full, "blobs"), 0o700)
	hint("a directory of something else", full, "other files")

	newer := must(Open(filepath.Join(base, "newer")))(t)
	vf := newer.path(VersionFile)
	os.Chmod(vf, 0o600)
	os.WriteFile(vf, []byte("2\n"), 0o600)
	hint("a newer version", newer.Root(), "layout version 2")
	for _, junk := range []string{"", "x", "-1", "99999999999999999999", strings.Repeat("0", 1000) + "1"} {
		os.WriteFile(vf, []byte(junk), 0o600)
		hint("a damaged version", newer.Root(), "layout version")
	}

	linked := must(Open(filepath.Join(base, "linked")))(t)
	os.RemoveAll(linked.path(dirBlobs))
	os.Symlink(base, linked.path(dirBlobs))
	hint("a folder that is a link", linked.Root(), "symbolic link")
}

func TestOpenMakesPrivateDirectories(t *testing.T) {
	s := open(t)
	for _, d := range append(allDirs(), ".") {
		if m := must(os.Stat(s.path(d)))(t).Mode().Perm(); m != 0o700 {
			t.Errorf("%s has mode %o", d, m)
		}
	}
	// A new volume is empty but for what its file system makes.
	vol := filepath.Join(t.TempDir(), "vol")
	os.MkdirAll(filepath.Join(vol, "lost+found"), 0o755)
	os.MkdirAll(filepath.Join(vol, ".snapshot"), 0o755)
	must(Open(vol))(t)
	must(Open(vol))(t)
}

// TestTryLock: a lock is had at once or not at all, whoever holds it.
func TestTryLock(t *testing.T) {
	s := open(t)
	other := must(Open(s.Root()))(t) // as another process would
	unlock, ok, err := s.TryLock("x")
	if !ok || err != nil {
		t.Fatal(ok, err)
	}
	for _, st := range []*Store{s, other} {
		if _, ok, err := st.TryLock("x"); ok || err != nil {
			t.Errorf("a lock that is held: %v %v", ok, err)
		}
	}
	if u, ok, err := other.TryLock("y"); !ok || err != nil {
		t.Errorf("another lock: %v %v", ok, err)
	} else {
		u()
	}
	unlock()
	u := must(other.Lock(t.Context(), "x"))(t)
	if _, ok, err := s.TryLock("x"); ok || err != nil {
		t.Errorf("a lock that is held: %v %v", ok, err)
	}
	u()
	if u, ok, err := s.TryLock("x"); !ok || err != nil {
		t.Errorf("a free lock: %v %v", ok, err)
	} else {
		u()
	}
	if len(s.local)+len(other.local) > 0 {
		t.Error("queues are left")
	}
}

// TestPeekRecord: looking at a record is no use of it.
func TestPeekRecord(t *testing.T) {
	s := open(t)
	if err := s.PutRecord("k", "key", []byte("content")); err != nil {
		t.Fatal(err)
	}
	s.age(t, 5*time.Hour)
	if b, err := s.PeekRecord("k", "key"); err != nil || string(b) != "content" {
		t.Fatal(b, err)
	}
	if err := s.Records("k", func(_ string, used time.Time) error {
		if time.Since(used) < 4*time.Hour {
			t.Error("it counts as used")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.PeekRecord("k", "other"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}
