package buildkitd

import (
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/export"
)

func TestAnnotate(t *testing.T) {
	meta := map[string][]byte{
		"annotation.a": []byte("result's"), "annotation-manifest[linux/arm64].b": []byte("arm"), "annotation-index.c": []byte("index"), "other": nil,
	}
	own := export.Annotations{{Type: export.ToManifest, Key: "a", Value: "exporter's"}}
	out := []build.Output{{Spec: export.Spec{Type: export.Image, ImageOptions: export.ImageOptions{Annotations: own}}}, {Spec: export.Spec{Type: export.OCI}}, {Spec: export.Spec{Type: export.Local}}}
	if err := annotate(out, meta); err != nil {
		t.Fatal(err)
	}
	arm := &ocispec.Platform{OS: "linux", Architecture: "arm64"}
	for _, c := range []struct {
		out  int
		of   export.AnnotationType
		p    *ocispec.Platform
		key  string
		want string
	}{
		{0, export.ToManifest, arm, "a", "exporter's"},
		{0, export.ToManifest, arm, "b", "arm"},
		{1, export.ToManifest, arm, "a", "result's"},
		{1, export.ToManifest, &ocispec.Platform{OS: "linux", Architecture: "amd64"}, "b", ""},
		{1, export.ToIndex, nil, "c", "index"},
	} {
		if got := out[c.out].Annotations.Of(c.of, c.p)[c.key]; got != c.want {
			t.Errorf("output %d, %s: %s is %q, want %q", c.out, c.of, c.key, got, c.want)
		}
	}
	if len(out[2].Annotations) > 0 {
		t.Error("files got annotations")
	}
	if annotate([]build.Output{{Spec: export.Spec{Type: export.Docker, ImageOptions: export.ImageOptions{DockerTypes: true}}}}, meta) == nil {
		t.Error("docker's manifests got annotations")
	}
	if annotate(nil, map[string][]byte{"annotation-nothing.a": nil}) == nil {
		t.Error("an unknown type of annotation was taken")
	}
}

func TestConfigs(t *testing.T) {
	e := func(kind string, attrs map[string]string) *controlapi.Exporter {
		return &controlapi.Exporter{Type: kind, Attrs: attrs}
	}
	const all, arm = "containerimage.config", "containerimage.config/linux/arm64"
	image := e("image", map[string]string{"name": "a", all: "{}", arm: `{"os":"linux"}`})
	got, err := configs([]*controlapi.Exporter{image, e("oci", map[string]string{all: "{}"}), e("tar", nil)})
	if err != nil || len(got) != 2 || string(got[arm]) != `{"os":"linux"}` {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := configs([]*controlapi.Exporter{image, e("image", map[string]string{all: "other"})}); err == nil {
		t.Error("two configs were taken for one image")
	}
	out, err := outputs([]*controlapi.Exporter{image}, nil, 0)
	if err != nil || len(out) != 1 || len(image.Attrs) != 3 {
		t.Errorf("%+v, %v; the request has %v", out, err, image.Attrs)
	}
}

// TestStore keeps an image's name in the server's store for a client that says so.
func TestStore(t *testing.T) {
	for v, want := range map[string]bool{"": false, "true": true, "false": false} {
		e := &controlapi.Exporter{Type: "image", Attrs: map[string]string{"name": "a"}}
		if v != "" {
			e.Attrs["store"] = v
		}
		out, err := outputs([]*controlapi.Exporter{e}, nil, 0)
		if err != nil || out[0].ToStore() != want {
			t.Errorf("store=%s: kept: %v, %v", v, out[0].ToStore(), err)
		}
	}
}
