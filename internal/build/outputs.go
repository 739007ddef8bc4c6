package build

import (
	"slices"
	"strings"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/registry"
)

// output is where the result is to go, with all names that it gets there.
type output struct {
	export.Spec
	names []string // normalised
}

// outputs are those of a request. It finds what cannot work before anything is done.
func outputs(req Request) ([]output, error) {
	tags, err := normalise(nil, req.Tags)
	if err != nil {
		return nil, err
	}
	specs := req.Outputs
	if len(specs) == 0 {
		specs = []export.Spec{{Type: export.Image}}
	}
	var out []output
	stdout := 0
	for _, s := range specs {
		o := output{Spec: s}
		if o.names, err = normalise(tags, s.Names); err != nil {
			return nil, err
		}
		switch {
		case s.ToRegistry() && len(o.names) == 0:
			return nil, diag.New(diag.ExitUsage, "nowhere to push to: the image has no name").WithHint("give it one with -t REGISTRY/NAME:TAG")
		case !s.NeedsImage() && len(req.Platforms) > 1:
			return nil, diag.New(diag.ExitUsage, "several platforms cannot go to one output of type %s", s.Type)
		case s.Dest == "-":
			stdout++
		}
		out = append(out, o)
	}
	if stdout > 1 {
		return nil, diag.New(diag.ExitUsage, "only one output can go to standard output")
	}
	return out, nil
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

// names are those that the image gets, of outputs of a kind.
func (j *job) names(kind func(export.Spec) bool) (all []string) {
	for _, o := range j.outputs {
		for _, n := range o.names {
			if kind(o.Spec) && !slices.Contains(all, n) {
				all = append(all, n)
			}
		}
	}
	return all
}

func (j *job) needsImage() bool {
	return slices.ContainsFunc(j.outputs, func(o output) bool { return o.NeedsImage() })
}
