package buildkitd

import (
	"maps"
	"strings"

	controlapi "github.com/moby/buildkit/api/services/control"
	gatewayapi "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/registry"
)

// caches are those that a request names. insecure are the registries among them that may be spoken to
// in the clear.
func caches(o *controlapi.CacheOptions) (from, to []cache.Spec, insecure []string, err error) {
	imports, exports := o.GetImports(), o.GetExports()
	for _, ref := range o.GetImportRefsDeprecated() {
		imports = append(imports, &controlapi.CacheOptionsEntry{Type: "registry", Attrs: map[string]string{"ref": ref}})
	}
	if ref := o.GetExportRefDeprecated(); ref != "" {
		attrs := maps.Clone(o.GetExportAttrsDeprecated())
		if attrs == nil {
			attrs = map[string]string{}
		}
		attrs["ref"] = ref
		exports = append(exports, &controlapi.CacheOptionsEntry{Type: "registry", Attrs: attrs})
	}
	for _, e := range imports {
		attrs, host := cacheAttrs(e.GetType(), e.GetAttrs())
		sp, err := cache.From(attrs)
		if err != nil {
			return nil, nil, nil, err
		}
		from, insecure = append(from, sp), append(insecure, host...)
	}
	inline := false
	for _, e := range exports {
		attrs, host := cacheAttrs(e.GetType(), e.GetAttrs())
		sp, err := cache.To(attrs)
		if err != nil {
			return nil, nil, nil, err
		}
		if sp.Type == cache.Inline && inline {
			continue
		}
		inline = inline || sp.Type == cache.Inline
		if err := oneManifest(to, sp); err != nil {
			return nil, nil, nil, err
		}
		to, insecure = append(to, sp), append(insecure, host...)
	}
	return from, to, insecure, nil
}

// oneManifest refuses a directory that would not get the same manifest as those before it: clients are told of
// one, and name it in all of their directories.
func oneManifest(before []cache.Spec, sp cache.Spec) error {
	how := func(s cache.Spec) cache.Spec {
		s.Dir, s.Tag, s.IgnoreError = "", "", false
		return s
	}
	for _, b := range before {
		if sp.Type == cache.Directory && b.Type == cache.Directory && how(b) != how(sp) {
			return status.Errorf(codes.Unimplemented, "caches of type=local that differ in more than their place are not supported: %s, %s", b, sp)
		}
	}
	return nil
}

// useCaches adds caches that the client's front end wants asked, besides those of the request.
func (r *running) useCaches(imports []*gatewayapi.CacheOptionsEntry) error {
	var o controlapi.CacheOptions
	for _, e := range imports {
		o.Imports = append(o.Imports, &controlapi.CacheOptionsEntry{Type: e.GetType(), Attrs: e.GetAttrs()})
	}
	from, _, _, err := caches(&o)
	if err != nil {
		return err
	}
	return r.build.UseCaches(from...)
}

// cachesOfArgs are those that an old client names in the front end's attribute cache-from: references of images. New
// ones say the same in the request, too.
func cachesOfArgs(attrs map[string]string) (imports []*gatewayapi.CacheOptionsEntry) {
	if attrs["cache-imports"] != "" {
		return nil
	}
	for _, ref := range strings.FieldsFunc(attrs["cache-from"], func(r rune) bool { return r == ',' }) {
		imports = append(imports, &gatewayapi.CacheOptionsEntry{Type: "registry", Attrs: map[string]string{"ref": ref}})
	}
	return imports
}

// cacheAttrs are the attributes of a cache in Kiln's words, and its registry if that may be spoken to
// in the clear.
func cacheAttrs(kind string, attrs map[string]string) (kv map[string]string, insecure []string) {
	kv = map[string]string{}
	maps.Copy(kv, attrs)
	kv["type"] = kind
	if v := kv["registry.insecure"]; v == "true" || v == "1" {
		if repo, err := registry.Repository(kv["ref"]); err == nil {
			host, _, _ := strings.Cut(repo, "/")
			insecure = append(insecure, host)
		}
	}
	delete(kv, "registry.insecure")
	delete(kv, "reset") // which the client does
	return kv, insecure
}
