package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/platforms"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// annotationImageName is where docker and containerd write an image's whole
// name; OCI's own annotation is mostly a tag alone.
const annotationImageName = "io.containerd.image.name"

// Layout is an OCI image layout in a directory, read-only. What is read from
// it is verified.
type Layout struct {
	dir   string
	index *ocispec.Index
}

// OpenLayout opens the OCI image layout in a directory.
func OpenLayout(dir string) (*Layout, error) {
	fail := func(err error) (*Layout, error) {
		return nil, diag.New(diag.ExitUsage, "open OCI layout %q: %w", dir, err).
			WithHint("A layout is a directory with the files oci-layout and index.json, and the directory blobs.")
	}
	l := &Layout{dir: dir}
	b, err := l.readFile(ocispec.ImageLayoutFile)
	if err != nil {
		return fail(err)
	}
	if err := checkLayoutFile(b); err != nil {
		return fail(err)
	}
	if b, err = l.readFile(ocispec.ImageIndexFile); err != nil {
		return fail(err)
	}
	if l.index, err = ParseIndex(b, ocispec.MediaTypeImageIndex); err != nil {
		return fail(err)
	}
	return l, nil
}

// LayoutBlobs fetches layers from the OCI image layout in a directory, whatever its
// index says.
func LayoutBlobs(dir string) Fetcher { return &Layout{dir: dir} }

func checkLayoutFile(b []byte) error {
	var v ocispec.ImageLayout
	if err := json.Unmarshal(b, &v); err != nil {
		return fmt.Errorf("%s is not valid: %w", ocispec.ImageLayoutFile, err)
	}
	if !strings.HasPrefix(v.Version, "1.") {
		return fmt.Errorf("the layout has version %q, and 1.0.0 is known", clip(v.Version))
	}
	return nil
}

func (l *Layout) open(name string) (*os.File, error) {
	// The directory may be anyone's: no waiting for the writer of a pipe.
	f, err := os.OpenFile(filepath.Join(l.dir, filepath.FromSlash(name)), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%q is not a regular file", name)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (l *Layout) readFile(name string) ([]byte, error) {
	f, err := l.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readBounded(f, MaxConfig, name)
}

func readBounded(r io.Reader, most int64, name string) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, most+1))
	if err != nil {
		return nil, fmt.Errorf("read %q: %w", name, err)
	}
	if int64(len(b)) > most {
		return nil, fmt.Errorf("%q has more than %d bytes", name, most)
	}
	return b, nil
}

func blobName(d digest.Digest) string {
	return ocispec.ImageBlobsDir + "/" + string(d.Algorithm()) + "/" + d.Encoded()
}

func (l *Layout) document(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
	if err := checkDigest(d.Digest); err != nil {
		return nil, err
	}
	return l.readFile(blobName(d.Digest))
}

// Resolve returns an image of the layout. tagOrDigest may be a tag (or the whole
// name of an image), a digest ("sha256:…"), or empty for "latest" or whatever is
// the only thing there.
func (l *Layout) Resolve(ctx context.Context, tagOrDigest string, platform ocispec.Platform) (*Image, error) {
	root, err := l.find(ctx, tagOrDigest, platform)
	if err != nil {
		return nil, err
	}
	img, err := Resolve(ctx, l.document, root, platform)
	if err != nil {
		return nil, fmt.Errorf("OCI layout %q: %w", l.dir, err)
	}
	img.Ref = root.Annotations[ocispec.AnnotationRefName]
	return img, nil
}

func (l *Layout) find(ctx context.Context, want string, platform ocispec.Platform) (ocispec.Descriptor, error) {
	ms := l.index.Manifests
	if d := digest.Digest(want); d.Validate() == nil {
		for _, m := range ms {
			if m.Digest == d {
				return m, nil
			}
		}
		// Also what is only in an index of the layout.
		b, err := l.document(ctx, ocispec.Descriptor{Digest: d})
		if err != nil {
			return ocispec.Descriptor{}, diag.New(diag.ExitUsage, "OCI layout %q: %w", l.dir, err)
		}
		return ocispec.Descriptor{Digest: d, Size: int64(len(b))}, nil
	}
	named := l.named(want)
	if want == "" {
		if named = l.named("latest"); len(named) == 0 {
			named = ms
		}
	}
	switch {
	case len(named) == 1:
		return named[0], nil
	case len(named) > 1:
		// One image for several platforms may also be written so.
		if d, ok := onePerPlatform(named, platform); ok {
			return d, nil
		}
		return ocispec.Descriptor{}, diag.New(diag.ExitUsage, "OCI layout %q: several images fit %q", l.dir, clip(want)).
			WithHint("Say which one, by tag or digest: %s.", l.names())
	}
	return ocispec.Descriptor{}, diag.New(diag.ExitUsage, "OCI layout %q: there is no image %q", l.dir, clip(want)).
		WithHint("There is: %s.", l.names())
}

// named returns the entries of the index with that tag or name.
func (l *Layout) named(want string) (ms []ocispec.Descriptor) {
	for _, m := range l.index.Manifests {
		full := m.Annotations[annotationImageName]
		if want != "" && (m.Annotations[ocispec.AnnotationRefName] == want || full == want || strings.HasSuffix(full, ":"+want)) {
			ms = append(ms, m)
		}
	}
	return ms
}

func onePerPlatform(ms []ocispec.Descriptor, platform ocispec.Platform) (ocispec.Descriptor, bool) {
	if platform.OS == "" {
		platform = platforms.DefaultSpec()
	}
	seen := map[string]bool{}
	for _, m := range ms {
		if isAttestation(m) {
			continue
		}
		if m.Platform == nil || seen[platforms.FormatAll(*m.Platform)] {
			return ocispec.Descriptor{}, false
		}
		seen[platforms.FormatAll(*m.Platform)] = true
	}
	r := resolver{match: platforms.Only(platform)}
	fit := r.choose(ms)
	if len(fit) == 0 {
		return ocispec.Descriptor{}, false
	}
	return fit[0], true
}

func (l *Layout) names() string {
	var names []string
	for _, m := range l.index.Manifests {
		n := m.Annotations[annotationImageName]
		if n == "" {
			n = m.Annotations[ocispec.AnnotationRefName]
		}
		if n == "" {
			n = string(m.Digest)
		}
		if names = append(names, clip(n)); len(names) == 20 {
			break
		}
	}
	if len(names) == 0 {
		return "nothing"
	}
	return strings.Join(names, ", ")
}

var _ Fetcher = (*Layout)(nil)

// Fetch implements Fetcher.
func (l *Layout) Fetch(_ context.Context, layer Layer) (io.ReadCloser, error) {
	if err := checkDigest(layer.Blob.Digest); err != nil {
		return nil, err
	}
	f, err := l.open(blobName(layer.Blob.Digest))
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("it is not in the OCI layout %q: %w", l.dir, fs.ErrNotExist)
	}
	if err != nil {
		return nil, err
	}
	return Verified(f, layer.Blob), nil
}

// Verified returns a reader that gives an error before its io.EOF unless what r gives has the
// size and digest of want. Its Close closes r.
func Verified(r io.ReadCloser, want ocispec.Descriptor) io.ReadCloser {
	return &verified{r: r, want: want, digester: want.Digest.Algorithm().Digester()}
}

type verified struct {
	r        io.ReadCloser
	want     ocispec.Descriptor
	digester digest.Digester
	n        int64
}

func (v *verified) Read(p []byte) (int, error) {
	n, err := v.r.Read(p)
	v.digester.Hash().Write(p[:n])
	v.n += int64(n)
	switch {
	case v.n > v.want.Size, err == io.EOF && v.n < v.want.Size:
		return 0, fmt.Errorf("blob %s: its size is not the %d bytes that were announced", v.want.Digest, v.want.Size)
	case err == io.EOF && v.digester.Digest() != v.want.Digest:
		return 0, fmt.Errorf("blob %s: its content has the digest %s", v.want.Digest, v.digester.Digest())
	}
	return n, err
}

func (v *verified) Close() error { return v.r.Close() }

// indexBytes writes an index.json.
func indexBytes(idx ocispec.Index) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(idx); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
