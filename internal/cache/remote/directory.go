package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/store"
)

// DirectoryOrigin begins the origin of layers that come from a directory. The path follows.
const DirectoryOrigin = "oci-layout:"

// The files of a layout beside those that the specification names.
const (
	lockIndex = ".kiln-index.lock" // held while index.json is changed
	lockUse   = ".kiln-use.lock"   // shared by writers until what they put is named, exclusive to sweep
	tempFile  = ".kiln-tmp-"       // begins the names of what is being written
)

// layout is a cache in an OCI image layout, under a tag or as a manifest.
type layout struct {
	dir, tag string
	manifest digest.Digest // instead of the tag
	store    *store.Store
	fetcher  image.Fetcher

	mu  sync.Mutex
	use *os.File // the shared lock, from the first Put on
}

var _ Storage = (*layout)(nil)

// OpenDirectory returns the cache in a directory, as spec says. f fetches layers
// that the store lacks. Nothing is read or made yet.
func OpenDirectory(f image.Fetcher, spec cache.Spec, opt Options) (*Cache, error) {
	dir, err := filepath.Abs(spec.Dir)
	if err != nil {
		return nil, err
	}
	opt.Name = dir
	f = image.Tracking(f)
	c := New(&layout{dir: dir, tag: spec.Tag, manifest: spec.Digest, store: opt.Store, fetcher: f}, f, opt)
	c.exclusive = true
	return c, nil
}

// Origin implements Storage.
func (l *layout) Origin() string { return DirectoryOrigin + l.dir }

// Resolve implements Storage.
func (l *layout) Resolve(ctx context.Context) ([]byte, ocispec.Descriptor, error) {
	idx, err := l.index()
	if err != nil {
		return nil, ocispec.Descriptor{}, err
	}
	d, ok := l.find(idx)
	if !ok {
		return nil, d, fmt.Errorf("nothing in it has the tag %q: %w", l.tag, fs.ErrNotExist)
	}
	raw, err := l.Read(ctx, d)
	return raw, d, err
}

// index reads index.json; fs.ErrNotExist if there is none.
func (l *layout) index() (*ocispec.Index, error) {
	raw, err := readFile(filepath.Join(l.dir, ocispec.ImageIndexFile))
	if err != nil {
		return nil, err
	}
	idx, err := image.ParseIndex(raw, ocispec.MediaTypeImageIndex)
	if err != nil {
		return nil, unusable(kindOther, "%s: %w", ocispec.ImageIndexFile, err)
	}
	return idx, nil
}

// find is the manifest that the cache's name stands for.
func (l *layout) find(idx *ocispec.Index) (ocispec.Descriptor, bool) {
	for _, m := range idx.Manifests {
		if l.manifest != "" && m.Digest == l.manifest || l.manifest == "" && m.Annotations[ocispec.AnnotationRefName] == l.tag {
			return m, true
		}
	}
	return ocispec.Descriptor{}, false
}

// readFile reads a regular file of at most maxDocument bytes.
func readFile(p string) ([]byte, error) {
	f, err := os.OpenFile(p, os.O_RDONLY|unix.O_NONBLOCK, 0) // no waiting for the writer of a pipe
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return nil, errors.Join(err, fmt.Errorf("%q is not a regular file", p))
	}
	b, err := io.ReadAll(io.LimitReader(f, maxDocument+1))
	if err == nil && len(b) > maxDocument {
		err = fmt.Errorf("%q has more than %d bytes", p, maxDocument)
	}
	return b, err
}

func (l *layout) blobPath(d digest.Digest) string {
	return filepath.Join(l.dir, ocispec.ImageBlobsDir, string(d.Algorithm()), d.Encoded())
}

// Read implements Storage.
func (l *layout) Read(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, err
	}
	raw, err := readFile(l.blobPath(d.Digest))
	if err != nil {
		return nil, unusable(kindCache, "%v", err) // not fs.ErrNotExist: the name is there
	}
	if got := d.Digest.Algorithm().FromBytes(raw); got != d.Digest {
		return nil, unusable(kindCache, "blob %s is damaged: its content has the digest %s", d.Digest, got)
	}
	return raw, nil
}

// Put implements Storage.
func (l *layout) Put(ctx context.Context, layer image.Layer) error {
	if err := l.begin(); err != nil {
		return err
	}
	p := l.blobPath(layer.Blob.Digest)
	now := time.Now()
	if verified(p, layer.Blob) {
		_ = os.Chtimes(p, now, now)
		return nil
	}
	r, err := l.store.OpenBlob(layer.Blob.Digest)
	if errors.Is(err, fs.ErrNotExist) {
		r, err = l.fetcher.Fetch(ctx, layer)
	}
	if err != nil {
		return err
	}
	defer r.Close()
	return writeAtomic(p, func(w io.Writer) error {
		// Both readers verify the content.
		n, err := io.Copy(w, contextReader(ctx, r))
		if err == nil && n != layer.Blob.Size {
			err = fmt.Errorf("blob %s has %d bytes, and not %d", layer.Blob.Digest, n, layer.Blob.Size)
		}
		return err
	})
}

// verified reports whether a file is the blob that d describes.
func verified(p string, d ocispec.Descriptor) bool {
	f, err := os.OpenFile(p, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() || fi.Size() != d.Size {
		return false
	}
	got, err := d.Digest.Algorithm().FromReader(f)
	return err == nil && got == d.Digest
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// contextReader is r until ctx ends.
func contextReader(ctx context.Context, r io.Reader) io.Reader {
	return readerFunc(func(p []byte) (int, error) {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		return r.Read(p)
	})
}

// begin makes the directory a layout, and says that somebody writes to it.
func (l *layout) begin() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.use != nil {
		return nil
	}
	es, err := os.ReadDir(l.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	foreign := slices.ContainsFunc(es, func(e os.DirEntry) bool { return !strings.HasPrefix(e.Name(), ".") && e.Name() != "lost+found" })
	layoutFile := filepath.Join(l.dir, ocispec.ImageLayoutFile)
	_, err = os.Lstat(layoutFile) // after what is in it was read: somebody else may be making it
	known := err == nil
	if foreign && !known {
		return errors.New("the directory has other files in it and is not an OCI layout: choose an empty or new one")
	}
	if err := os.MkdirAll(l.dir, 0o755); err != nil {
		return err
	}
	if !known {
		if err := writeFile(layoutFile, []byte(`{"imageLayoutVersion":"`+ocispec.ImageLayoutVersion+`"}`)); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Join(l.dir, ocispec.ImageBlobsDir, string(digest.SHA256)), 0o755); err != nil {
		return err
	}
	f, err := lockFile(filepath.Join(l.dir, lockUse), unix.LOCK_SH)
	if err != nil {
		return err
	}
	l.use = f
	return nil
}

// lockFile opens a file and locks it, for as long as it is open.
func lockFile(p string, how int) (*os.File, error) {
	f, err := os.OpenFile(p, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		if err = unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %q: %w", p, err)
	}
	return f, nil
}

func writeFile(p string, b []byte) error {
	return writeAtomic(p, func(w io.Writer) error { _, err := w.Write(b); return err })
}

// writeAtomic makes a file that is there as a whole or not at all.
func writeAtomic(p string, write func(io.Writer) error) error {
	f, err := os.CreateTemp(filepath.Dir(p), tempFile)
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // nothing after the rename
	defer f.Close()
	if err := write(f); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), p)
}

// Replace implements Storage.
func (l *layout) Replace(_ context.Context, old digest.Digest, config []byte, manifest Manifest) (bool, error) {
	if err := l.begin(); err != nil {
		return false, err
	}
	// Held for two small files: nobody waits long.
	lock, err := lockFile(filepath.Join(l.dir, lockIndex), unix.LOCK_EX)
	if err != nil {
		return false, err
	}
	defer lock.Close()
	idx, err := l.index()
	if errors.Is(err, fs.ErrNotExist) {
		idx, err = &ocispec.Index{}, nil
	}
	if err != nil {
		return false, err
	}
	if now, _ := l.find(idx); now.Digest != old {
		return false, nil
	}
	if err := l.complete(manifest.Layers); err != nil {
		return false, err
	}
	for _, b := range [][]byte{config, manifest.Raw} {
		if err := writeFile(l.blobPath(digest.FromBytes(b)), b); err != nil {
			return false, err
		}
	}
	raw, err := compact(l.named(idx, manifest.Descriptor()))
	if err == nil {
		err = writeFile(filepath.Join(l.dir, ocispec.ImageIndexFile), raw)
	}
	return err == nil, err
}

// complete checks that all layers that a manifest names are there.
func (l *layout) complete(layers []ocispec.Descriptor) error {
	for _, d := range layers {
		if fi, err := os.Lstat(l.blobPath(d.Digest)); err != nil || fi.Size() != d.Size {
			return fmt.Errorf("blob %s: %w", d.Digest, errLost)
		}
	}
	return nil
}

// named is the index with the cache's name on a manifest.
func (l *layout) named(idx *ocispec.Index, manifest ocispec.Descriptor) ocispec.Index {
	manifest.Annotations = map[string]string{ocispec.AnnotationRefName: l.tag}
	out := ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Annotations: idx.Annotations,
		Manifests: []ocispec.Descriptor{manifest},
	}
	for _, m := range idx.Manifests {
		if m.Annotations[ocispec.AnnotationRefName] != l.tag {
			out.Manifests = append(out.Manifests, m)
		}
	}
	return out
}

// Close implements io.Closer. Blobs that nothing names any more go, unless
// another writer is about to name some.
func (l *layout) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.use == nil {
		return nil
	}
	l.use.Close()
	l.use = nil
	lock, err := lockFile(filepath.Join(l.dir, lockUse), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	return l.sweep()
}

var digestPattern = regexp.MustCompile(`sha256:[0-9a-f]{64}`)

// sweep removes the blobs that no document mentions which index.json leads to,
// and what killed writers left.
func (l *layout) sweep() error {
	idx, err := l.index()
	if errors.Is(err, fs.ErrNotExist) {
		idx = &ocispec.Index{} // a first writer that came to nothing
	} else if err != nil {
		return nil // not ours to judge
	}
	needed := map[string]bool{}
	var todo []string
	for _, m := range idx.Manifests {
		todo = append(todo, string(m.Digest))
	}
	for len(todo) > 0 {
		d := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if needed[d] {
			continue
		}
		needed[d] = true
		todo = append(todo, mentioned(l.blobPath(digest.Digest(d)))...)
	}
	dir := filepath.Join(l.dir, ocispec.ImageBlobsDir, string(digest.SHA256))
	es, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range es {
		if d := digest.NewDigestFromEncoded(digest.SHA256, e.Name()); !needed[string(d)] && (d.Validate() == nil || strings.HasPrefix(e.Name(), tempFile)) {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// mentioned are the digests in a blob that is a JSON document.
func mentioned(p string) []string {
	f, err := os.Open(p)
	if err != nil {
		return nil
	}
	defer f.Close()
	first := make([]byte, 1)
	if _, err := f.ReadAt(first, 0); err != nil || first[0] != '{' {
		return nil // a layer
	}
	b, err := io.ReadAll(io.LimitReader(f, maxDocument))
	if err != nil {
		return nil
	}
	return digestPattern.FindAllString(string(b), -1)
}
