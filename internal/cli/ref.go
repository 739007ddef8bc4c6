package cli

import (
	"errors"
	"io/fs"
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
	// Tags are all names of it, or of the index that it was found in.
	Tags []store.Tag
}

// find looks for an image by its name, its digest, or the beginning of its ID
// as 'kiln images' shows it.
func find(st *store.Store, name string) (*stored, error) {
	found, err := image.Find(st, name)
	if notFound(err) {
		ref, refErr := registry.NormalizeRef(name)
		if refErr != nil {
			return nil, refErr
		}
		return nil, diag.New(diag.ExitFailure, "no such image in the store: %q", name).
			WithHint("'kiln images' lists the images, 'kiln pull %s' gets one from a registry.", familiar(ref))
	}
	if err != nil {
		return nil, err
	}
	tags, err := st.Tags()
	if err != nil {
		return nil, err
	}
	s := &stored{store: st, Desc: found.Descriptor}
	for _, t := range tags {
		if t.Descriptor.Digest == found.Tagged.Digest {
			s.Tags = append(s.Tags, t)
		}
	}
	return s, nil
}

// notFound reports whether an error says that something is not in the store.
func notFound(err error) bool { return errors.Is(err, fs.ErrNotExist) }
