package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/distribution/reference"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Loaded is an image that Load has put into the store and tagged.
type Loaded struct {
	Ref    string        // its normalised name; empty: it had none, and is kept under Digest
	Digest digest.Digest // of its manifest or index
	ID     digest.Digest // of its config, as docker's image ID; of an index's first image
}

// Bounds of an archive, besides those of its layers.
const (
	maxArchiveEntries = 200_000
	maxArchiveName    = 4 << 10
	maxArchiveText    = 8 << 20
)

// Load reads an archive of images, compressed or not, as "docker save", podman,
// buildah, skopeo, crane and BuildKit write them (docker's own format or
// OCI's), in one pass. Nothing in it is written under a name of its own.
//
// What the archive says about its layers' content is verified when they are
// unpacked; here, that all there should be is there. The caller holds a Use.
func Load(ctx context.Context, st *store.Store, r io.Reader) ([]Loaded, error) {
	loaded, err := load(ctx, st, r)
	if err != nil {
		return nil, loadError(err)
	}
	return loaded, nil
}

func loadError(err error) error {
	var d *diag.Error
	if errors.As(err, &d) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("load images: %w", err)
	}
	return diag.New(diag.ExitFailure, "load images: %w", err).
		WithHint("An archive as \"docker save\" writes it, an OCI archive or an OCI layout is wanted.")
}

func load(ctx context.Context, st *store.Store, r io.Reader) ([]Loaded, error) {
	plain, err := layer.Decompress(ctxReader{ctx, r})
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	a := &archive{st: st, files: map[string]archived{}, links: map[string]string{}, texts: map[string][]byte{}}
	if err := a.read(plain); err != nil {
		return nil, err
	}
	im := &importer{st: st, blob: a.blob}
	switch {
	case a.texts[ocispec.ImageIndexFile] != nil && a.texts[ocispec.ImageLayoutFile] != nil:
		return im.layout(ctx, a.texts[ocispec.ImageLayoutFile], a.texts[ocispec.ImageIndexFile])
	case a.texts[dockerManifestFile] != nil:
		return a.docker()
	}
	return nil, errors.New("the archive has neither index.json with oci-layout nor manifest.json")
}

// LoadPath is Load for a file, or a directory with an OCI layout.
func LoadPath(ctx context.Context, st *store.Store, p string) ([]Loaded, error) {
	fi, err := os.Stat(p)
	if err != nil {
		return nil, diag.New(diag.ExitUsage, "load images: %w", err)
	}
	if !fi.IsDir() {
		f, err := os.Open(p)
		if err != nil {
			return nil, diag.New(diag.ExitUsage, "load images: %w", err)
		}
		defer f.Close()
		return Load(ctx, st, f)
	}
	l, err := OpenLayout(p)
	if err != nil {
		return nil, err
	}
	im := &importer{st: st, blob: func(ctx context.Context, d ocispec.Descriptor) error {
		return Fetch(ctx, st, Layer{Blob: d}, l)
	}}
	loaded, err := im.index(ctx, l.index)
	if err != nil {
		return nil, loadError(err)
	}
	return loaded, nil
}

// archived is one file of an archive, kept in the store by its content.
type archived struct {
	digest digest.Digest
	size   int64
}

type archive struct {
	st    *store.Store
	files map[string]archived
	links map[string]string // both kinds; to a cleaned name
	texts map[string][]byte // the few files that say what the others are
	total int64
}

// cleanName is a name within the archive, whatever it looks like.
func cleanName(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

func (a *archive) read(r io.Reader) error {
	tr := tar.NewReader(r)
	for n := 0; ; n++ {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		if n >= maxArchiveEntries || len(h.Name) > maxArchiveName || len(h.Linkname) > maxArchiveName {
			return fmt.Errorf("read archive: more than %d entries, or a name of more than %d bytes", maxArchiveEntries, maxArchiveName)
		}
		if err := a.entry(h, tr); err != nil {
			return fmt.Errorf("read archive: %q: %w", clip(h.Name), err)
		}
	}
	// The rest, so that whoever writes into our pipe gets to its end.
	_, err := io.Copy(io.Discard, io.LimitReader(r, 1<<20))
	return err
}

func (a *archive) entry(h *tar.Header, r io.Reader) error {
	name := cleanName(h.Name)
	switch h.Typeflag {
	case tar.TypeReg:
	case tar.TypeSymlink:
		a.links[name] = cleanName(path.Join(path.Dir(name), h.Linkname))
		return nil
	case tar.TypeLink:
		a.links[name] = cleanName(h.Linkname)
		return nil
	case tar.TypeDir, tar.TypeXGlobalHeader:
		return nil
	default:
		return fmt.Errorf("files of type %q do not belong into an archive of images", h.Typeflag)
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			// A few bytes could claim to be any size.
			return errors.New("sparse files do not belong into an archive of images")
		}
	}
	switch name {
	case dockerManifestFile, ocispec.ImageIndexFile, ocispec.ImageLayoutFile:
		b, err := readBounded(r, maxArchiveText, name)
		a.texts[name] = b
		return err
	}
	return a.file(name, h.Size, r)
}

// file puts a file into the store. What is not known yet is whether anything
// needs it; what is not needed goes with the next prune.
func (a *archive) file(name string, size int64, r io.Reader) error {
	most := layer.DefaultLimits().MaxBytes
	if a.total += size; size > most || a.total > 4*most {
		return diag.New(diag.ExitFailure, "it claims %d bytes: one file may have %d, and an archive %d", size, most, 4*most)
	}
	w, err := a.st.NewBlob()
	if err != nil {
		return err
	}
	defer w.Close()
	if _, err := io.Copy(w, r); err != nil {
		return err
	}
	d, err := w.Commit(namedDigest(name))
	if err != nil {
		return err
	}
	delete(a.links, name)
	a.files[name] = archived{d, w.Size()}
	return nil
}

// namedDigest is the digest that a blob's name promises, or "".
func namedDigest(name string) digest.Digest {
	algo, hex, ok := strings.Cut(strings.TrimPrefix(name, ocispec.ImageBlobsDir+"/"), "/")
	if !ok || !strings.HasPrefix(name, ocispec.ImageBlobsDir+"/") {
		return ""
	}
	d := digest.NewDigestFromEncoded(digest.Algorithm(algo), hex)
	if d.Validate() != nil {
		return ""
	}
	return d
}

// find follows links within the archive.
func (a *archive) find(name string) (archived, error) {
	at := cleanName(name)
	for range 16 {
		if f, ok := a.files[at]; ok {
			return f, nil
		}
		to, ok := a.links[at]
		if !ok {
			return archived{}, fmt.Errorf("%q is not in the archive", clip(name))
		}
		at = to
	}
	return archived{}, fmt.Errorf("%q: too many links", clip(name))
}

// blob makes sure that the store has what d describes: everything in the
// archive is there.
func (a *archive) blob(_ context.Context, d ocispec.Descriptor) error {
	n, err := a.st.StatBlob(d.Digest)
	if err != nil {
		return fmt.Errorf("%s is not in the archive: %w", d.Digest, err)
	}
	if n != d.Size {
		return fmt.Errorf("%s has %d bytes in the archive, and %d are announced", d.Digest, n, d.Size)
	}
	return nil
}

// importer puts the images of an OCI index into the store.
type importer struct {
	st *store.Store
	// blob makes sure that the store has a blob.
	blob func(ctx context.Context, d ocispec.Descriptor) error
}

func (im *importer) layout(ctx context.Context, layout, index []byte) ([]Loaded, error) {
	if err := checkLayoutFile(layout); err != nil {
		return nil, err
	}
	idx, err := ParseIndex(index, ocispec.MediaTypeImageIndex)
	if err != nil {
		return nil, err
	}
	return im.index(ctx, idx)
}

func (im *importer) index(ctx context.Context, idx *ocispec.Index) ([]Loaded, error) {
	var loaded []Loaded
	var descs []ocispec.Descriptor
	for _, d := range idx.Manifests {
		if isAttestation(d) {
			continue
		}
		id, err := im.image(ctx, d, 0)
		if err != nil {
			return nil, err
		}
		ref, err := refOf(d.Annotations)
		if err != nil {
			return nil, err
		}
		loaded = append(loaded, Loaded{Ref: ref, Digest: d.Digest, ID: id})
		descs = append(descs, d)
	}
	if len(loaded) == 0 {
		return nil, errors.New("there is no image in it")
	}
	// All or nothing: names come last.
	for i, l := range loaded {
		if err := im.tag(l, descs[i]); err != nil {
			return nil, err
		}
	}
	return loaded, nil
}

func (im *importer) tag(l Loaded, d ocispec.Descriptor) error {
	keep := ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size, Platform: d.Platform}
	if l.Ref == "" {
		return Tag(im.st, keep)
	}
	return im.st.SetTag(l.Ref, keep)
}

// image brings one image, or an index with as many of its images as there are
// (docker save --platform leaves the others out), into the store, and returns
// an image ID.
func (im *importer) image(ctx context.Context, d ocispec.Descriptor, depth int) (digest.Digest, error) {
	if depth > maxNested {
		return "", fmt.Errorf("more than %d indexes inside each other", maxNested)
	}
	if d.Size > MaxManifest {
		return "", fmt.Errorf("manifest %s has %d bytes, more than %d", d.Digest, d.Size, MaxManifest)
	}
	if err := im.blob(ctx, d); err != nil {
		return "", fmt.Errorf("manifest: %w", err)
	}
	raw, err := im.st.ReadBlob(d.Digest, MaxManifest)
	if err != nil {
		return "", err
	}
	mt, err := DocumentType(raw, d.MediaType)
	if err != nil {
		return "", err
	}
	if IsManifest(mt) {
		return im.manifest(ctx, d, raw)
	}
	idx, err := ParseIndex(raw, d.MediaType)
	if err != nil {
		return "", err
	}
	return im.nested(ctx, idx, depth)
}

func (im *importer) nested(ctx context.Context, idx *ocispec.Index, depth int) (id digest.Digest, err error) {
	failed := errors.New("an index in it is empty")
	for _, d := range idx.Manifests {
		if isAttestation(d) {
			// Nothing needs it: bring it along if it is there.
			if im.blob(ctx, d) == nil {
				im.attestation(ctx, d)
			}
			continue
		}
		got, err := im.image(ctx, d, depth+1)
		switch {
		case err != nil && id == "":
			failed = err
		case err == nil && id == "":
			id = got
		}
	}
	if id == "" {
		return "", failed
	}
	return id, nil
}

// attestation brings what an attestation's manifest names.
func (im *importer) attestation(ctx context.Context, d ocispec.Descriptor) {
	raw, err := im.st.ReadBlob(d.Digest, MaxManifest)
	if err != nil {
		return
	}
	for _, part := range partsOf(raw) {
		_ = im.blob(ctx, part)
	}
}

func (im *importer) manifest(ctx context.Context, d ocispec.Descriptor, raw []byte) (digest.Digest, error) {
	m, err := ParseManifest(raw, d.MediaType)
	if err != nil {
		return "", err
	}
	if err := im.blob(ctx, m.Config); err != nil {
		return "", fmt.Errorf("config: %w", err)
	}
	config, err := im.st.ReadBlob(m.Config.Digest, MaxConfig)
	if err != nil {
		return "", err
	}
	img, err := New(d, raw, config, "")
	if err != nil {
		return "", err
	}
	for i, l := range img.Layers {
		if err := im.blob(ctx, l.Blob); err != nil && !IsForeign(l.Blob.MediaType) {
			return "", fmt.Errorf("layer %d: %w", i+1, err)
		}
	}
	return img.ID(), nil
}

// refOf is the name that an entry of a layout's index gives to its image, or "".
func refOf(annotations map[string]string) (string, error) {
	if full := annotations[annotationImageName]; full != "" {
		return Normalize(full)
	}
	name := annotations[ocispec.AnnotationRefName]
	if !strings.ContainsAny(name, ":/") {
		return "", nil // a tag, and nobody says of what
	}
	named, err := reference.ParseDockerRef(name)
	if err != nil {
		return "", nil //nolint:nilerr // the annotation may be anything; then it is not a name
	}
	return named.String(), nil
}
