package build

import (
	"context"
	"io"
	"slices"
	"strings"

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
	var out []Output
	stdout := 0
	for _, s := range specs {
		o := Output{Spec: s}
		if o.Names, err = normalise(tags, s.Names); err != nil {
			return nil, err
		}
		switch {
		case s.ToRegistry() && len(o.Names) == 0:
			return nil, diag.New(diag.ExitUsage, "nowhere to push to: the image has no name").WithHint("give it one with -t REGISTRY/NAME:TAG")
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
