package build

import (
	"context"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/tree"
)

// Output is where the result is to go.
type Output struct {
	export.Spec // Names: all that it gets there, normalised
	// To takes what goes to files of somebody else. Nil: Spec.Dest says where on this machine.
	To Destination
}

// Destination takes files of an output.
type Destination interface {
	// File opens the file that an archive or tar is written to. meta is what is said of the
	// result, see Result.Metadata. Close says whether all of it has arrived.
	File(ctx context.Context, meta map[string]string) (io.WriteCloser, error)
	// Tree takes a root file system.
	Tree(ctx context.Context, t tree.Tree) error
}

// outputs are those of a request. It finds what cannot work before anything is done.
func outputs(req Request) ([]Output, error) {
	tags, err := normalise(nil, req.Tags)
	if err != nil {
		return nil, err
	}
	specs := req.Outputs
	if len(specs) == 0 {
		specs = []export.Spec{{Type: export.Image}}
	}
	built := req.Platforms
	if len(built) == 0 {
		built = []ocispec.Platform{platforms.DefaultSpec()}
	}
	// What is no boolean the front end refuses.
	multi, _ := strconv.ParseBool(req.BuildArgs["BUILDKIT_MULTI_PLATFORM"])
	multi = multi || len(built) > 1
	var out []Output
	stdout := 0
	for _, s := range specs {
		if s.NeedsImage() {
			s.Annotations = append(slices.Clip(s.Annotations), req.Annotations...)
			if s.Compression == "" {
				s.Compression = req.Compression
			}
		}
		if err := byDigest(s, req.Tags); err != nil {
			return nil, err
		}
		o := Output{Spec: s}
		if o.Names, err = normalise(tags, s.Names); err != nil {
			return nil, err
		}
		if err := o.check(built, multi); err != nil {
			return nil, err
		}
		if s.Dest == "-" {
			stdout++
		}
		out = append(out, o)
	}
	if stdout > 1 {
		return nil, diag.New(diag.ExitUsage, "only one output can go to standard output")
	}
	return out, nil
}

// byDigest refuses tags, as they were given, of what is to be pushed without one.
func byDigest(s export.Spec, tags []string) error {
	if !s.ByDigest {
		return nil
	}
	for _, n := range slices.Concat(tags, s.Names) {
		if named, err := reference.ParseNormalizedNamed(n); err == nil && !reference.IsNameOnly(named) {
			return diag.New(diag.ExitUsage, "%q has a tag, and push-by-digest=true pushes without one", n)
		}
	}
	return nil
}

// check refuses what cannot be of an image for the platforms built; multi says
// that the result is an index.
func (o *Output) check(built []ocispec.Platform, multi bool) error {
	switch {
	case o.ToRegistry() && len(o.Names) == 0:
		return diag.New(diag.ExitUsage, "nowhere to push to: the image has no name").WithHint("give it one with -t REGISTRY/NAME:TAG")
	case o.DockerTypes && len(o.Annotations) > 0:
		return diag.New(diag.ExitUsage, "annotations conflict with oci-mediatypes=false: docker's manifests have none")
	}
	return o.Annotations.Check(built, multi)
}

// normalise adds names to those that there are, each once.
func normalise(have, names []string) ([]string, error) {
	have = slices.Clip(have)
	for _, n := range names {
		ref, err := registry.NormalizeRef(n)
		if err != nil {
			return nil, err
		}
		if strings.Contains(ref, "@") {
			return nil, diag.New(diag.ExitUsage, "tag %q: an image cannot be tagged with a digest", n)
		}
		if !slices.Contains(have, ref) {
			have = append(have, ref)
		}
	}
	return have, nil
}
