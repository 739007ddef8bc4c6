package image

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"strings"

	"github.com/containerd/platforms"
	"github.com/kiln-build/kiln/internal/diag"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxNested is how many indexes may be inside each other, and maxUnnamed how
// many manifests that do not say their platform are looked at.
const (
	maxNested  = 3
	maxUnnamed = 8
)

// errNoPlatform is in the chain of errors about an index without the platform.
var errNoPlatform = errors.New("no image for this platform")

// Documents gives manifests, indexes and configs by their descriptor. It need
// not verify them. desc.Size may be 0 if it is not known. desc.MediaType may be
// empty for a manifest or index, never for a config.
type Documents func(ctx context.Context, desc ocispec.Descriptor) ([]byte, error)

// Resolve follows indexes from root to the image for a platform, chosen as
// containerd does (an arm/v7 machine also takes arm/v6, and so on). If root
// is a manifest, that image is it, whatever its platform. A platform without
// OS stands for this machine's. Everything is verified. The error lists the
// platforms that there are. Ref and the layers' Origin are left for the caller.
func Resolve(ctx context.Context, get Documents, root ocispec.Descriptor, platform ocispec.Platform) (*Image, error) {
	if platform.OS == "" {
		platform = platforms.DefaultSpec()
	}
	r := resolver{get: get, match: platforms.Only(platform), want: platforms.FormatAll(platforms.Normalize(platform))}
	img, err := r.resolve(ctx, root, 0)
	if err != nil {
		return nil, err
	}
	img.Digest = root.Digest
	return img, nil
}

type resolver struct {
	get   Documents
	match platforms.MatchComparer
	want  string
}

func (r *resolver) document(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	if len(d.Data) > 0 && verify(d.Data, d) == nil {
		return d.Data, nil
	}
	b, err := r.get(ctx, d)
	if err != nil {
		return nil, err
	}
	if d.Size == 0 {
		d.Size = int64(len(b))
	}
	return b, verify(b, d)
}

func (r *resolver) resolve(ctx context.Context, d ocispec.Descriptor, depth int) (*Image, error) {
	raw, err := r.document(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	mt, err := DocumentType(raw, d.MediaType)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	if IsManifest(mt) {
		return r.manifest(ctx, d, raw)
	}
	if depth >= maxNested {
		return nil, fmt.Errorf("manifest %s: more than %d indexes inside each other", d.Digest, maxNested)
	}
	idx, err := ParseIndex(raw, d.MediaType)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	return r.index(ctx, idx, depth)
}

func (r *resolver) manifest(ctx context.Context, d ocispec.Descriptor, raw []byte) (*Image, error) {
	m, err := ParseManifest(raw, d.MediaType)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	if m.Config.MediaType == "" {
		m.Config.MediaType = ocispec.MediaTypeImageConfig
	}
	config, err := r.document(ctx, m.Config)
	if err != nil {
		return nil, fmt.Errorf("config %s: %w", m.Config.Digest, err)
	}
	img, err := New(ocispec.Descriptor{MediaType: d.MediaType, Annotations: d.Annotations}, raw, config, "")
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	return img, nil
}

func (r *resolver) index(ctx context.Context, idx *ocispec.Index, depth int) (*Image, error) {
	for _, d := range r.choose(idx.Manifests) {
		img, err := r.resolve(ctx, d, depth+1)
		if errors.Is(err, errNoPlatform) {
			continue
		}
		if err == nil && d.Platform == nil && !r.match.Match(*img.Manifest.Platform) {
			continue
		}
		if err == nil && d.Platform != nil && img.Manifest.Platform.OS == "" {
			img.Manifest.Platform = d.Platform
		}
		return img, err
	}
	return nil, &diag.Error{
		Err:  fmt.Errorf("%w: it has %s, and %s is wanted", errNoPlatform, offered(idx.Manifests), r.want),
		Hint: "Choose one of its platforms with --platform, or another image.",
	}
}

// choose returns what fits, the best first, and then what does not say its platform.
func (r *resolver) choose(ms []ocispec.Descriptor) []ocispec.Descriptor {
	var fit, unnamed []ocispec.Descriptor
	for _, d := range ms {
		switch {
		case isAttestation(d), d.MediaType != "" && !IsIndex(d.MediaType) && !IsManifest(d.MediaType):
		case d.Platform == nil:
			unnamed = append(unnamed, d)
		case r.match.Match(*d.Platform):
			fit = append(fit, d)
		}
	}
	sort.SliceStable(fit, func(i, j int) bool { return r.match.Less(*fit[i].Platform, *fit[j].Platform) })
	return append(fit, unnamed[:min(len(unnamed), maxUnnamed)]...)
}

// isAttestation reports whether an entry of an index is what BuildKit adds
// about an image: its platform is unknown/unknown.
func isAttestation(d ocispec.Descriptor) bool {
	return d.Annotations["vnd.docker.reference.type"] == "attestation-manifest" ||
		d.Platform != nil && d.Platform.OS == "unknown" && d.Platform.Architecture == "unknown"
}

// offered lists the platforms of an index for a message.
func offered(ms []ocispec.Descriptor) string {
	var names []string
	seen := map[string]bool{}
	for _, d := range ms {
		if d.Platform == nil || isAttestation(d) {
			continue
		}
		name := clip(strings.ToValidUTF8(platforms.FormatAll(*d.Platform), "?"))
		if !seen[name] {
			seen[name] = true
			names = append(names, name)
		}
	}
	switch {
	case len(names) == 0:
		return "no platform at all"
	case len(names) > 20:
		names = append(names[:20], fmt.Sprintf("and %d more", len(names)-20))
	}
	return strings.Join(names, ", ")
}
