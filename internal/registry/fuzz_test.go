package registry

import (
	"strings"
	"testing"
	"unicode/utf8"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func FuzzManifest(f *testing.F) {
	sum := "sha256:" + strings.Repeat("a", 64)
	for _, s := range []string{
		`{"schemaVersion":2,"config":{"digest":"` + sum + `","size":2},"layers":[{"digest":"` + sum + `","size":3}]}`,
		`{"schemaVersion":2,"manifests":[{"digest":"` + sum + `","size":3,"platform":{"os":"linux","architecture":"arm","variant":"v7"}}]}`,
		`{"schemaVersion":1,"fsLayers":[]}`, `{}`, `null`,
	} {
		for _, mt := range []string{"", ocispec.MediaTypeImageIndex, dockerManifest, "text/html; charset=x"} {
			f.Add([]byte(s), mt, []byte(`{"os":"linux","rootfs":{"diff_ids":["`+sum+`"]}}`))
		}
	}
	f.Fuzz(func(t *testing.T, raw []byte, contentType string, config []byte) {
		d, mt, err := parseDocument(raw, contentType)
		if err != nil {
			return
		}
		if isIndex(mt) == isManifest(mt) {
			t.Errorf("type %q", mt)
		}
		for _, p := range []ocispec.Platform{{OS: "linux", Architecture: "amd64"}, {OS: "linux", Architecture: "arm", Variant: "v7"}, {}} {
			if got := choose(d.Manifests, p); len(got) > len(d.Manifests) {
				t.Errorf("chose %d of %d", len(got), len(d.Manifests))
			}
		}
		if s := offered(d.Manifests); !utf8.ValidString(s) || strings.ContainsAny(s, "\n\x1b") {
			t.Errorf("offers %q", s)
		}
		if isManifest(mt) {
			if c, err := parseConfig(config, d); err == nil && len(c.RootFS.DiffIDs) != len(d.Layers) {
				t.Error("layers and diff ids differ")
			}
		}
	})
}
