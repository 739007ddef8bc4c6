package image

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"strings"
	"testing"
	"time"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func digestOf(s string) digest.Digest { return digest.FromString(s) }

func blobOf(s, mediaType string) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digestOf(s), Size: int64(len(s))}
}

func epoch(sec int64) *time.Time {
	t := time.Unix(sec, 0).UTC()
	return &t
}

func assembleLayers(n int) (ls []NewLayer) {
	for i := range n {
		s := fmt.Sprint("layer", i)
		ls = append(ls, NewLayer{
			Layer:   Layer{DiffID: digestOf("tar of " + s), Blob: blobOf(s, ocispec.MediaTypeImageLayerGzip), Origin: "r.example/" + s},
			Created: epoch(1000 + int64(i)), CreatedBy: "step " + s,
		})
	}
	return ls
}

func TestAssemble(t *testing.T) {
	config := `{"architecture":"arm64","os":"linux","variant":"v8","config":{"Cmd":["sh"],"Healthcheck":{"Test":["NONE"]},"FutureField":{"a":[1,2]}},` +
		`"moby.buildkit.x":"kept","history":[{"created":"2020-01-01T00:00:00Z","created_by":"base"},{"created_by":"ENV a=b","empty_layer":true},{"created_by":"RUN x"}]}`
	opt := AssembleOptions{Config: []byte(config), Layers: assembleLayers(3), Annotations: map[string]string{"k": "v"}}
	opt.Layers[1].Blob.Annotations = map[string]string{"containerd.io/uncompressed": "x", "buildkit/createdat": "x", "mine": "kept"}
	img := must(Assemble(opt))(t)

	var c map[string]json.RawMessage
	if err := json.Unmarshal(img.RawConfig, &c); err != nil {
		t.Fatal(err)
	}
	if string(c["config"]) != `{"Cmd":["sh"],"Healthcheck":{"Test":["NONE"]},"FutureField":{"a":[1,2]}}` || string(c["moby.buildkit.x"]) != `"kept"` {
		t.Errorf("unknown fields: %s", img.RawConfig)
	}
	// The first new layer's time is that of what stands before it without a
	// layer; the missing entry comes from the layer.
	want := `[{"created":"2020-01-01T00:00:00Z","created_by":"base"},` +
		`{"created":"1970-01-01T00:16:41Z","created_by":"ENV a=b","empty_layer":true},` +
		`{"created":"1970-01-01T00:16:41Z","created_by":"RUN x"},` +
		`{"created":"1970-01-01T00:16:42Z","created_by":"step layer2","comment":"kiln"}]`
	if string(c["history"]) != want {
		t.Errorf("history\n%s\nwant\n%s", c["history"], want)
	}
	if string(c["created"]) != `"1970-01-01T00:16:42Z"` {
		t.Errorf("created %s", c["created"])
	}
	m := must(ParseManifest(img.RawManifest, ""))(t)
	if m.Annotations["k"] != "v" || len(m.Layers) != 3 || m.MediaType != ocispec.MediaTypeImageManifest {
		t.Errorf("manifest %s", img.RawManifest)
	}
	if a := m.Layers[1].Annotations; len(a) != 1 || a["mine"] != "kept" {
		t.Errorf("annotations of a layer: %v", a)
	}
	if p := platforms.Format(*img.Manifest.Platform); p != "linux/arm64/v8" {
		t.Errorf("platform %s", p)
	}
	if img.Layers[2].Origin != "r.example/layer2" || img.Layers[2].DiffID != opt.Layers[2].DiffID {
		t.Errorf("layer %+v", img.Layers[2])
	}
	again := must(Assemble(opt))(t)
	if string(again.RawManifest) != string(img.RawManifest) || string(again.RawConfig) != string(img.RawConfig) {
		t.Error("the same input gave other bytes")
	}
}

func TestAssembleRewritten(t *testing.T) {
	config := []byte(`{"os":"linux","architecture":"amd64"}`)
	ls := assembleLayers(2)
	ls[0].Layer.Created, ls[1].Layer.Created = time.Time{}, time.Unix(500, 0)
	for name, c := range map[string]struct {
		opt  AssembleOptions
		want string
	}{
		"rewritten":      {AssembleOptions{Epoch: epoch(100), Rewritten: true}, "100"},
		"times kept":     {AssembleOptions{Epoch: epoch(100)}, ""},
		"no epoch":       {AssembleOptions{Rewritten: true}, ""},
		"docker's types": {AssembleOptions{Epoch: epoch(100), Rewritten: true, DockerTypes: true}, ""},
	} {
		c.opt.Config, c.opt.Layers = config, ls
		img := must(Assemble(c.opt))(t)
		var m ocispec.Manifest
		if err := json.Unmarshal(img.RawManifest, &m); err != nil {
			t.Fatal(err)
		}
		if base, own := m.Layers[0].Annotations[annotationRewritten], m.Layers[1].Annotations[annotationRewritten]; base != "" || own != c.want {
			t.Errorf("%s: the base image's layer has %q, the new one %q, not %q", name, base, own, c.want)
		}
	}
}

func TestAssembleEpoch(t *testing.T) {
	base := `{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"history":[{"created":"2020-01-01T00:00:00Z","created_by":"base"}]}`
	config := `{"architecture":"amd64","os":"linux","created":"2021-05-05T00:00:00.123Z","history":[{"created":"2020-01-01T00:00:00Z","created_by":"base"},{"created":"2021-01-01T00:00:00Z","created_by":"new"},{"created_by":"old"}]}`
	ls := assembleLayers(3)
	ls[2].Created = epoch(5)
	img := must(Assemble(AssembleOptions{Config: []byte(config), BaseConfig: []byte(base), Layers: ls, Epoch: epoch(100)}))(t)
	c := must(ParseConfig(img.RawConfig))(t)
	var got []string
	for _, h := range c.History {
		got = append(got, h.Created.Format(time.RFC3339))
	}
	if s := strings.Join(got, " "); s != "2020-01-01T00:00:00Z 1970-01-01T00:01:40Z 1970-01-01T00:00:05Z" {
		t.Errorf("times %s", s)
	}
	if !c.Created.Equal(*epoch(100)) {
		t.Errorf("created %v", c.Created)
	}
	// Without an epoch nothing that was said is changed, not even its spelling.
	img = must(Assemble(AssembleOptions{Config: []byte(config), Layers: ls}))(t)
	if !strings.Contains(string(img.RawConfig), `"created":"2021-05-05T00:00:00.123Z"`) {
		t.Errorf("config %s", img.RawConfig)
	}
}

func TestAssembleEdges(t *testing.T) {
	minimal := []byte(`{"architecture":"amd64","os":"linux"}`)
	scratch := must(Assemble(AssembleOptions{Config: minimal, Annotations: nil}))(t)
	if !strings.Contains(string(scratch.RawManifest), `"layers": []`) || !strings.Contains(string(scratch.RawConfig), `"diff_ids":[]`) {
		t.Errorf("an image without layers: %s %s", scratch.RawManifest, scratch.RawConfig)
	}
	docker := must(Assemble(AssembleOptions{Config: minimal, Layers: assembleLayers(2), DockerTypes: true}))(t)
	m := must(ParseManifest(docker.RawManifest, ""))(t)
	if m.MediaType != MediaTypeDockerManifest || m.Config.MediaType != MediaTypeDockerConfig || m.Layers[0].MediaType != MediaTypeDockerLayerGzip {
		t.Errorf("docker's types: %s", docker.RawManifest)
	}
	// More history than layers: the rest is said to be empty.
	over := must(Assemble(AssembleOptions{Config: []byte(`{"architecture":"a","os":"l","history":[{},{},{}]}`), Layers: assembleLayers(1)}))(t)
	c := must(ParseConfig(over.RawConfig))(t)
	if len(c.History) != 3 || c.History[0].EmptyLayer || !c.History[1].EmptyLayer || !c.History[2].EmptyLayer {
		t.Errorf("history %+v", c.History)
	}
	for name, opt := range map[string]AssembleOptions{
		"no config":             {},
		"null":                  {Config: []byte("null")},
		"no os":                 {Config: []byte(`{"architecture":"amd64"}`)},
		"no architecture":       {Config: []byte(`{"os":"linux"}`)},
		"no blob":               {Config: minimal, Layers: []NewLayer{{Layer: Layer{DiffID: digestOf("x")}}}},
		"annotations in docker": {Config: minimal, DockerTypes: true, Annotations: map[string]string{"a": "b"}},
		"bad base":              {Config: minimal, BaseConfig: []byte("{")},
		"too many layers":       {Config: minimal, Layers: make([]NewLayer, MaxLayers+1)},
	} {
		if _, err := Assemble(opt); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if w := (&Image{Layers: make([]Layer, 128)}).Warnings(); len(w) != 1 {
		t.Errorf("warnings about 128 layers: %q", w)
	}
}

func TestAssembleIndex(t *testing.T) {
	d := blobOf("m", ocispec.MediaTypeImageManifest)
	p := platforms.MustParse("linux/arm64")
	d.Platform = &p
	raw, desc, err := AssembleIndex(IndexOptions{Manifests: []ocispec.Descriptor{d}, Annotations: map[string]string{"a": "b"}})
	if err != nil {
		t.Fatal(err)
	}
	idx := must(ParseIndex(raw, desc.MediaType))(t)
	if desc.Digest != digest.FromBytes(raw) || idx.Manifests[0].Platform.Architecture != "arm64" || idx.Annotations["a"] != "b" {
		t.Errorf("index %s", raw)
	}
	d.Platform = nil
	if _, _, err := AssembleIndex(IndexOptions{Manifests: []ocispec.Descriptor{d}}); err == nil {
		t.Error("an entry without platform was taken")
	}
}

const anyDigest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func TestParseManifestRefuses(t *testing.T) {
	config := `"config":{"mediaType":"` + ocispec.MediaTypeImageConfig + `","digest":"` + anyDigest + `","size":1}`
	layers := func(mt, d, size string) string {
		return `{"schemaVersion":2,` + config + `,"layers":[{"mediaType":"` + mt + `","digest":"` + d + `","size":` + size + `}]}`
	}
	must(ParseManifest([]byte(layers(ocispec.MediaTypeImageLayerGzip, anyDigest, "1")), ""))(t)
	must(ParseManifest([]byte(layers(mediaTypeDockerForeignGzip, anyDigest, "1")), ocispec.MediaTypeImageManifest))(t)
	for _, c := range []struct{ raw, declared, want string }{
		{``, "", "JSON"},
		{`<html>`, "", "JSON"},
		{`[]`, "", "JSON"},
		{`null`, "", "digest"},
		{`{}`, "", "digest"},
		{`{"schemaVersion":1,"fsLayers":[]}`, "", "schema 1"},
		{`{}`, mediaTypeDockerSigned1, "schema 1"},
		{`{"mediaType":"application/vnd.cncf.helm.config.v1+json"}`, "", "not an image"},
		{`{"schemaVersion":2,"manifests":[]}`, "", "index of several"},
		{`{"schemaVersion":2,"manifests":[],"layers":[]}`, "", "at once"},
		{`{"mediaType":"` + ocispec.MediaTypeImageManifest + `","manifests":[]}`, "", "at once"},
		{layers(ocispec.MediaTypeImageLayerGzip, anyDigest, "1"), MediaTypeDockerList, "at once"},
		{`{"mediaType":"` + MediaTypeDockerManifest + `"}`, ocispec.MediaTypeImageManifest, "announced"},
		{layers("application/vnd.oci.image.layer.v1.tar+zip", anyDigest, "1"), "", "unknown type"},
		{layers("", anyDigest, "1"), "", "unknown type"},
		{layers(ocispec.MediaTypeImageLayerGzip, "sha256:../../etc/passwd", "1"), "", "digest"},
		{layers(ocispec.MediaTypeImageLayerGzip, "", "1"), "", "digest"},
		{layers(ocispec.MediaTypeImageLayerGzip, strings.Repeat("x", 100_000), "1"), "", "digest"},
		{layers(ocispec.MediaTypeImageLayerGzip, anyDigest, "-1"), "", "size"},
		{layers(ocispec.MediaTypeImageLayerGzip, anyDigest, "1e99"), "", "not valid"},
		{layers(ocispec.MediaTypeImageLayerGzip, anyDigest, `"1"`), "", "not valid"},
		{`{"schemaVersion":2,"config":{"mediaType":"application/vnd.cncf.helm.config.v1+json"},"layers":[]}`, "", "helm"},
		{`{"schemaVersion":2,"config":{"mediaType":"` + ocispec.MediaTypeImageConfig + `","digest":"` + anyDigest + `","size":9999999999}}`, "", "bytes"},
		{`{"schemaVersion":2,` + config + `,"layers":[` + strings.Repeat(`{"mediaType":"`+MediaTypeDockerLayer+`","digest":"`+anyDigest+`"},`, MaxLayers) + `{"digest":"` + anyDigest + `"}]}`, "", "layers, more than"},
		{`{"x":"` + strings.Repeat("x", MaxManifest) + `"}`, "", "bytes, more than"},
		{strings.Repeat(`[`, 1_000_000), "", "JSON"},
	} {
		_, err := ParseManifest([]byte(c.raw), c.declared)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%.150s: error is %.300v, want %q", c.raw, err, c.want)
		}
		if err != nil && len(err.Error()) > 1000 {
			t.Errorf("%.150s: an error of %d bytes", c.raw, len(err.Error()))
		}
	}
}

func TestParseConfigRefuses(t *testing.T) {
	for _, raw := range []string{
		``, `null`, `[]`, `"x"`, `{"rootfs":{"diff_ids":["x"]}}`, `{"rootfs":{"diff_ids":["sha256:../x"]}}`, `{"created":"yesterday"}`,
		`{"rootfs":{"diff_ids":[` + strings.Repeat(`"`+anyDigest+`",`, MaxLayers) + `"` + anyDigest + `"]}}`,
		`{"x":"` + strings.Repeat("x", MaxConfig) + `"}`,
	} {
		if _, err := ParseConfig([]byte(raw)); err == nil {
			t.Errorf("%.100s: no error", raw)
		}
	}
}

func TestNewRefusesWhatDoesNotFit(t *testing.T) {
	img := must(Assemble(AssembleOptions{Config: []byte(`{"architecture":"amd64","os":"linux"}`), Layers: assembleLayers(2)}))(t)
	other := must(Assemble(AssembleOptions{Config: []byte(`{"architecture":"amd64","os":"linux"}`), Layers: assembleLayers(1)}))(t)
	if _, err := New(img.Manifest, img.RawManifest, other.RawConfig, ""); err == nil {
		t.Error("another config was taken")
	}
	// A config with another number of layers, rightly described.
	m := must(ParseManifest(img.RawManifest, ""))(t)
	m.Config = must(ParseManifest(other.RawManifest, ""))(t).Config
	raw := must(json.Marshal(m))(t)
	if _, err := New(ocispec.Descriptor{}, raw, other.RawConfig, ""); err == nil || !strings.Contains(err.Error(), "2 layers, but its config 1") {
		t.Errorf("error is %v", err)
	}
}

// documents is content by digest.
type documents map[digest.Digest][]byte

func (ds documents) put(b []byte) digest.Digest {
	d := digest.FromBytes(b)
	ds[d] = b
	return d
}

func (ds documents) get(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
	if b, ok := ds[d.Digest]; ok {
		return b, nil
	}
	return nil, fs.ErrNotExist
}

func (ds documents) image(t testing.TB, platform string) ocispec.Descriptor {
	p := platforms.MustParse(platform)
	config := must(json.Marshal(map[string]any{"os": p.OS, "architecture": p.Architecture, "variant": p.Variant}))(t)
	img := must(Assemble(AssembleOptions{Config: config, Layers: assembleLayers(1)}))(t)
	ds.put(img.RawConfig)
	ds.put(img.RawManifest)
	d := img.Manifest
	d.Platform = &p
	return d
}

func (ds documents) index(t testing.TB, ms ...ocispec.Descriptor) ocispec.Descriptor {
	t.Helper()
	raw := must(json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: ms}))(t)
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: ds.put(raw), Size: int64(len(raw))}
}

func TestResolve(t *testing.T) {
	ds, ctx := documents{}, context.Background()
	attestation := ds.image(t, "linux/amd64")
	attestation.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
	var ms []ocispec.Descriptor
	for _, p := range []string{"linux/arm/v5", "linux/arm/v7", "linux/386", "linux/amd64", "linux/arm64", "windows/amd64", "linux/riscv64"} {
		ms = append(ms, ds.image(t, p))
	}
	idx := ds.index(t, append([]ocispec.Descriptor{attestation, {MediaType: "application/x", Digest: anyDigest}}, ms...)...)
	for want, got := range map[string]string{
		"linux/amd64": "linux/amd64", "linux/386": "linux/386", "linux/arm64": "linux/arm64", "linux/arm64/v8": "linux/arm64", "linux/arm/v7": "linux/arm/v7",
		"linux/arm/v6": "linux/arm/v5", "linux/arm/v8": "linux/arm/v7", "linux/arm": "linux/arm/v7", "linux/riscv64": "linux/riscv64", "linux/aarch64": "linux/arm64",
		"linux/amd64/v3": "linux/amd64", "linux/s390x": "", "linux/arm/v4": "", "freebsd/amd64": "",
	} {
		img, err := Resolve(ctx, ds.get, idx, platforms.MustParse(want))
		if got == "" {
			if err == nil || !strings.Contains(err.Error(), "linux/arm/v5, linux/arm/v7, linux/386") || strings.Contains(err.Error(), "unknown") {
				t.Errorf("%s: error is %v", want, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", want, err)
			continue
		}
		if p := platforms.Format(*img.Manifest.Platform); p != platforms.Format(platforms.Normalize(platforms.MustParse(got))) || img.Digest != idx.Digest {
			t.Errorf("%s: got %s", want, p)
		}
	}
	// An index in an index; no platform asked for; one that is not said.
	nested := ds.index(t, ds.index(t, ms[3]))
	if img := must(Resolve(ctx, ds.get, nested, platforms.MustParse("linux/amd64")))(t); img.Manifest.Digest != ms[3].Digest {
		t.Errorf("nested: %s", img.Manifest.Digest)
	}
	silent := ms[4]
	silent.Platform = nil
	other := ms[3]
	other.Platform = nil
	if img := must(Resolve(ctx, ds.get, ds.index(t, other, silent), platforms.MustParse("linux/arm64")))(t); img.Manifest.Digest != silent.Digest {
		t.Errorf("without platforms: %s", img.Manifest.Digest)
	}
	// A manifest is what it is.
	if img := must(Resolve(ctx, ds.get, ms[6], platforms.MustParse("linux/amd64")))(t); img.Manifest.Digest != ms[6].Digest {
		t.Errorf("a manifest: %s", img.Manifest.Digest)
	}
	for i := range 5 {
		nested = ds.index(t, nested)
		if _, err := Resolve(ctx, ds.get, nested, platforms.MustParse("linux/amd64")); i > 2 && err == nil {
			t.Error("indexes nested too deeply were followed")
		}
	}
}

func TestResolveVerifies(t *testing.T) {
	ds, ctx := documents{}, context.Background()
	m := ds.image(t, "linux/amd64")
	idx := ds.index(t, m)
	amd64 := platforms.MustParse("linux/amd64")
	config := must(Resolve(ctx, ds.get, idx, amd64))(t).ID()
	for _, d := range []digest.Digest{idx.Digest, m.Digest, config} {
		whole := ds[d]
		ds[d] = append([]byte(" "), whole...)
		if _, err := Resolve(ctx, ds.get, idx, amd64); err == nil || !strings.Contains(err.Error(), "announced") {
			t.Errorf("changed content gave %v", err)
		}
		delete(ds, d)
		if _, err := Resolve(ctx, ds.get, idx, amd64); err == nil {
			t.Error("missing content gave no error")
		}
		ds[d] = whole
	}
}

func FuzzDescribe(f *testing.F) {
	img, err := Assemble(AssembleOptions{Config: []byte(`{"architecture":"amd64","os":"linux","history":[{"created":"2020-01-01T00:00:00Z"},{"empty_layer":true}]}`), Layers: assembleLayers(2)})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(img.RawManifest, img.RawConfig)
	f.Add([]byte(`{"manifests":[{"digest":"`+anyDigest+`","platform":{"os":"linux","os.features":["x"]}}]}`), []byte(`{"os":"linux","architecture":"x","rootfs":null,"created":null}`))
	f.Fuzz(func(t *testing.T, raw, config []byte) {
		if m, err := ParseManifest(raw, ""); err == nil {
			for _, l := range m.Layers {
				if l.Digest.Validate() != nil || l.Size < 0 {
					t.Fatalf("accepted layer %+v", l)
				}
			}
			_, _ = New(ocispec.Descriptor{}, raw, config, "")
		}
		if idx, err := ParseIndex(raw, ""); err == nil {
			r := resolver{match: platforms.Only(platforms.MustParse("linux/amd64"))}
			r.choose(idx.Manifests)
			offered(idx.Manifests)
		}
		_, _ = ParseConfig(config)
		_, _ = parseDockerManifest(raw)
		img, err := Assemble(AssembleOptions{Config: config, BaseConfig: config, Layers: assembleLayers(2), Epoch: epoch(1)})
		if err == nil && len(img.Layers) != 2 {
			t.Fatalf("assembled %d layers", len(img.Layers))
		}
	})
}
