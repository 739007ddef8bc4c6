package build_test

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/progress"
)

// spec is an output as it is given on a command line.
func spec(t *testing.T, s string) export.Spec {
	t.Helper()
	sp, err := export.ParseSpec(s)
	if err != nil {
		t.Fatal(err)
	}
	return sp
}

func twoPlatforms() []ocispec.Platform {
	return []ocispec.Platform{{OS: "linux", Architecture: "amd64"}, {OS: "linux", Architecture: "arm64"}}
}

// inLayout are the entries of a layout's index.json, and a document of it.
func inLayout(t *testing.T, dir string) (idx ocispec.Index, read func(d ocispec.Descriptor, v any)) {
	t.Helper()
	load := func(p string, v any) {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(dir, p))
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, v); err != nil {
			t.Fatal(err)
		}
	}
	load("index.json", &idx)
	return idx, func(d ocispec.Descriptor, v any) {
		t.Helper()
		load("blobs/sha256/"+d.Digest.Encoded(), v)
	}
}

// TestVariants: outputs of one build may differ in what the image is like, and have one content.
func TestVariants(t *testing.T) {
	w := newWorld(t)
	put(t, w.dir, "f", strings.Repeat("x", 5000))
	req := w.request("FROM BASE\nCOPY f /f\n")
	types := map[string]struct{ manifest, base, layer string }{
		"type=docker,tar=false": {ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerGzip},
		"type=oci,tar=false":    {ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerGzip},
		"type=oci,tar=false,compression=zstd,compression-level=19":       {ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd},
		"type=oci,tar=false,compression=zstd,force-compression=true":     {ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageLayerZstd, ocispec.MediaTypeImageLayerZstd},
		"type=oci,tar=false,compression=uncompressed":                    {ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayer},
		"type=oci,tar=false,oci-mediatypes=false":                        {image.MediaTypeDockerManifest, image.MediaTypeDockerLayerGzip, image.MediaTypeDockerLayerGzip},
		"type=oci,tar=false,oci-mediatypes=false,compression-level=9":    {image.MediaTypeDockerManifest, image.MediaTypeDockerLayerGzip, image.MediaTypeDockerLayerGzip},
		"type=oci,tar=false,rewrite-timestamp=false,oci-artifact=false":  {ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerGzip},
		"type=oci,tar=false,source-date-epoch=7,attestation-inline=true": {ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerGzip},
	}
	dirs := map[string]string{}
	for o := range types {
		dirs[o] = filepath.Join(t.TempDir(), "layout")
		req.Outputs = append(req.Outputs, spec(t, "dest="+dirs[o]+","+o))
	}
	w.mustRun(req)
	blobs := map[string]bool{}
	var id string
	for o, want := range types {
		idx, read := inLayout(t, dirs[o])
		var m ocispec.Manifest
		read(idx.Manifests[0], &m)
		base, l := m.Layers[0], m.Layers[len(m.Layers)-1]
		if m.MediaType != want.manifest || base.MediaType != want.base || l.MediaType != want.layer {
			t.Errorf("%s: manifest %s, base %s, layer %s", o, m.MediaType, base.MediaType, l.MediaType)
		}
		blobs[l.Digest.String()] = true
		if !strings.Contains(o, "source-date-epoch") {
			if id == "" {
				id = m.Config.Digest.String()
			}
			if m.Config.Digest.String() != id {
				t.Errorf("%s: the image's ID is %s, not %s", o, m.Config.Digest, id)
			}
		}
	}
	if len(blobs) != 6 { // gzip, gzip 9, zstd, zstd 19, plain, and with another time
		t.Errorf("%d different blobs: %v", len(blobs), blobs)
	}
}

func TestAnnotations(t *testing.T) {
	w := newWorld(t)
	put(t, w.dir, "f", "x")
	dir := filepath.Join(t.TempDir(), "layout")
	req := w.request("FROM scratch\nCOPY f /f\n", "x:1")
	req.Platforms = twoPlatforms()
	req.Outputs = []export.Spec{spec(t, "type=oci,tar=false,dest="+dir+",annotation.a=output,annotation-index.i=1,annotation-manifest-descriptor[linux/arm64].md=1")}
	for _, s := range []string{"a=flag", "Key.Of.Mine=v=w", "manifest[linux/amd64]:b=amd64", "manifest:b=all", "index,index-descriptor:c=both"} {
		as, err := export.ParseAnnotation(s)
		if err != nil {
			t.Fatal(err)
		}
		req.Annotations = append(req.Annotations, as...)
	}
	w.mustRun(req)
	top, read := inLayout(t, dir)
	if a := top.Manifests[0].Annotations; a["c"] != "both" || a["i"] != "" || a["org.opencontainers.image.ref.name"] != "1" {
		t.Errorf("the index's descriptor has %v", a)
	}
	var idx ocispec.Index
	read(top.Manifests[0], &idx)
	if a := idx.Annotations; len(a) != 2 || a["c"] != "both" || a["i"] != "1" {
		t.Errorf("the index has %v", a)
	}
	for i, want := range []struct{ b, md string }{{"amd64", ""}, {"all", "1"}} {
		if a := idx.Manifests[i].Annotations; a["md"] != want.md {
			t.Errorf("descriptor %d has %v", i, a)
		}
		var m ocispec.Manifest
		read(idx.Manifests[i], &m)
		if a := m.Annotations; len(a) != 3 || a["a"] != "flag" || a["Key.Of.Mine"] != "v=w" || a["b"] != want.b {
			t.Errorf("manifest %d has %v", i, a)
		}
	}
	for s, platforms := range map[string][]ocispec.Platform{"index:a=b": nil, "manifest[linux/s390x]:a=b": twoPlatforms()} {
		req := w.request("FROM scratch\n")
		req.Platforms = platforms
		as, err := export.ParseAnnotation(s)
		if err != nil {
			t.Fatal(err)
		}
		req.Annotations = as
		if _, err := w.run(context.Background(), req); diag.ExitCode(err) != diag.ExitUsage || len(w.events.names) > 0 {
			t.Errorf("%s: %v, after %v", s, err, w.events.names)
		}
	}
}

func TestNamesOfOutputs(t *testing.T) {
	w := newWorld(t)
	put(t, w.dir, "f", "x")
	repo := w.reg.Host() + "/names/app"
	for o, want := range map[string]struct {
		tags, pushed []string // @ stands for the digest
	}{
		"type=image,name-canonical=true":                               {[]string{repo + "@", repo + ":latest"}, nil},
		"type=image,dangling-name-prefix=none":                         {[]string{"docker.io/library/none@", repo + ":latest"}, nil},
		"type=image,dangling-name-prefix=d,danging-name-empty-only=1":  {[]string{repo + ":latest"}, nil},
		"type=image,push-by-digest=true,push=true,name-canonical=true": {[]string{repo + "@", repo + ":latest"}, []string{repo + "@"}},
		"type=registry,push-by-digest=true":                            {nil, []string{repo + "@"}},
		"type=image,store=false":                                       {nil, nil},
		"type=image,store=false,push=true":                             {nil, []string{repo + ":latest"}},
		"type=cacheonly":                                               {nil, nil},
	} {
		w.fresh()
		req := w.request("FROM scratch\nCOPY f /f\n", repo)
		req.Outputs = []export.Spec{spec(t, o)}
		res := w.mustRun(req)
		full := func(names []string) (out []string) {
			for _, n := range names {
				if strings.HasSuffix(n, "@") {
					n += res.Digest.String()
				}
				out = append(out, n)
			}
			slices.Sort(out)
			return out
		}
		tags := w.tags()
		slices.Sort(tags)
		if !slices.Equal(tags, full(want.tags)) || !slices.Equal(res.Pushed, full(want.pushed)) {
			t.Errorf("%s: tags %q, pushed %q", o, tags, res.Pushed)
		}
		for _, p := range res.Pushed {
			if !w.inRegistry(p) {
				t.Errorf("%s: %s is not in the registry", o, p)
			}
		}
	}
	w.fresh()
	nameless := w.request("FROM scratch\nCOPY f /f\n")
	nameless.Outputs = []export.Spec{spec(t, "type=image,dangling-name-prefix=d,danging-name-empty-only=1")}
	if res := w.mustRun(nameless); !slices.Equal(w.tags(), []string{"docker.io/library/d@" + res.Digest.String()}) {
		t.Errorf("without a name: %q", w.tags())
	}
	req := w.request("FROM scratch\n", repo+":tag")
	req.Outputs = []export.Spec{spec(t, "type=registry,push-by-digest=true")}
	if _, err := w.run(context.Background(), req); diag.ExitCode(err) != diag.ExitUsage || !strings.Contains(err.Error(), "has a tag") {
		t.Error(err)
	}
}

// TestFilesOfPlatforms: each platform's in a directory of its own, or all together.
func TestFilesOfPlatforms(t *testing.T) {
	w := newWorld(t)
	put(t, w.dir, "amd64", "a")
	put(t, w.dir, "arm64", "b")
	out := func(dockerfile, o string, platforms ...ocispec.Platform) (string, error) {
		dir := filepath.Join(t.TempDir(), "out")
		req := w.request(dockerfile)
		req.Platforms = platforms
		req.Outputs = []export.Spec{spec(t, "type=local,dest="+dir+o)}
		_, err := w.run(context.Background(), req)
		return dir, err
	}
	list := func(dir string) (all []string) {
		if err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				all = append(all, strings.TrimPrefix(p, dir+"/"))
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return all
	}
	const own, same = "FROM scratch\nARG TARGETARCH\nCOPY $TARGETARCH /bin/$TARGETARCH\n", "FROM scratch\nCOPY amd64 /bin/x\n"
	for _, c := range []struct {
		dockerfile, option string
		platforms          []ocispec.Platform
		want               []string
	}{
		{own, "", twoPlatforms(), []string{"linux_amd64/bin/amd64", "linux_arm64/bin/arm64"}},
		{same, "", twoPlatforms(), []string{"linux_amd64/bin/x", "linux_arm64/bin/x"}},
		{own, ",platform-split=false", twoPlatforms(), []string{"bin/amd64", "bin/arm64"}},
		{own, "", twoPlatforms()[:1], []string{"bin/amd64"}},
		{own, ",platform-split=true,mode=copy", twoPlatforms()[:1], []string{"linux_amd64/bin/amd64"}},
	} {
		dir, err := out(c.dockerfile, c.option, c.platforms...)
		if err != nil {
			t.Error(err)
			continue
		}
		if got := list(dir); !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", c.option, got, c.want)
		}
	}
	if _, err := out(same, ",platform-split=false", twoPlatforms()...); diag.ExitCode(err) != diag.ExitUsage || !strings.Contains(err.Error(), "overwrite bin/x from linux/amd64 with linux/arm64") {
		t.Errorf("two files of one name: %v", err)
	}
}

// TestIndexOfOne: an index although it is for one platform.
func TestIndexOfOne(t *testing.T) {
	w := newWorld(t)
	req := w.request("FROM scratch\nLABEL a=b\n", w.reg.Host()+"/one:1")
	req.BuildArgs["BUILDKIT_MULTI_PLATFORM"] = "true"
	req.Outputs = []export.Spec{{Type: export.Registry}}
	res := w.mustRun(req)
	if res.Descriptor.MediaType != ocispec.MediaTypeImageIndex || res.ID != res.Digest {
		t.Errorf("got %+v", res)
	}
	if !w.inRegistry(w.reg.Host() + "/one:1") {
		t.Error("not pushed")
	}
}

// TestEpochs: what counts for the image's times.
func TestEpochs(t *testing.T) {
	w := newWorld(t)
	put(t, w.dir, "f", "x")
	young := time.Unix(1_700_000_000, 0)
	if err := os.Chtimes(filepath.Join(w.dir, "f"), young, young); err != nil {
		t.Fatal(err)
	}
	mtime := func(dockerfile, arg, option string) int64 {
		w.stdout.Reset()
		req := w.request(dockerfile)
		if arg != "" {
			req.BuildArgs["SOURCE_DATE_EPOCH"] = arg
		}
		dir := filepath.Join(t.TempDir(), "layout")
		req.Outputs = []export.Spec{spec(t, "type=oci,tar=false,dest="+dir+option)}
		w.mustRun(req)
		ref := w.reg.Host() + "/read:1"
		again := build.Request{Context: w.dir, Tags: []string{ref}, BuildArgs: map[string]string{}, Contexts: map[string]string{"made": "oci-layout://" + dir}}
		put(t, w.dir, "Dockerfile", "FROM made\n")
		return w.files(again)["f"].ModTime.Unix()
	}
	const plain, own = "FROM scratch\nCOPY f /f\n", "ARG SOURCE_DATE_EPOCH=5\nFROM scratch\nCOPY f /f\n"
	for _, c := range []struct {
		dockerfile, arg, option string
		want                    int64
	}{
		{plain, "", "", young.Unix()},
		{plain, "3", "", 3},
		{plain, "1800000000", "", young.Unix()},
		{own, "", "", 5},
		{own, "3", "", 3},
		{own, "3", ",source-date-epoch=", young.Unix()},
		{plain, "3", ",rewrite-timestamp=false", young.Unix()},
		{plain, "3", ",source-date-epoch=4", 4},
		{plain, "", ",source-date-epoch=4,rewrite-timestamp=true", 4},
	} {
		if got := mtime(c.dockerfile, c.arg, c.option); got != c.want {
			t.Errorf("%q with %q%s: %d, want %d", c.dockerfile, c.arg, c.option, got, c.want)
		}
	}
}

// TestPublished: names are given in one step, which says them and the digests in BuildKit's words.
func TestPublished(t *testing.T) {
	w := newWorld(t)
	put(t, w.dir, "f", "x")
	req := w.request("FROM scratch\nCOPY f /f\n")
	ref := w.reg.Host() + "/said:1"
	req.Outputs = []export.Spec{spec(t, "type=image,push=true,name="+ref)}
	var b bytes.Buffer
	w.env.Progress = progress.NewRecorder(progress.NewRawJSON(&b))
	req.Compression = layer.Gzip
	res, err := build.Run(t.Context(), w.env, req)
	if err != nil {
		t.Fatal(err)
	}
	var step digest.Digest
	said := map[string]digest.Digest{}
	for d := json.NewDecoder(&b); d.More(); {
		var st progress.Status
		if err := d.Decode(&st); err != nil {
			t.Fatal(err)
		}
		for _, v := range st.Vertexes {
			if v.Name == "exporting to image" {
				step = v.Digest
			}
		}
		for _, s := range st.Statuses {
			if s.Completed != nil && s.Name == "" {
				said[s.ID] = s.Vertex
			}
		}
	}
	d := res.Digest.String()
	for _, id := range []string{
		"exporting manifest " + d, "exporting config " + res.ID.String(), "pushing layers", "pushing manifest for " + ref + "@" + d, "naming to " + ref,
	} {
		if step == "" || said[id] != step {
			t.Errorf("%q is not said in the step, but %q", id, said)
		}
	}
}
