package buildkitd

import (
	"maps"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
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
		sp, err := export.FromAttrs(e.GetType(), withoutConfigs(e.GetAttrs()))
		if err != nil {
			return nil, err
		}
		// As with BuildKit, names in the store of a server are for those who ask for them: no client could take them away.
		if _, asked := e.GetAttrs()["store"]; !asked {
			sp.NoStore = true
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

// isConfig reports whether an exporter's attribute is an image's config, maybe that of one platform,
// in place of the front end's.
func isConfig(attr string) bool {
	return attr == exptypes.ExporterImageConfigKey || strings.HasPrefix(attr, exptypes.ExporterImageConfigKey+"/")
}

func withoutConfigs(attrs map[string]string) map[string]string {
	attrs = maps.Clone(attrs)
	maps.DeleteFunc(attrs, func(k, _ string) bool { return isConfig(k) })
	return attrs
}

// configs are the images' configs that the exporters of a request have among their attributes.
func configs(reqs []*controlapi.Exporter) (map[string][]byte, error) {
	found := map[string][]byte{}
	for _, e := range reqs {
		for k, v := range e.GetAttrs() {
			if !isConfig(k) {
				continue
			}
			if old, ok := found[k]; ok && string(old) != v {
				return nil, status.Errorf(codes.Unimplemented, "exporters with different configs (%.100q) are not supported", k)
			}
			found[k] = []byte(v)
		}
	}
	return found, nil
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

// annotate gives images the annotations in a front end's result. What an exporter was given itself goes before them.
func annotate(outputs []build.Output, meta map[string][]byte) error {
	var all export.Annotations
	for _, k := range slices.Sorted(maps.Keys(meta)) {
		key, ok, err := exptypes.ParseAnnotationKey(k)
		if err != nil {
			return status.Errorf(codes.InvalidArgument, "the result's %.100q: %v", k, err)
		}
		if !ok {
			continue
		}
		a := export.Annotation{Type: export.AnnotationType(key.Type), Key: key.Key, Value: string(meta[k])}
		if key.Platform != nil {
			a.Platform = platforms.FormatAll(platforms.Normalize(*key.Platform))
		}
		all = append(all, a)
	}
	for i := range outputs {
		o := &outputs[i]
		if len(all) == 0 || !o.NeedsImage() {
			continue
		}
		if o.DockerTypes {
			return status.Errorf(codes.InvalidArgument, "exporter %s: the result has annotations, and docker's manifests have none (oci-mediatypes=false)", o.Type)
		}
		o.Annotations = slices.Concat(all, o.Annotations)
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
