package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"sort"
	"strings"

	"github.com/distribution/reference"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// kindOrigins are the records that note where the layers of an image came
// from, by the digest of its manifest. Layers that were never needed here are
// fetched from there when they are.
const kindOrigins = store.LinkKind + "image-origins"

// Keep stores what describes an image, so that it can be tagged with the
// descriptor it returns. The layers are the caller's business: Unpack, Fetch.
func Keep(st *store.Store, img *Image) (ocispec.Descriptor, error) {
	for _, b := range [][]byte{img.RawConfig, img.RawManifest} {
		if _, err := st.PutBlob(b); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	origins := map[digest.Digest]string{}
	for _, l := range img.Layers {
		if l.Origin != "" {
			origins[l.Blob.Digest] = l.Origin
		}
	}
	d := ocispec.Descriptor{
		MediaType: img.Manifest.MediaType, Digest: digest.FromBytes(img.RawManifest), Size: int64(len(img.RawManifest)),
		Platform: img.Manifest.Platform,
	}
	if len(origins) == 0 {
		return d, nil
	}
	b, err := json.Marshal(origins)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return d, st.PutRecord(kindOrigins, string(d.Digest), b)
}

func origins(st *store.Store, manifest digest.Digest) map[digest.Digest]string {
	b, err := st.GetRecord(kindOrigins, string(manifest))
	if err != nil {
		return nil
	}
	var m map[digest.Digest]string
	if json.Unmarshal(b, &m) != nil {
		return nil
	}
	return m
}

// Tag keeps an image under names, as they are normalised, and under its
// digest if there are none. So it is found by FromStore and spared by a prune.
func Tag(st *store.Store, d ocispec.Descriptor, refs ...string) error {
	if len(refs) == 0 {
		return st.SetTag(string(d.Digest), d)
	}
	for _, ref := range refs {
		name, err := Normalize(ref)
		if err != nil {
			return err
		}
		if err := st.SetTag(name, d); err != nil {
			return err
		}
	}
	return nil
}

// Normalize writes an image's name out: "debian" is "docker.io/library/debian:latest".
func Normalize(ref string) (string, error) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return "", diag.New(diag.ExitUsage, "image name %q: %w", clip(ref), err)
	}
	return named.String(), nil
}

// InStore gives the documents that a store has.
func InStore(st *store.Store) Documents {
	return func(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
		return st.ReadBlob(d.Digest, max(MaxConfig, MaxManifest))
	}
}

// FromStore returns an image that the local store has, by name, by digest (the
// index's, manifest's or config's) or by the beginning of one, as docker does;
// fs.ErrNotExist if there is none. Its layers need not be there: Unpack finds
// out, and their Origin says where they can be fetched if that is known.
func FromStore(st *store.Store, ref string, platform ocispec.Platform) (*Image, error) {
	found, err := Find(st, ref)
	if err != nil {
		return nil, err
	}
	img, err := Resolve(context.Background(), InStore(st), found.Descriptor, platform)
	if err != nil {
		return nil, fmt.Errorf("image %q in the local store: %w", clip(ref), err)
	}
	img.Ref = found.Ref
	from := origins(st, img.Manifest.Digest)
	for i, l := range img.Layers {
		img.Layers[i].Origin = from[l.Blob.Digest]
	}
	return img, nil
}

// Found is what a reference means in the store.
type Found struct {
	// Ref is a tag of the store: the reference written out, or, if an ID was
	// given, a tag of the image; the ID itself if there is none.
	Ref string
	// Tagged is what Ref names, and Descriptor what was asked for: the same, or an
	// image of the index that Tagged is.
	Tagged, Descriptor ocispec.Descriptor
}

// Find finds a name, digest or beginning of one, as FromStore does.
func Find(st *store.Store, ref string) (*Found, error) {
	name := ref
	if named, err := reference.ParseDockerRef(ref); err == nil {
		name = named.String()
	}
	for _, n := range []string{name, ref} {
		if n == "" || len(n) > store.MaxKey {
			continue
		}
		d, err := st.Tag(n)
		if err == nil {
			return &Found{n, d, d}, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	id, exact := wantedID(ref)
	if id == "" {
		return nil, fmt.Errorf("image %q: not in the local store: %w", clip(ref), fs.ErrNotExist)
	}
	return findID(st, ref, id, exact)
}

var idPattern = regexp.MustCompile(`^(sha256:)?([0-9a-f]{4,64})$`)

// wantedID returns the digest, or the beginning of one, that ref may be.
func wantedID(ref string) (id string, exact bool) {
	if i := strings.LastIndexByte(ref, '@'); i >= 0 {
		d := digest.Digest(ref[i+1:])
		if d.Validate() != nil {
			return "", false
		}
		return string(d), true
	}
	if m := idPattern.FindStringSubmatch(ref); m != nil {
		return "sha256:" + m[2], len(m[2]) == 64
	}
	return "", false
}

// candidate is a digest by which a tagged image can be called.
type candidate struct {
	id string
	Found
}

func findID(st *store.Store, ref, id string, exact bool) (*Found, error) {
	all, err := candidates(st)
	if err != nil {
		return nil, err
	}
	found := map[digest.Digest]candidate{}
	for _, c := range all {
		if c.id == id || !exact && strings.HasPrefix(c.id, id) {
			if _, dup := found[c.Descriptor.Digest]; !dup {
				found[c.Descriptor.Digest] = c
			}
		}
	}
	if len(found) > 1 {
		var ids []string
		for _, c := range found {
			ids = append(ids, c.id)
		}
		sort.Strings(ids)
		// One image may be called by itself and by the index that it is in.
		if ids[0] != ids[len(ids)-1] {
			return nil, diag.New(diag.ExitUsage, "image %q: several images in the local store begin so: %s", clip(ref), strings.Join(ids, ", "))
		}
	}
	for _, c := range found {
		return &c.Found, nil
	}
	if exact {
		// Not tagged, but there as long as nobody prunes.
		if b, err := st.ReadBlob(digest.Digest(id), MaxManifest); err == nil {
			if mt, err := DocumentType(b, ""); err == nil {
				d := ocispec.Descriptor{MediaType: mt, Digest: digest.Digest(id), Size: int64(len(b))}
				return &Found{ref, d, d}, nil
			}
		}
	}
	return nil, fmt.Errorf("image %q: not in the local store: %w", clip(ref), fs.ErrNotExist)
}

// candidates lists all digests by which tagged images can be called.
func candidates(st *store.Store) ([]candidate, error) {
	tags, err := st.Tags()
	if err != nil {
		return nil, err
	}
	var all []candidate
	for _, t := range tags {
		all = append(all, candidate{string(t.Descriptor.Digest), Found{t.Ref, t.Descriptor, t.Descriptor}})
		for _, m := range manifestsOf(st, t.Descriptor, 0) {
			f := Found{t.Ref, t.Descriptor, m.desc}
			all = append(all, candidate{string(m.desc.Digest), f}, candidate{string(m.manifest.Config.Digest), f})
		}
	}
	return all, nil
}

type storedManifest struct {
	desc     ocispec.Descriptor
	manifest *ocispec.Manifest
}

// manifestsOf returns the images of an index, or the one of a manifest, as far
// as the store has them; attestations are none.
func manifestsOf(st *store.Store, d ocispec.Descriptor, depth int) []storedManifest {
	if isAttestation(d) || depth > maxNested {
		return nil
	}
	raw, err := st.ReadBlob(d.Digest, MaxManifest)
	if err != nil {
		return nil
	}
	if m, err := ParseManifest(raw, d.MediaType); err == nil {
		d.MediaType = m.MediaType
		return []storedManifest{{d, m}}
	}
	idx, err := ParseIndex(raw, d.MediaType)
	if err != nil {
		return nil
	}
	var ms []storedManifest
	for _, c := range idx.Manifests {
		ms = append(ms, manifestsOf(st, c, depth+1)...)
	}
	return ms
}
