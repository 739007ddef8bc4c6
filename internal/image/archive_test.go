package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/platforms"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func amd64() ocispec.Platform { return platforms.MustParse("linux/amd64") }

// build makes an image in the store.
func build(t testing.TB, st *store.Store, platform string, layers ...string) ocispec.Descriptor {
	t.Helper()
	p := platforms.MustParse(platform)
	opt := AssembleOptions{Config: []byte(fmt.Sprintf(`{"architecture":%q,"os":%q,"variant":%q}`, p.Architecture, p.OS, p.Variant))}
	for _, l := range layers {
		opt.Layers = append(opt.Layers, NewLayer{Layer: must(Commit(context.Background(), st, CommitOptions{Compression: layer.Gzip}, canonical(l, l+"-2")))(t)})
	}
	return must(Keep(st, must(Assemble(opt))(t)))(t)
}

func save(t testing.TB, st *store.Store, opt SaveOptions, images ...ToSave) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Save(context.Background(), st, &b, images, opt); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestSaveAndLoad(t *testing.T) {
	ctx := context.Background()
	st := newStore(t)
	one, two := build(t, st, "linux/amd64", "base", "one"), build(t, st, "linux/amd64", "base", "two")
	arm := build(t, st, "linux/arm64", "arm")
	raw, multi, err := AssembleIndex(IndexOptions{Manifests: []ocispec.Descriptor{one, arm}})
	if err != nil {
		t.Fatal(err)
	}
	must(st.PutBlob(raw))(t)
	images := []ToSave{
		{one, []string{"docker.io/library/one:latest", "docker.io/library/one:1"}},
		{two, nil},
		{multi, []string{"registry.example/multi:2"}},
	}
	for _, docker := range []bool{true, false} {
		b := save(t, st, SaveOptions{Docker: docker, Platform: amd64()}, images...)
		if !bytes.Equal(b, save(t, st, SaveOptions{Docker: docker, Platform: amd64()}, images...)) {
			t.Error("the same images gave another archive")
		}
		st2 := newStore(t)
		loaded := must(Load(ctx, st2, bytes.NewReader(b)))(t)
		if len(loaded) != 4 || loaded[0].Ref != "docker.io/library/one:latest" || loaded[0].Digest != one.Digest || loaded[2].Ref != "" || loaded[3].Digest != multi.Digest {
			t.Fatalf("loaded %+v", loaded)
		}
		must(st2.Prune(ctx, store.PruneOptions{}))(t)
		for _, ref := range []string{"one", "one:1", string(two.Digest), "registry.example/multi:2"} {
			img := must(FromStore(st2, ref, amd64()))(t)
			must(UnpackAll(ctx, st2, img.Layers, nil, nil))(t)
		}
		img := must(FromStore(st2, "registry.example/multi:2", platforms.MustParse("linux/arm64")))(t)
		if img.Manifest.Digest != arm.Digest {
			t.Errorf("image for arm64 is %s", img.Manifest.Digest)
		}
	}
}

// What is saved is also what another tool reads.
func TestSaveIsUnderstood(t *testing.T) {
	st := newStore(t)
	d := build(t, st, "linux/amd64", "base", "top")
	p := filepath.Join(t.TempDir(), "a.tar")
	os.WriteFile(p, save(t, st, SaveOptions{Docker: true, Platform: amd64()}, ToSave{d, []string{"docker.io/library/x:1"}}), 0o600)
	tag := must(name.NewTag("x:1"))(t)
	validImage(t, must(tarball.ImageFromPath(p, &tag))(t))
	dir := filepath.Join(t.TempDir(), "layout")
	if err := SaveLayout(context.Background(), st, dir, []ToSave{{d, []string{"docker.io/library/x:1"}}}, SaveOptions{}); err != nil {
		t.Fatal(err)
	}
	idx := must(layout.ImageIndexFromPath(dir))(t)
	for _, m := range must(idx.IndexManifest())(t).Manifests {
		validImage(t, must(idx.Image(m.Digest))(t))
	}
}

// validImage reads an image of two layers to its end with go-containerregistry.
func validImage(t *testing.T, img v1.Image) {
	t.Helper()
	config := must(img.ConfigFile())(t)
	layers := must(img.Layers())(t)
	if len(layers) != 2 || len(config.RootFS.DiffIDs) != 2 {
		t.Fatalf("%d layers, %d diff IDs", len(layers), len(config.RootFS.DiffIDs))
	}
	for i, l := range layers {
		if d := digestAll(t, l.Compressed); d != must(l.Digest())(t).String() {
			t.Errorf("layer %d has the digest %s", i, d)
		}
		if d := digestAll(t, l.Uncompressed); d != config.RootFS.DiffIDs[i].String() {
			t.Errorf("layer %d has the diff ID %s", i, d)
		}
	}
}

func digestAll(t *testing.T, open func() (io.ReadCloser, error)) string {
	t.Helper()
	r := must(open())(t)
	defer r.Close()
	return string(must(digest.FromReader(r))(t))
}

// And what other tools write is loaded.
func TestLoadOfOthers(t *testing.T) {
	ctx := context.Background()
	img := must(random.Image(1000, 3))(t)
	want := digest.Digest(must(img.ConfigName())(t).String())
	dir := t.TempDir()
	archive := filepath.Join(dir, "a.tar")
	if err := tarball.WriteToFile(archive, must(name.NewTag("registry.example/x:1"))(t), img); err != nil {
		t.Fatal(err)
	}
	lp := must(layout.Write(filepath.Join(dir, "layout"), must(random.Index(500, 2, 2))(t)))(t)
	if err := lp.AppendImage(img, layout.WithAnnotations(map[string]string{ocispec.AnnotationRefName: "registry.example/y:1"})); err != nil {
		t.Fatal(err)
	}
	st := newStore(t)
	loaded := must(LoadPath(ctx, st, archive))(t)
	if len(loaded) != 1 || loaded[0].Ref != "registry.example/x:1" || loaded[0].ID != want {
		t.Errorf("loaded %+v", loaded)
	}
	fromStore := must(FromStore(st, "registry.example/x:1", amd64()))(t)
	must(UnpackAll(ctx, st, fromStore.Layers, nil, nil))(t)

	loaded = must(LoadPath(ctx, st, string(lp)))(t)
	if len(loaded) != 3 || loaded[2].Ref != "registry.example/y:1" || loaded[2].ID != want {
		t.Errorf("loaded %+v", loaded)
	}
}

// file is one entry of an archive made by hand.
type file struct {
	name, content, link string
	kind                byte
	size                int64 // if not content's
	pax                 map[string]string
}

func archiveOf(t testing.TB, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Typeflag: f.kind, Linkname: f.link, Mode: 0o600, Size: int64(len(f.content)), PAXRecords: f.pax}
		if f.kind == 0 {
			h.Typeflag = tar.TypeReg
		}
		if f.size != 0 {
			h.Size = f.size
		}
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		io.WriteString(tw, f.content)
		if f.size != 0 {
			tw = tar.NewWriter(&b) // the old one would insist on the rest
		}
	}
	_ = tw.Close()
	return b.Bytes()
}

// oldDocker is an archive as docker wrote them until version 24: a layer that
// two images share is a link.
func oldDocker(t testing.TB, change func(files []file) []file) []byte {
	l1, l2 := string(makeTar(t, map[string]string{"f": "one"})), string(makeTar(t, map[string]string{"f": "two"}))
	config := fmt.Sprintf(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[%q,%q,%q]}}`, digestOf(l1), digestOf(l2), digestOf(l1))
	name := digestOf(config).Encoded() + ".json"
	files := []file{
		{name: "aaa/", kind: tar.TypeDir},
		{name: "aaa/VERSION", content: "1.0"},
		{name: "aaa/layer.tar", content: l1},
		{name: "bbb/layer.tar", content: l2},
		{name: "ccc/layer.tar", link: "../aaa/layer.tar", kind: tar.TypeSymlink},
		{name: name, content: config},
		{name: "manifest.json", content: fmt.Sprintf(`[{"Config":%q,"RepoTags":["busybox:1.36","localhost:5000/x:y"],"Layers":["aaa/layer.tar","bbb/layer.tar","ccc/layer.tar"]}]`, name)},
		{name: "repositories", content: "{}"},
	}
	if change != nil {
		files = change(files)
	}
	return archiveOf(t, files...)
}

func TestLoadOldDocker(t *testing.T) {
	ctx := context.Background()
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	z.Write(oldDocker(t, nil))
	z.Close()
	for name, b := range map[string][]byte{
		"plain": oldDocker(t, nil),
		"gzip":  zipped.Bytes(),
		"hard link": oldDocker(t, func(fs []file) []file {
			fs[4].kind, fs[4].link = tar.TypeLink, "aaa/layer.tar"
			return fs
		}),
		"dots": oldDocker(t, func(fs []file) []file {
			for i := range fs {
				fs[i].name = "./" + fs[i].name
			}
			return fs
		}),
	} {
		t.Run(name, func(t *testing.T) {
			st := newStore(t)
			loaded := must(Load(ctx, st, bytes.NewReader(b)))(t)
			if len(loaded) != 2 || loaded[0].Ref != "docker.io/library/busybox:1.36" || loaded[1].Ref != "localhost:5000/x:y" {
				t.Fatalf("loaded %+v", loaded)
			}
			img := must(FromStore(st, loaded[0].ID.Encoded()[:12], amd64()))(t)
			must(UnpackAll(ctx, st, img.Layers, nil, nil))(t)
			if s := readFile(t, st, img.Layers[1].DiffID, "f"); s != "two" {
				t.Errorf("content %q", s)
			}
			// To be sent it is compressed, and stays the same image.
			packed := must(Packed(ctx, st, img, layer.Gzip, 0))(t)
			if packed.ID() != img.ID() || packed.Layers[0].Blob.MediaType != MediaTypeDockerLayerGzip || packed.Layers[0].DiffID != img.Layers[0].DiffID {
				t.Errorf("packed: %s", packed.RawManifest)
			}
			if again := must(Packed(ctx, st, packed, layer.Gzip, 0))(t); again != packed {
				t.Error("packed twice")
			}
		})
	}
}

func TestLoadHostile(t *testing.T) {
	canary := filepath.Join(t.TempDir(), "canary")
	outside := strings.Repeat("../", 30) + strings.TrimPrefix(canary, "/")
	add := func(f ...file) func([]file) []file { return func(fs []file) []file { return append(f, fs...) } }
	manifest := func(s string) func([]file) []file {
		return func(fs []file) []file { fs[6].content = s; return fs }
	}
	for name, c := range map[string]struct {
		b    []byte
		want string // "": loads
	}{
		"nothing":             {nil, "neither"},
		"rubbish":             {[]byte(strings.Repeat("rubbish ", 1000)), "archive"},
		"cut":                 {oldDocker(t, nil)[:3000], "archive"},
		"path out":            {oldDocker(t, add(file{name: outside, content: "x"})), ""},
		"absolute path":       {oldDocker(t, add(file{name: canary, content: "x"})), ""},
		"link out":            {oldDocker(t, add(file{name: "l", kind: tar.TypeSymlink, link: "/"}, file{name: "l" + canary, content: "x"})), ""},
		"layer is a link out": {oldDocker(t, func(fs []file) []file { fs[4].link = "/etc/passwd"; return fs }), "not in the archive"},
		"link loop": {oldDocker(t, func(fs []file) []file {
			fs[4].link = "../ddd/layer.tar"
			return append(fs, file{name: "ddd/layer.tar", kind: tar.TypeSymlink, link: "../ccc/layer.tar"})
		}), "too many links"},
		"device":          {oldDocker(t, add(file{name: "d", kind: tar.TypeChar})), "do not belong"},
		"an exabyte":      {oldDocker(t, add(file{name: "big", size: 1 << 60})), "claims"},
		"sparse":          {sparseArchive(), "sparse"},
		"lying size":      {oldDocker(t, add(file{name: "short", content: "x", size: 1 << 30})), "archive"},
		"missing layer":   {oldDocker(t, func(fs []file) []file { return append(fs[:3], fs[4:]...) }), "not in the archive"},
		"missing config":  {oldDocker(t, func(fs []file) []file { return append(fs[:5], fs[6:]...) }), "not in the archive"},
		"another layer":   {oldDocker(t, func(fs []file) []file { fs[3].content = fs[2].content + fs[2].content; return fs }), "does not match"},
		"huge manifest":   {oldDocker(t, manifest(strings.Repeat(" ", maxArchiveText+1))), "more than"},
		"manifest null":   {oldDocker(t, manifest(`null`)), "no image"},
		"manifest {}":     {oldDocker(t, manifest(`{}`)), "not valid"},
		"manifest [null]": {oldDocker(t, manifest(`[null]`)), "not in the archive"},
		"bad name": {oldDocker(t, func(fs []file) []file {
			fs[6].content = strings.Replace(fs[6].content, "busybox", "../BUSY", 1)
			return fs
		}), "image name"},
		"fewer layers": {oldDocker(t, func(fs []file) []file {
			fs[6].content = strings.Replace(fs[6].content, `"aaa/layer.tar",`, "", 1)
			return fs
		}), "2 layers, but its config 3"},
		"lying blob": {archiveOf(t, file{name: "blobs/sha256/" + digestOf("x").Encoded(), content: "y"}), "does not match"},
		"layout without images": {archiveOf(t, file{name: "oci-layout", content: `{"imageLayoutVersion":"1.0.0"}`},
			file{name: "index.json", content: `{"schemaVersion":2,"manifests":[]}`}), "no image"},
		"layout of version 2": {archiveOf(t, file{name: "oci-layout", content: `{"imageLayoutVersion":"2.0.0"}`},
			file{name: "index.json", content: `{"schemaVersion":2,"manifests":[]}`}), "version"},
		"layout with nothing": {archiveOf(t, file{name: "oci-layout", content: `{"imageLayoutVersion":"1.0.0"}`},
			file{name: "index.json", content: `{"schemaVersion":2,"manifests":[{"mediaType":"` + ocispec.MediaTypeImageManifest + `","digest":"` + anyDigest + `","size":7}]}`}), "not in the archive"},
	} {
		t.Run(name, func(t *testing.T) {
			st := newStore(t)
			loaded, err := Load(context.Background(), st, bytes.NewReader(c.b))
			switch {
			case c.want == "" && (err != nil || len(loaded) != 2):
				t.Errorf("loaded %+v, %v", loaded, err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("error is %v, want %q", err, c.want)
			}
			if _, err := os.Lstat(canary); !errors.Is(err, fs.ErrNotExist) {
				t.Error("something was written outside of the store")
				os.Remove(canary)
			}
			if tags := must(st.Tags())(t); c.want != "" && len(tags) > 0 {
				t.Errorf("tags after a failure: %v", tags)
			}
		})
	}
}

// sparseArchive has a file of GNU's sparse format 1.0 that claims 1 TiB.
func sparseArchive() []byte {
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	data := "1\n1099511627776\n0\n"
	data += strings.Repeat("\x00", 512-len(data))
	_ = tw.WriteHeader(&tar.Header{
		Typeflag: tar.TypeReg, Name: "GNUSparseFile.0/big", Size: int64(len(data)), Format: tar.FormatPAX,
		PAXRecords: map[string]string{"XXX.sparse.major": "1", "XXX.sparse.minor": "0", "XXX.sparse.name": "big", "XXX.sparse.realsize": "1099511627776"},
	})
	io.WriteString(tw, data)
	_ = tw.Close()
	// archive/tar refuses to write such records: name them so afterwards.
	return bytes.ReplaceAll(b.Bytes(), []byte("XXX.sparse."), []byte("GNU.sparse."))
}

func TestLayout(t *testing.T) {
	st, ctx := newStore(t), context.Background()
	one, two, arm := build(t, st, "linux/amd64", "one"), build(t, st, "linux/amd64", "two"), build(t, st, "linux/arm64", "arm")
	dir := filepath.Join(t.TempDir(), "layout")
	put := func(images ...ToSave) {
		t.Helper()
		if err := SaveLayout(ctx, st, dir, images, SaveOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	resolve := func(what, platform string, want digest.Digest) *Image {
		t.Helper()
		img, err := must(OpenLayout(dir))(t).Resolve(ctx, what, platforms.MustParse(platform))
		switch {
		case want == "" && err == nil:
			t.Errorf("%q gave %s", what, img.Manifest.Digest)
		case want != "" && err != nil:
			t.Errorf("%q: %v", what, err)
		case want != "" && img.Manifest.Digest != want:
			t.Errorf("%q is %s, want %s", what, img.Manifest.Digest, want)
		}
		return img
	}
	put(ToSave{one, []string{"docker.io/library/x:1"}})
	resolve("", "linux/amd64", one.Digest)
	put(ToSave{two, []string{"docker.io/library/x:2"}})
	resolve("1", "linux/amd64", one.Digest)
	resolve("2", "linux/amd64", two.Digest)
	resolve("docker.io/library/x:2", "linux/amd64", two.Digest)
	resolve(string(one.Digest), "linux/amd64", one.Digest)
	resolve("", "linux/amd64", "")
	resolve("3", "linux/amd64", "")
	resolve(anyDigest, "linux/amd64", "")
	put(ToSave{two, []string{"docker.io/library/x:1"}}) // the tag moves
	resolve("1", "linux/amd64", two.Digest)
	raw, multi, err := AssembleIndex(IndexOptions{Manifests: []ocispec.Descriptor{two, arm}})
	if err != nil {
		t.Fatal(err)
	}
	must(st.PutBlob(raw))(t)
	put(ToSave{multi, []string{"docker.io/library/x:latest"}})
	resolve("", "linux/amd64", two.Digest)
	img := resolve("latest", "linux/arm64", arm.Digest)
	resolve(string(arm.Digest), "linux/amd64", arm.Digest)

	// Its layers can be used as any registry's, and are verified.
	l := must(OpenLayout(dir))(t)
	st2 := newStore(t)
	must(UnpackAll(ctx, st2, img.Layers, l, nil))(t)
	p := filepath.Join(dir, "blobs/sha256", img.Layers[0].Blob.Digest.Encoded())
	b := must(os.ReadFile(p))(t)
	for what, bad := range map[string][]byte{"cut": b[:len(b)-1], "longer": append(bytes.Clone(b), 'x'), "changed": append([]byte{0}, b[1:]...)} {
		os.WriteFile(p, bad, 0o600)
		r := must(l.Fetch(ctx, img.Layers[0]))(t)
		if _, err := io.Copy(io.Discard, r); err == nil {
			t.Errorf("%s: no error", what)
		}
		r.Close()
		if err := Fetch(ctx, newStore(t), img.Layers[0], l); err == nil {
			t.Errorf("%s: fetched", what)
		}
	}
	os.Remove(p)
	if _, err := l.Fetch(ctx, img.Layers[0]); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing blob gave %v", err)
	}
	if err := SaveLayout(ctx, st, t.TempDir()+"/..", nil, SaveOptions{}); err == nil {
		t.Error("a layout was written among other files")
	}
	if _, err := OpenLayout(t.TempDir()); err == nil {
		t.Error("an empty directory was taken for a layout")
	}
}

func TestFromStore(t *testing.T) {
	st := newStore(t)
	one, two := build(t, st, "linux/amd64", "one"), build(t, st, "linux/arm64", "two")
	for _, err := range []error{Tag(st, one, "debian", "localhost:5000/d:1"), Tag(st, two)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	id := must(FromStore(st, "debian", amd64()))(t).ID()
	for ref, want := range map[string]digest.Digest{
		"debian": one.Digest, "debian:latest": one.Digest, "docker.io/library/debian": one.Digest, "localhost:5000/d:1": one.Digest,
		string(one.Digest): one.Digest, one.Digest.Encoded(): one.Digest, one.Digest.Encoded()[:12]: one.Digest, string(one.Digest)[:20]: one.Digest,
		string(id): one.Digest, id.Encoded()[:12]: one.Digest, "debian@" + string(one.Digest): one.Digest, "whatever@" + string(one.Digest): one.Digest,
		string(two.Digest): two.Digest, two.Digest.Encoded()[:10]: two.Digest,
		"debian:1": "", "nothing": "", "": "", "../../etc/passwd": "", anyDigest: "", "ffff": "", "x@sha256:zz": "", strings.Repeat("x", 10_000): "",
	} {
		img, err := FromStore(st, ref, amd64())
		switch {
		case want == "" && !errors.Is(err, fs.ErrNotExist):
			t.Errorf("%.50q: error is %v", ref, err)
		case want != "" && err != nil:
			t.Errorf("%q: %v", ref, err)
		case want != "" && img.Manifest.Digest != want:
			t.Errorf("%q is %s", ref, img.Manifest.Digest)
		}
	}
	if img := must(FromStore(st, "debian", amd64()))(t); img.Ref != "docker.io/library/debian:latest" {
		t.Errorf("ref %q", img.Ref)
	}
	if err := Tag(st, one, "UPPER"); err == nil {
		t.Error("a bad name was taken")
	}
}

// Where layers came from is remembered, as long as the image is.
func TestOrigins(t *testing.T) {
	st, ctx := newStore(t), context.Background()
	img := must(Assemble(AssembleOptions{Config: []byte(`{"architecture":"amd64","os":"linux"}`), Layers: assembleLayers(2)}))(t)
	if err := Tag(st, must(Keep(st, img))(t), "x"); err != nil {
		t.Fatal(err)
	}
	must(st.Prune(ctx, store.PruneOptions{}))(t)
	got := must(FromStore(st, "x", amd64()))(t)
	if got.Layers[1].Origin != "r.example/layer1" || got.Layers[1].DiffID != img.Layers[1].DiffID {
		t.Errorf("layer %+v", got.Layers[1])
	}
}

func FuzzLoad(f *testing.F) {
	f.Add(oldDocker(f, nil))
	st := newStore(f)
	var b bytes.Buffer
	if err := Save(context.Background(), st, &b, []ToSave{{build(f, st, "linux/amd64", "x"), []string{"docker.io/library/x:1"}}}, SaveOptions{Docker: true, Platform: amd64()}); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Add(must(json.Marshal([]string{"x"}))(f))
	into := newStore(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		loaded, err := Load(context.Background(), into, bytes.NewReader(b))
		if err != nil {
			return
		}
		for _, l := range loaded {
			ref := l.Ref
			if ref == "" {
				ref = string(l.Digest)
			}
			if _, err := into.Tag(ref); err != nil {
				t.Fatalf("loaded %+v, but: %v", l, err)
			}
		}
	})
}
