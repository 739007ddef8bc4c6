package compare

import (
	"archive/tar"
	"bytes"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// e is one tar entry; content makes a file of it when no type is given.
type e struct {
	h       tar.Header
	content string
}

func file(name, content string) e {
	return e{h: tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644}, content: content}
}

func dir(name string) e {
	return e{h: tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: 0o755}}
}

func link(name, to string) e {
	return e{h: tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: to}}
}

func with(x e, edit func(*tar.Header)) e { edit(&x.h); return x }

func layerOf(t *testing.T, entries ...e) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, x := range entries {
		x.h.Size = int64(len(x.content))
		if err := w.WriteHeader(&x.h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, x.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func imageOf(t *testing.T, layers ...[]e) v1.Image {
	t.Helper()
	img := v1.Image(empty.Image)
	for _, l := range layers {
		var err error
		img, err = mutate.Append(img, mutate.Addendum{Layer: layerOf(t, l...), History: v1.History{CreatedBy: "x"}})
		if err != nil {
			t.Fatal(err)
		}
	}
	return img
}

func diffs(t *testing.T, a, b v1.Image, o Options) []string {
	t.Helper()
	r, err := Images(a, b, o)
	if err != nil {
		t.Fatal(err)
	}
	var d []string
	for _, x := range r.Diffs {
		d = append(d, x.Where)
	}
	return d
}

func TestFindsEachDifferenceOfANode(t *testing.T) {
	base := file("f", "abc")
	dev := e{h: tar.Header{Name: "f", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}}
	sym := e{h: tar.Header{Name: "f", Typeflag: tar.TypeSymlink, Linkname: "a"}}
	for _, c := range []struct {
		name string
		a, b e
		want []string
	}{
		{"nothing", base, base, nil},
		{"mode", base, with(base, func(h *tar.Header) { h.Mode = 0o755 }), []string{"/f: mode"}},
		{"setuid", base, with(base, func(h *tar.Header) { h.Mode = 0o4644 }), []string{"/f: mode"}},
		{"uid", base, with(base, func(h *tar.Header) { h.Uid = 7 }), []string{"/f: uid"}},
		{"gid", base, with(base, func(h *tar.Header) { h.Gid = 7 }), []string{"/f: gid"}},
		{"content", base, file("f", "abd"), []string{"/f: content"}},
		{"size", base, file("f", "abcd"), []string{"/f: size", "/f: content"}},
		{"type", base, dir("f"), []string{"/f: type"}},
		{"xattr missing", base, with(base, func(h *tar.Header) { h.PAXRecords = map[string]string{"SCHILY.xattr.user.k": "v"} }), []string{"/f: xattr user.k"}},
		{
			"capability", with(base, func(h *tar.Header) { h.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": "\x01"} }),
			with(base, func(h *tar.Header) { h.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": "\x02"} }),
			[]string{"/f: xattr security.capability"},
		},
		{"link target", sym, with(sym, func(h *tar.Header) { h.Linkname = "b" }), []string{"/f: link target"}},
		{"device", dev, with(dev, func(h *tar.Header) { h.Devminor = 5 }), []string{"/f: device"}},
		{"device type", dev, with(dev, func(h *tar.Header) { h.Typeflag = tar.TypeBlock }), []string{"/f: type"}},
		{"missing", base, file("g", "abc"), []string{"/f", "/g"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := diffs(t, imageOf(t, []e{c.a}), imageOf(t, []e{c.b}), Options{}); !slices.Equal(got, c.want) {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}

func TestMerging(t *testing.T) {
	same := func(name string, a, b v1.Image) {
		t.Helper()
		var left []string
		for _, d := range diffs(t, a, b, Options{}) {
			if strings.HasPrefix(d, "/") {
				left = append(left, d)
			}
		}
		if left != nil {
			t.Errorf("%s: %q differ", name, left)
		}
	}
	want := imageOf(t, []e{dir("d"), file("d/b", "2")})
	same("whiteout", imageOf(t, []e{dir("d"), file("d/a", "1"), file("d/b", "2")}, []e{file("d/.wh.a", "")}), want)
	same("whiteout of a directory", imageOf(t, []e{dir("d"), file("d/b", "2"), dir("e"), file("e/x", "")}, []e{file(".wh.e", "")}), want)
	same("opaque", imageOf(t, []e{dir("d"), file("d/a", "1")}, []e{dir("d"), file("d/b", "2"), file("d/.wh..wh..opq", "")}), want)
	same("a whiteout spares its own layer", imageOf(t, []e{file("d", "old")}, []e{dir("d"), file("d/b", "2"), file(".wh.d", "")}), want)
	same("file over directory over file", imageOf(t, []e{file("d", "")}, []e{dir("d"), file("d/x", "")}, []e{file("d", "")}, []e{dir("d"), file("d/b", "2")}), want)
	same("implied parent", imageOf(t, []e{file("d/b", "2")}), want)
	same("replaced", imageOf(t, []e{dir("d"), file("d/b", "1")}, []e{file("d/b", "2")}), want)
}

func TestHardLinkGroups(t *testing.T) {
	linked := imageOf(t, []e{file("a", "x"), link("b", "a"), link("c", "a")})
	copied := imageOf(t, []e{file("a", "x"), link("b", "a"), file("c", "x")})
	if got, want := diffs(t, linked, copied, Options{}), []string{"/a: hard links", "/b: hard links", "/c: hard links"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	upper := imageOf(t, []e{file("a", "x")}, []e{link("b", "a"), link("c", "a")})
	if got, want := diffs(t, linked, upper, Options{}), []string{"history: entries", "layers"}; !slices.Equal(got, want) {
		t.Errorf("link to a lower layer: %q, want %q", got, want)
	}
	broken := imageOf(t, []e{file("a", "x"), link("b", "a"), link("c", "a")}, []e{file("a", "y")})
	if got := diffs(t, linked, broken, Options{}); !slices.Contains(got, "/b: hard links") {
		t.Errorf("overwriting one name must leave the others linked, without it: %q", got)
	}
}

func TestMtimeAndIgnore(t *testing.T) {
	at := func(ns int64) v1.Image {
		return imageOf(t, []e{with(file("f", ""), func(h *tar.Header) { h.ModTime = time.Unix(1, ns); h.Format = tar.FormatPAX })})
	}
	if got := diffs(t, at(1), at(2), Options{}); got != nil {
		t.Errorf("times count although not asked for: %q", got)
	}
	if got := diffs(t, at(1), at(2), Options{Mtime: []string{"/f"}}); !slices.Equal(got, []string{"/f: mtime"}) {
		t.Errorf("%q", got)
	}
	a, b := imageOf(t, []e{file("v/l/x", "1"), file("v/y", "1")}), imageOf(t, []e{file("v/l/x", "2"), file("v/y", "2")})
	if got := diffs(t, a, b, Options{Ignore: []string{"/v/l/**"}}); !slices.Equal(got, []string{"/v/y: content"}) {
		t.Errorf("%q", got)
	}
}

func TestLayerContents(t *testing.T) {
	a := imageOf(t, []e{file("a", "x")}, []e{dir("d")})
	b := imageOf(t, []e{file("a", "x")}, []e{file("a", "x")}) // the same file, recorded again
	got := diffs(t, a, b, Options{Layers: true, Ignore: []string{"/d"}})
	if !slices.Equal(got, []string{"layer 1: /a"}) {
		t.Errorf("%q", got)
	}
	lower := []e{dir("d"), file("d/x", ""), file("d/y", "")}
	opaque := imageOf(t, lower, []e{dir("d"), file("d/.wh..wh..opq", "")})
	each := imageOf(t, lower, []e{dir("d"), file("d/.wh.x", ""), file("d/.wh.y", "")})
	if got := diffs(t, opaque, each, Options{Layers: true}); got != nil {
		t.Errorf("two ways of removing the same: %q", got)
	}
	one := imageOf(t, lower, []e{dir("d"), file("d/.wh.x", "")}, nil)
	if got := diffs(t, each, one, Options{Layers: true}); !slices.Contains(got, "layer 1: removed /d/y") {
		t.Errorf("%q", got)
	}
}

func TestProblems(t *testing.T) {
	img := imageOf(t, []e{file("a", ""), file("a", ""), file(".wh.none", ""), link("l", "/a"), link("m", "gone"), file("/abs", ""), file("x/../y", "")})
	r, err := Images(img, img, Options{})
	if err != nil {
		t.Fatal(err)
	}
	all := strings.Join(r.ProblemsA, "\n")
	for _, want := range []string{"/a is there twice", "whiteout of /none", "absolute target", "hard link /m to /gone", `name "/abs"`, `name "x/../y"`} {
		if !strings.Contains(all, want) {
			t.Errorf("no %q in:\n%s", want, all)
		}
	}
}

func TestFindsEachDifferenceOfAConfig(t *testing.T) {
	base := imageOf(t, []e{file("f", "")})
	edits := map[string]func(*v1.ConfigFile){
		"architecture": func(c *v1.ConfigFile) { c.Architecture = "riscv64" },
		"os":           func(c *v1.ConfigFile) { c.OS = "plan9" },
		"author":       func(c *v1.ConfigFile) { c.Author = "me" },
		"Env":          func(c *v1.ConfigFile) { c.Config.Env = []string{"A=1"} },
		"Cmd":          func(c *v1.ConfigFile) { c.Config.Cmd = []string{"a"} },
		"Entrypoint":   func(c *v1.ConfigFile) { c.Config.Entrypoint = []string{"a"} },
		"WorkingDir":   func(c *v1.ConfigFile) { c.Config.WorkingDir = "/w" },
		"User":         func(c *v1.ConfigFile) { c.Config.User = "u" },
		"ExposedPorts": func(c *v1.ConfigFile) { c.Config.ExposedPorts = map[string]struct{}{"1/tcp": {}} },
		"Volumes":      func(c *v1.ConfigFile) { c.Config.Volumes = map[string]struct{}{"/v": {}} },
		"Labels":       func(c *v1.ConfigFile) { c.Config.Labels = map[string]string{"l": "1"} },
		"Healthcheck":  func(c *v1.ConfigFile) { c.Config.Healthcheck = &v1.HealthConfig{Test: []string{"NONE"}} },
		"StopSignal":   func(c *v1.ConfigFile) { c.Config.StopSignal = "KILL" },
		"Shell":        func(c *v1.ConfigFile) { c.Config.Shell = []string{"/bin/sh"} },
		"OnBuild":      func(c *v1.ConfigFile) { c.Config.OnBuild = []string{"RUN x"} },
	}
	for field, edit := range edits {
		cf, err := base.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		cf = cf.DeepCopy()
		edit(cf)
		other, err := mutate.ConfigFile(base, cf)
		if err != nil {
			t.Fatal(err)
		}
		if got := diffs(t, base, other, Options{}); !slices.Equal(got, []string{"config: " + field}) {
			t.Errorf("%s: %q", field, got)
		}
	}
}

func TestHistoryAndLayerCount(t *testing.T) {
	a := imageOf(t, []e{file("f", "")})
	cf, err := a.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.History[0].CreatedBy, cf.History[0].EmptyLayer = "y", true
	b, err := mutate.ConfigFile(a, cf)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := diffs(t, a, b, Options{}), []string{"history 0: created_by", "history 0: empty_layer"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	two := imageOf(t, []e{file("f", "")}, []e{dir("d")})
	if got, want := diffs(t, a, two, Options{}), []string{"/d", "history: entries", "layers"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestMeaning(t *testing.T) {
	img := func(edit func(*v1.ConfigFile), layers ...[]e) v1.Image {
		t.Helper()
		img := imageOf(t, layers...)
		cf, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		cf = cf.DeepCopy()
		edit(cf)
		if img, err = mutate.ConfigFile(img, cf); err != nil {
			t.Fatal(err)
		}
		return img
	}
	a := img(func(c *v1.ConfigFile) {
		c.Config.Env, c.Config.Hostname, c.Config.WorkingDir = []string{"A=1", "B=2"}, "h", "/"
		c.History[0].CreatedBy = "y"
	}, []e{file("f", "x"), file("g", "")})
	same := img(func(c *v1.ConfigFile) { c.Config.Env = []string{"B=2", "A=1"} }, []e{file("f", "x")}, []e{file("g", "")})
	if got := diffs(t, a, same, Options{Meaning: true}); got != nil {
		t.Errorf("the same said in another way differs: %q", got)
	}
	other := img(func(c *v1.ConfigFile) { c.Config.Env, c.Config.WorkingDir = []string{"B=2", "A=2"}, "/w" }, []e{file("f", "y"), file("g", "")})
	want := []string{"/f: content", "config: Env", "config: WorkingDir"}
	if got := diffs(t, a, other, Options{Meaning: true}); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestOpenLayout(t *testing.T) {
	img := imageOf(t, []e{file("f", "x")})
	dir := t.TempDir()
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.AppendImage(img); err != nil {
		t.Fatal(err)
	}
	got, err := Open("oci:" + dir)
	if err != nil {
		t.Fatal(err)
	}
	if d := diffs(t, img, got, Options{}); d != nil {
		t.Errorf("%q", d)
	}
	if _, err := Open("oci:" + dir + "/none"); err == nil {
		t.Error("a layout that is not there opens")
	}
}
