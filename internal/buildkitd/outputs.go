package buildkitd

import (
	"maps"
	"slices"
	"strconv"
	"strings"

	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/buildkitd/peer"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/registry"
)

// outputs puts what a request says of exporters into Kiln's words. What is not known is refused by
// name. first is the number of the first of them. insecure are the registries that may be spoken to in the clear.
func outputs(reqs []*controlapi.Exporter, p *peer.Peer, first int) (x build.Export, insecure []string, err error) {
	for i, e := range reqs {
		a := attrs{kind: e.GetType(), values: maps.Clone(e.GetAttrs())}
		o := build.Output{To: p.Output(first + i)}
		plain := false
		switch a.kind {
		case "image":
			o.Type, o.To = export.Image, nil
			o.Push = a.flag("push", false)
			if !a.flag("store", true) {
				o.Type = export.Registry
				if !o.Push {
					a.fail("push=false with store=false leaves nothing to be done")
				}
				o.Push = false
			}
			plain = a.flag("registry.insecure", false)
			a.ignore("unpack") // nobody here runs containers of it
		case "oci", "docker":
			o.Type = export.Type(a.kind)
			if !a.flag("tar", true) {
				a.fail("tar=false is not supported: the client has to unpack the archive")
			}
		case "tar", "local":
			o.Type = export.Type(a.kind)
			a.ignore("dest")
		default:
			return x, nil, status.Errorf(codes.InvalidArgument, "exporter %q could not be found", a.kind)
		}
		if o.NeedsImage() {
			a.image(&o, &x)
		}
		if err := a.err(); err != nil {
			return x, nil, err
		}
		x.Outputs = append(x.Outputs, o)
		for _, n := range o.Names {
			if host, _, _ := strings.Cut(n, "/"); plain {
				insecure = append(insecure, host)
			}
		}
	}
	return x, insecure, nil
}

// attrs are the attributes of one exporter, from which those that are known are taken away.
type attrs struct {
	kind   string
	values map[string]string
	failed error
}

func (a *attrs) fail(format string, v ...any) {
	if a.failed == nil {
		a.failed = status.Errorf(codes.InvalidArgument, "exporter %s: "+format, append([]any{a.kind}, v...)...)
	}
}

// err is the first thing that is wrong.
func (a *attrs) err() error {
	if left := slices.Sorted(maps.Keys(a.values)); a.failed == nil && len(left) > 0 {
		a.fail("option %q is not supported", left[0])
	}
	return a.failed
}

func (a *attrs) take(name string) (v string, ok bool) {
	v, ok = a.values[name]
	delete(a.values, name)
	return v, ok
}

func (a *attrs) ignore(names ...string) {
	for _, n := range names {
		delete(a.values, n)
	}
}

// flag is true also if it is there without a value.
func (a *attrs) flag(name string, def bool) bool {
	v, ok := a.take(name)
	if !ok {
		return def
	}
	if v == "" {
		return true
	}
	b, err := strconv.ParseBool(v)
	if err != nil {
		a.fail("%s is true or false, and not %q", name, v)
	}
	return b
}

// image takes what all exporters of images know.
func (a *attrs) image(o *build.Output, x *build.Export) {
	names, _ := a.take("name")
	for n := range strings.SplitSeq(names, ",") {
		if n = strings.TrimSpace(n); n == "" {
			continue
		}
		ref, err := registry.NormalizeRef(n)
		if err != nil {
			a.fail("%v", err)
			continue
		}
		if !slices.Contains(o.Names, ref) {
			o.Names = append(o.Names, ref)
		}
	}
	if c, ok := a.take("compression"); ok {
		switch layer.Compression(c) {
		case layer.Gzip, layer.Zstd:
			x.Compression = layer.Compression(c)
		default:
			a.fail("compression %q is not supported: gzip and zstd are", c)
		}
	}
	if !a.flag("oci-mediatypes", true) {
		a.fail("oci-mediatypes=false is not supported")
	}
	if o.ToRegistry() && len(o.Names) == 0 {
		a.fail("there is nowhere to push to: the image has no name")
	}
}
