package cli

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// nameless reports whether a tag of the store is the digest under which an image
// without a name is kept.
func nameless(ref string) bool { return digest.Digest(ref).Validate() == nil }

// familiar is the short form of a normalised name: "debian:latest".
func familiar(ref string) string {
	if nameless(ref) {
		return ref
	}
	n, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return ref
	}
	return reference.FamiliarString(n)
}

// splitRef is repository and tag of a normalised name, as tables show them.
func splitRef(ref string) (repository, tag string) {
	if nameless(ref) {
		return "<none>", "<none>"
	}
	n, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return ref, "<none>"
	}
	tag = "<none>"
	if t, ok := n.(reference.Tagged); ok {
		tag = t.Tag()
	}
	return reference.FamiliarName(n), tag
}

// taggable normalises a name that an image is to be given: one without a digest.
func taggable(name string) (string, error) {
	ref, err := registry.NormalizeRef(name)
	if err != nil {
		return "", err
	}
	if strings.Contains(ref, "@") {
		return "", diag.New(diag.ExitUsage, "image name %q: a digest cannot be given to an image", name).
			WithHint("Leave out what begins with '@'.")
	}
	return ref, nil
}

// stored is an image that was found in the store.
type stored struct {
	store *store.Store
	// Desc is what was named: an index or a manifest.
	Desc ocispec.Descriptor
	// Tags are all names of it.
	Tags []store.Tag
}

// documents reads manifests and configs from the store.
func documents(st *store.Store) image.Documents {
	return func(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
		return st.ReadBlob(d.Digest, max(image.MaxConfig, image.MaxManifest))
	}
}

// find looks for an image by its name, its digest, or the beginning of its ID
// as 'kiln images' shows it.
func find(ctx context.Context, st *store.Store, name string) (*stored, error) {
	tags, err := st.Tags()
	if err != nil {
		return nil, err
	}
	ref, refErr := registry.NormalizeRef(name)
	if refErr == nil {
		if s := findRef(st, tags, ref); s != nil {
			return s, nil
		}
	}
	if s, err := findID(ctx, st, tags, name); s != nil || err != nil {
		return s, err
	}
	if refErr != nil {
		return nil, refErr
	}
	return nil, diag.New(diag.ExitFailure, "no such image in the store: %q", name).
		WithHint("'kiln images' lists the images, 'kiln pull %s' gets one from a registry.", familiar(ref))
}

func findRef(st *store.Store, tags []store.Tag, ref string) *stored {
	repository, dgst, hasDigest := strings.Cut(ref, "@")
	for _, t := range tags {
		if hasDigest {
			// The tag beside a digest says nothing that the digest does not.
			r, _ := splitRef(repository)
			have, _ := splitRef(t.Ref)
			if have == r && t.Descriptor.Digest.String() == dgst {
				return newStored(st, tags, t.Descriptor)
			}
			continue
		}
		if t.Ref == ref {
			return newStored(st, tags, t.Descriptor)
		}
	}
	return nil
}

func newStored(st *store.Store, tags []store.Tag, d ocispec.Descriptor) *stored {
	s := &stored{store: st, Desc: d}
	for _, t := range tags {
		if t.Descriptor.Digest == d.Digest {
			s.Tags = append(s.Tags, t)
		}
	}
	return s
}

// findID looks for an image by the beginning of its ID or digest; nil if there
// is none.
func findID(ctx context.Context, st *store.Store, tags []store.Tag, name string) (*stored, error) {
	hex := strings.TrimPrefix(name, "sha256:")
	if len(hex) < 4 || strings.Trim(hex, "0123456789abcdef") != "" {
		return nil, nil
	}
	var found []ocispec.Descriptor
	for _, t := range tags {
		ids := []digest.Digest{t.Descriptor.Digest}
		if img, err := image.Resolve(ctx, documents(st), t.Descriptor, ocispec.Platform{}); err == nil {
			ids = append(ids, img.ID())
		}
		match := slices.ContainsFunc(ids, func(d digest.Digest) bool { return strings.HasPrefix(d.Encoded(), hex) })
		same := slices.ContainsFunc(found, func(d ocispec.Descriptor) bool { return d.Digest == t.Descriptor.Digest })
		if match && !same {
			found = append(found, t.Descriptor)
		}
	}
	switch len(found) {
	case 0:
		return nil, nil
	case 1:
		return newStored(st, tags, found[0]), nil
	}
	return nil, diag.New(diag.ExitUsage, "%q could mean %d images", name, len(found)).WithHint("Give more of the ID.")
}

// notFound reports whether an error says that something is not in the store.
func notFound(err error) bool { return errors.Is(err, fs.ErrNotExist) }
