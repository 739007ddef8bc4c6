package buildkitd

import (
	"slices"
	"strings"

	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/buildkitd/peer"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/registry"
)

// outputs puts what a request says of exporters into Kiln's words. What is not known is refused by
// name. first is the number of the first of them.
func outputs(reqs []*controlapi.Exporter, p *peer.Peer, first int) ([]build.Output, error) {
	var out []build.Output
	for i, e := range reqs {
		kind := export.Type(e.GetType())
		if !slices.Contains([]export.Type{export.Image, export.OCI, export.Docker, export.Tar, export.Local}, kind) {
			return nil, status.Errorf(codes.InvalidArgument, "exporter %q could not be found", e.GetType())
		}
		sp, err := export.FromAttrs(e.GetType(), e.GetAttrs())
		if err != nil {
			return nil, err
		}
		o := build.Output{Spec: sp}
		if sp.Dest != "" {
			if o.To, err = p.Output(first+i, sp); err != nil {
				return nil, err
			}
		}
		out = append(out, o)
	}
	return out, nil
}

// anyName as the name of an image stands for those that the front end gives it.
const anyName = "*"

// name gives outputs the names that the front end chose, and puts all names into their full form.
func name(outputs []build.Output, chosen string) error {
	for i := range outputs {
		o := &outputs[i]
		given := o.Names
		if slices.Equal(given, []string{anyName}) {
			given = strings.FieldsFunc(chosen, func(r rune) bool { return r == ',' })
		}
		o.Names = nil
		for _, n := range given {
			ref, err := registry.NormalizeRef(n)
			if err != nil {
				return err
			}
			if !slices.Contains(o.Names, ref) {
				o.Names = append(o.Names, ref)
			}
		}
		if o.ToRegistry() && len(o.Names) == 0 {
			return status.Errorf(codes.InvalidArgument, "exporter %s: there is nowhere to push to: the image has no name", o.Type)
		}
	}
	return nil
}

// insecureHosts are the registries that may be spoken to in the clear.
func insecureHosts(outputs []build.Output) (hosts []string) {
	for _, o := range outputs {
		for _, n := range o.Names {
			if repo, err := registry.Repository(n); err == nil && o.Insecure {
				host, _, _ := strings.Cut(repo, "/")
				hosts = append(hosts, host)
			}
		}
	}
	return hosts
}
