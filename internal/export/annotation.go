package export

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/diag"
)

// AnnotationType says where an annotation goes.
type AnnotationType string

// The types of annotations, with docker's names.
const (
	ToManifest           AnnotationType = "manifest"
	ToManifestDescriptor AnnotationType = "manifest-descriptor" // of the manifest, in the index
	ToIndex              AnnotationType = "index"
	ToIndexDescriptor    AnnotationType = "index-descriptor" // of the index, in an OCI layout
)

// Annotation is one key and value of an image's manifest or index.
type Annotation struct {
	Type       AnnotationType
	Platform   string // the image's that it is for, normalised; empty: all
	Key, Value string
}

// Annotations are those of an image. A later one goes before an earlier one of
// the same type and key, and one for a platform before one for all.
type Annotations []Annotation

// ParseAnnotation parses the value of --annotation:
// [TYPE[[PLATFORM]][,TYPE[[PLATFORM]]...]:]KEY=VALUE, where TYPE is manifest by default.
func ParseAnnotation(s string) (Annotations, error) {
	k, v, ok := strings.Cut(s, "=")
	if !ok {
		return nil, diag.New(diag.ExitUsage, "annotation %q is not of the form KEY=VALUE", s)
	}
	kinds, key, ok := strings.Cut(k, ":")
	if !ok {
		kinds, key = "", k
	}
	var all Annotations
	for kind := range strings.SplitSeq(kinds, ",") {
		a, err := newAnnotation(kind, key, v)
		if err != nil {
			return nil, diag.New(diag.ExitUsage, "annotation %q: %w", s, err)
		}
		all = append(all, a)
	}
	return all, nil
}

// kindPattern is TYPE[PLATFORM].
var kindPattern = regexp.MustCompile(`^([a-z-]*)(?:\[([A-Za-z0-9_/-]+)\])?$`)

func newAnnotation(kind, key, value string) (Annotation, error) {
	m := kindPattern.FindStringSubmatch(kind)
	if m == nil {
		return Annotation{}, fmt.Errorf("type %q is not a type with a platform in brackets", kind)
	}
	a := Annotation{Type: AnnotationType(m[1]), Key: key, Value: value}
	if a.Type == "" {
		a.Type = ToManifest
	}
	if !slices.Contains([]AnnotationType{ToManifest, ToManifestDescriptor, ToIndex, ToIndexDescriptor}, a.Type) {
		return a, diag.New(diag.ExitUsage, "type %q is not known", a.Type).
			WithHint("types are manifest, manifest-descriptor, index and index-descriptor")
	}
	if key == "" || strings.ContainsAny(key, " \t\r\n") {
		return a, fmt.Errorf("key %q is empty or has spaces", key)
	}
	if m[2] == "" {
		return a, nil
	}
	p, err := platforms.Parse(m[2])
	if err != nil {
		return a, fmt.Errorf("platform %q: %w", m[2], err)
	}
	a.Platform = platforms.FormatAll(platforms.Normalize(p))
	return a, nil
}

// option is the annotation's key among the options of an output.
func (a Annotation) option() string {
	s := "annotation-" + string(a.Type)
	if a.Platform != "" {
		s += "[" + a.Platform + "]"
	}
	return s + "." + a.Key
}

// Of are the annotations of one type for a platform; nil if there are none. Those of an
// index are for no platform, whatever they say.
func (as Annotations) Of(t AnnotationType, p *ocispec.Platform) map[string]string {
	want := ""
	if p != nil {
		want = platforms.FormatAll(platforms.Normalize(*p))
	}
	general, special := map[string]string{}, map[string]string{}
	for _, a := range as {
		switch {
		case a.Type != t:
		case a.Platform == "" || p == nil:
			general[a.Key] = a.Value
		case a.Platform == want:
			special[a.Key] = a.Value
		}
	}
	maps.Copy(general, special)
	if len(general) == 0 {
		return nil
	}
	return general
}

// Check refuses annotations that have nothing to be put on: built are the
// platforms that the image is for, and multi says that it is an index.
func (as Annotations) Check(built []ocispec.Platform, multi bool) error {
	for _, a := range as {
		if !multi && (a.Type == ToIndex || a.Type == ToIndexDescriptor) {
			return diag.New(diag.ExitUsage, "annotation %q is for an index, and there is none: the image is for one platform", a.Key).
				WithHint("Leave the type out, or build for several platforms (or with --build-arg BUILDKIT_MULTI_PLATFORM=1).")
		}
		is := func(p ocispec.Platform) bool { return platforms.FormatAll(platforms.Normalize(p)) == a.Platform }
		if a.Platform != "" && !slices.ContainsFunc(built, is) {
			return diag.New(diag.ExitUsage, "annotation %q is for %s, and the image is not", a.Key, a.Platform)
		}
	}
	return nil
}
