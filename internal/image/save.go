package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ToSave is an image of the store, a manifest or an index, with its names.
type ToSave struct {
	Descriptor ocispec.Descriptor
	Refs       []string // normalised; may be empty
}

// SaveOptions says how.
type SaveOptions struct {
	// Docker adds manifest.json, so that "docker load" of any version takes
	// the archive. It has one platform of each image.
	Docker   bool
	Platform ocispec.Platform // for Docker; this machine's if empty
	// Fetcher gets layers that the store lacks; may be nil.
	Fetcher Fetcher
}

// Save writes images as one archive, an OCI layout in a tar. The same
// images give the same bytes. Blobs are verified while they are written.
func Save(ctx context.Context, st *store.Store, w io.Writer, images []ToSave, opt SaveOptions) error {
	s, err := gather(ctx, st, images, opt)
	if err != nil {
		return fmt.Errorf("save images: %w", err)
	}
	tw := tar.NewWriter(w)
	if err := s.writeTar(ctx, tw); err != nil {
		return fmt.Errorf("save images: %w", err)
	}
	if err := tw.Close(); err != nil {
		return fmt.Errorf("save images: %w", err)
	}
	return nil
}

// saving is what goes into an archive.
type saving struct {
	st    *store.Store
	blobs map[digest.Digest]int64
	texts map[string][]byte
	index ocispec.Index
}

func gather(ctx context.Context, st *store.Store, images []ToSave, opt SaveOptions) (*saving, error) {
	s := &saving{st: st, blobs: map[digest.Digest]int64{}, texts: map[string][]byte{}}
	s.index = ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{},
	}
	var docker []map[string]any
	for _, im := range images {
		if err := s.image(ctx, im.Descriptor, opt.Fetcher, 0); err != nil {
			return nil, fmt.Errorf("image %s: %w", nameOf(im), err)
		}
		entries, err := indexEntries(im)
		if err != nil {
			return nil, err
		}
		s.index.Manifests = append(s.index.Manifests, entries...)
		if opt.Docker {
			d, err := dockerEntry(ctx, st, im, opt.Platform)
			if err != nil {
				return nil, fmt.Errorf("image %s: %w", nameOf(im), err)
			}
			docker = append(docker, d)
		}
	}
	var err error
	if s.texts[ocispec.ImageIndexFile], err = indexBytes(s.index); err != nil {
		return nil, err
	}
	s.texts[ocispec.ImageLayoutFile] = layoutBytes()
	if opt.Docker {
		if s.texts[dockerManifestFile], err = json.Marshal(docker); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func layoutBytes() []byte {
	return []byte(`{"imageLayoutVersion":"` + ocispec.ImageLayoutVersion + `"}`)
}

func nameOf(im ToSave) string {
	if len(im.Refs) > 0 {
		return fmt.Sprintf("%q", im.Refs[0])
	}
	return string(im.Descriptor.Digest)
}

// indexEntries names an image as docker, containerd and BuildKit do.
func indexEntries(im ToSave) ([]ocispec.Descriptor, error) {
	d := ocispec.Descriptor{
		MediaType: im.Descriptor.MediaType, Digest: im.Descriptor.Digest, Size: im.Descriptor.Size, Platform: im.Descriptor.Platform,
		Annotations: im.Descriptor.Annotations,
	}
	if len(im.Refs) == 0 {
		return []ocispec.Descriptor{d}, nil
	}
	var ds []ocispec.Descriptor
	for _, ref := range im.Refs {
		named, err := reference.ParseDockerRef(ref)
		if err != nil {
			return nil, diag.New(diag.ExitUsage, "image name %q: %w", clip(ref), err)
		}
		d.Annotations = map[string]string{annotationImageName: named.String()}
		maps.Copy(d.Annotations, im.Descriptor.Annotations)
		if t, ok := named.(reference.Tagged); ok {
			d.Annotations[ocispec.AnnotationRefName] = t.Tag()
		}
		ds = append(ds, d)
	}
	return ds, nil
}

// image adds a manifest or index with everything below it.
func (s *saving) image(ctx context.Context, d ocispec.Descriptor, f Fetcher, depth int) error {
	raw, err := s.st.ReadBlob(d.Digest, MaxManifest)
	if err != nil {
		return err
	}
	s.blobs[d.Digest] = int64(len(raw))
	mt, err := DocumentType(raw, d.MediaType)
	if err != nil || IsManifest(mt) {
		return s.manifest(ctx, raw, f)
	}
	idx, err := ParseIndex(raw, d.MediaType)
	if err != nil {
		return err
	}
	if depth >= maxNested {
		return fmt.Errorf("more than %d indexes inside each other", maxNested)
	}
	n := 0
	for _, c := range idx.Manifests {
		// Other platforms' images need not have been pulled.
		if _, err := s.st.StatBlob(c.Digest); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := s.image(ctx, c, f, depth+1); err != nil {
			return err
		}
		n++
	}
	if n == 0 {
		return errors.New("the store has none of its platforms")
	}
	return nil
}

// manifest adds the parts of an image, or of an attestation.
func (s *saving) manifest(ctx context.Context, raw []byte, f Fetcher) error {
	from := origins(s.st, digest.FromBytes(raw))
	for _, d := range partsOf(raw) {
		if err := checkDescriptor("manifest", d); err != nil {
			return err
		}
		if IsForeign(d.MediaType) && !hasBlob(s.st, d) {
			continue
		}
		if err := Fetch(ctx, s.st, Layer{Blob: d, Origin: from[d.Digest]}, f); err != nil {
			return err
		}
		s.blobs[d.Digest] = d.Size
	}
	return nil
}

// dockerEntry is an image's entry in manifest.json.
func dockerEntry(ctx context.Context, st *store.Store, im ToSave, platform ocispec.Platform) (map[string]any, error) {
	img, err := Resolve(ctx, InStore(st), im.Descriptor, platform)
	if err != nil {
		return nil, err
	}
	tags, layers := []string{}, []string{}
	for _, ref := range im.Refs {
		named, err := reference.ParseDockerRef(ref)
		if err != nil {
			return nil, err
		}
		if _, ok := named.(reference.Tagged); ok {
			tags = append(tags, reference.FamiliarString(named))
		}
	}
	for _, l := range img.Layers {
		layers = append(layers, blobName(l.Blob.Digest))
	}
	return map[string]any{"Config": blobName(img.ID()), "RepoTags": tags, "Layers": layers}, nil
}

// names lists everything in a fixed order, directories first.
func (s *saving) names() []string {
	dirs := map[string]bool{ocispec.ImageBlobsDir + "/": true}
	var names []string
	for d := range s.blobs {
		dirs[ocispec.ImageBlobsDir+"/"+string(d.Algorithm())+"/"] = true
		names = append(names, blobName(d))
	}
	for n := range s.texts {
		names = append(names, n)
	}
	for d := range dirs {
		names = append(names, d)
	}
	sort.Strings(names)
	return names
}

func (s *saving) writeTar(ctx context.Context, tw *tar.Writer) error {
	for _, name := range s.names() {
		h := &tar.Header{Name: name, Mode: 0o644, ModTime: time.Unix(0, 0), Format: tar.FormatPAX}
		if strings.HasSuffix(name, "/") {
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
			if err := tw.WriteHeader(h); err != nil {
				return err
			}
			continue
		}
		h.Typeflag = tar.TypeReg
		r, size, err := s.open(ctx, name)
		if err != nil {
			return err
		}
		h.Size = size
		err = tw.WriteHeader(h)
		if err == nil {
			_, err = io.Copy(tw, r)
		}
		r.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func (s *saving) open(ctx context.Context, name string) (io.ReadCloser, int64, error) {
	if b, ok := s.texts[name]; ok {
		return io.NopCloser(strings.NewReader(string(b))), int64(len(b)), nil
	}
	d := namedDigest(name)
	r, err := s.st.OpenBlob(d)
	if err != nil {
		return nil, 0, err
	}
	return struct {
		io.Reader
		io.Closer
	}{ctxReader{ctx, r}, r}, s.blobs[d], nil
}

// SaveLayout writes images as an OCI layout into a directory, which is made if
// there is none. Images of another name that a layout there has stay.
func SaveLayout(ctx context.Context, st *store.Store, dir string, images []ToSave, opt SaveOptions) error {
	opt.Docker = false
	s, err := gather(ctx, st, images, opt)
	if err != nil {
		return fmt.Errorf("save images: %w", err)
	}
	if err := s.mergeIndex(dir); err != nil {
		return fmt.Errorf("save images: %w", err)
	}
	names := s.names()
	// The index last: what it names must be there.
	sort.SliceStable(names, func(i, j int) bool {
		return names[i] != ocispec.ImageIndexFile && names[j] == ocispec.ImageIndexFile
	})
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("save images: %w", err)
	}
	for _, name := range names {
		if err := s.writeFile(ctx, dir, name); err != nil {
			return fmt.Errorf("save images: %w", err)
		}
	}
	return nil
}

// mergeIndex keeps the entries of an index.json that is there.
func (s *saving) mergeIndex(dir string) error {
	if _, err := os.Lstat(filepath.Join(dir, ocispec.ImageIndexFile)); errors.Is(err, fs.ErrNotExist) {
		es, err := os.ReadDir(dir)
		if err == nil && len(es) > 0 {
			return diag.New(diag.ExitUsage, "directory %q has other files in it and is not an OCI layout", dir).
				WithHint("Choose an empty or new directory.")
		}
		return nil
	}
	old, err := OpenLayout(dir)
	if err != nil {
		return err
	}
	mine := map[string]bool{}
	for _, m := range s.index.Manifests {
		mine[entryKey(m)] = true
	}
	idx := *old.index
	idx.Manifests = nil
	for _, m := range old.index.Manifests {
		if !mine[entryKey(m)] {
			idx.Manifests = append(idx.Manifests, m)
		}
	}
	idx.Manifests = append(idx.Manifests, s.index.Manifests...)
	s.texts[ocispec.ImageIndexFile], err = indexBytes(idx)
	return err
}

// entryKey is what only one entry of an index has.
func entryKey(d ocispec.Descriptor) string {
	if n := d.Annotations[annotationImageName]; n != "" {
		return n
	}
	if n := d.Annotations[ocispec.AnnotationRefName]; n != "" {
		return n
	}
	return string(d.Digest)
}

func (s *saving) writeFile(ctx context.Context, dir, name string) error {
	p := filepath.Join(dir, filepath.FromSlash(name))
	if strings.HasSuffix(name, "/") {
		return os.MkdirAll(p, 0o755)
	}
	r, size, err := s.open(ctx, name)
	if err != nil {
		return err
	}
	defer r.Close()
	if fi, err := os.Lstat(p); err == nil && fi.Mode().IsRegular() && fi.Size() == size && strings.HasPrefix(name, ocispec.ImageBlobsDir) {
		return nil
	}
	f, err := os.CreateTemp(filepath.Dir(p), ".kiln-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // nothing after the rename
	defer f.Close()
	if _, err := io.Copy(f, r); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), p)
}
