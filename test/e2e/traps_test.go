package e2e

import (
	"archive/tar"
	"compress/gzip"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/kiln-build/kiln/internal/registry/registrytest"
	"github.com/kiln-build/kiln/test/compare"
	"github.com/kiln-build/kiln/test/kilnrun"
)

// The traps of docs/kaniko-traps.md that need a whole build to be seen.

// counted is a bed whose registry counts, with busybox in it.
func counted(t *testing.T) (*kilnrun.Bed, *registrytest.Registry) {
	t.Helper()
	bed := kilnrun.Open(t, busybox)
	reg := registrytest.New(t, registrytest.Options{})
	pushBases(t, reg.Host(), busybox)
	bed.Host = reg.Host()
	return bed, reg
}

// dockerfile makes a context that is a Dockerfile and perhaps more.
func dockerfile(t *testing.T, bed *kilnrun.Bed, dir, text string, more files) string {
	t.Helper()
	all := files{"Dockerfile": text}
	for k, v := range more {
		all[k] = v
	}
	return all.write(t, filepath.Join(bed.Dir, dir))
}

func open(t *testing.T, ref string) v1.Image {
	t.Helper()
	img, err := compare.Open(ref)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func layersOf(t *testing.T, ref string) (digests []string) {
	t.Helper()
	m, err := open(t, ref).Manifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range m.Layers {
		digests = append(digests, l.Digest.String())
	}
	return digests
}

// derive pushes to ref what change makes of busybox.
func derive(t *testing.T, host, ref string, change func(v1.Image) (v1.Image, error)) {
	t.Helper()
	img, err := change(open(t, host+"/"+busybox))
	if err != nil {
		t.Fatal(err)
	}
	to, err := name.ParseReference(host+"/"+ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(to, img); err != nil {
		t.Fatal(err)
	}
}

// TestTrapBaseAnnotations: annotations of the base image's manifest are not the image's.
func TestTrapBaseAnnotations(t *testing.T) {
	guard(t)
	bed := kilnrun.Open(t, busybox)
	derive(t, bed.Host, "base:annotated", func(img v1.Image) (v1.Image, error) {
		img = mutate.MediaType(img, types.OCIManifestSchema1)
		return mutate.Annotations(img, map[string]string{"org.opencontainers.image.title": "the base", "secret": "x"}).(v1.Image), nil
	})
	if m, err := open(t, bed.Host+"/base:annotated").Manifest(); err != nil || m.Annotations["secret"] != "x" {
		t.Fatalf("the base has %v, %v", m.Annotations, err)
	}
	dir := dockerfile(t, bed, "context", "ARG REGISTRY\nFROM ${REGISTRY}/base:annotated\nRUN true\n", nil)
	ref, _ := bed.Build(t, dir, "plain")
	if m, err := open(t, ref).Manifest(); err != nil || len(m.Annotations) != 0 {
		t.Errorf("the image has %v, %v", m.Annotations, err)
	}
	ref, _ = bed.Build(t, dir, "own", "--annotation", "own=1")
	if m, err := open(t, ref).Manifest(); err != nil || len(m.Annotations) != 1 || m.Annotations["own"] != "1" {
		t.Errorf("the image has %v, %v", m.Annotations, err)
	}
}

// TestTrapScratchIsOCI: an image without a base has OCI's media types, and one on a base with
// docker's does not inherit those.
func TestTrapScratchIsOCI(t *testing.T) {
	guard(t)
	bed := kilnrun.Open(t, busybox)
	derive(t, bed.Host, "base:docker", func(img v1.Image) (v1.Image, error) {
		return mutate.ConfigMediaType(mutate.MediaType(img, types.DockerManifestSchema2), types.DockerConfigJSON), nil
	})
	for from, text := range map[string]string{
		"scratch": "FROM scratch\nCOPY Dockerfile /\n", "docker": "ARG REGISTRY\nFROM ${REGISTRY}/base:docker\nCOPY Dockerfile /\n",
	} {
		ref, _ := bed.Build(t, dockerfile(t, bed, from, text, nil), from)
		m, err := open(t, ref).Manifest()
		if err != nil {
			t.Fatal(err)
		}
		if m.MediaType != types.OCIManifestSchema1 || m.Config.MediaType != types.OCIConfigJSON {
			t.Errorf("%s: %s, config %s", from, m.MediaType, m.Config.MediaType)
		}
		for _, l := range m.Layers {
			if l.MediaType != types.OCILayer {
				t.Errorf("%s: a layer is %s", from, l.MediaType)
			}
		}
		ref, _ = bed.Build(t, filepath.Join(bed.Dir, from), from+"-docker", "-o", "type=registry,oci-mediatypes=false")
		if m, err := open(t, ref).Manifest(); err != nil || m.MediaType != types.DockerManifestSchema2 || m.Layers[0].MediaType != types.DockerLayer {
			t.Errorf("%s with oci-mediatypes=false: %+v, %v", from, m, err)
		}
	}
}

// TestTrapLinkTargets: names and targets of hard links in a layer's tar are
// relative, and the target comes before the link.
func TestTrapLinkTargets(t *testing.T) {
	guard(t)
	bed := kilnrun.Open(t, busybox)
	dir := dockerfile(t, bed, "context", `ARG REGISTRY
FROM ${REGISTRY}/library/busybox:latest AS a
RUN mkdir -p /h/d && echo 1 > /h/z && ln /h/z /h/a && ln /h/z /h/d/m && ln -s /h/z /h/sym
FROM ${REGISTRY}/library/busybox:latest
COPY --from=a /h /h
`, nil)
	ref, _ := bed.Build(t, dir, "links")
	ls, err := open(t, ref).Layers()
	if err != nil {
		t.Fatal(err)
	}
	blob, err := ls[len(ls)-1].Compressed()
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	z, err := gzip.NewReader(blob)
	if err != nil {
		t.Fatal(err)
	}
	seen, links := map[string]bool{}, 0
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if filepath.IsAbs(h.Name) || strings.Contains(h.Name, "..") {
			t.Errorf("an entry is called %q", h.Name)
		}
		if h.Typeflag == tar.TypeLink {
			links++
			if filepath.IsAbs(h.Linkname) || !seen[h.Linkname] {
				t.Errorf("%q is a link to %q", h.Name, h.Linkname)
			}
		}
		if h.Typeflag == tar.TypeSymlink && h.Linkname != "/h/z" {
			t.Errorf("%q leads to %q: what it says is its own business", h.Name, h.Linkname)
		}
		seen[h.Name] = true
	}
	if links != 2 {
		t.Errorf("%d links, not 2", links)
	}
}

// TestTrapWhiteoutsOfCachedStage: COPY --from of a stage that comes from the cache takes no markers
// of what was deleted there, and deletes nothing here.
func TestTrapWhiteoutsOfCachedStage(t *testing.T) {
	guard(t)
	bed := kilnrun.Open(t, busybox)
	text := `ARG REGISTRY
FROM ${REGISTRY}/library/busybox:latest AS a
RUN mkdir -p /d/sub /e && echo 1 > /d/gone && echo 2 > /d/sub/gone && echo 3 > /d/stays && echo 4 > /e/gone
RUN rm /d/gone && rm -r /d/sub && mkdir /d/sub && echo 5 > /d/sub/new && rm /e/gone
FROM ${REGISTRY}/library/busybox:latest
RUN mkdir -p /d/sub && echo mine > /d/gone && echo mine > /d/sub/gone
COPY --from=a /d /d
COPY --from=a / /all/
LABEL round=%d
`
	for round := range 2 {
		dir := dockerfile(t, bed, fmt.Sprint("context", round), fmt.Sprintf(text, round)+strings.Repeat("RUN true\n", round), nil)
		ref, out := bed.Build(t, dir, "whiteouts")
		if round == 1 && !strings.Contains(out, "CACHED") {
			t.Fatalf("nothing came from the cache:\n%s", out)
		}
		all := rootfs(t, ref)
		for p, want := range map[string]string{
			"/d/gone": "mine\n", "/d/sub/gone": "mine\n", "/d/stays": "3\n", "/d/sub/new": "5\n", "/all/d/stays": "3\n", "/all/d/sub/new": "5\n",
		} {
			if all[p].Data != want {
				t.Errorf("round %d: %s is %q, want %q", round, p, all[p].Data, want)
			}
		}
		for p := range all {
			if strings.Contains(p, ".wh.") || p == "/all/d/gone" || p == "/all/e/gone" || p == "/all/d/sub/gone" {
				t.Errorf("round %d: %s is in the image", round, p)
			}
		}
	}
}

// TestTrapMountedPaths: paths that are mounted, read-only, in the builder's own view of the machine
// are paths like all others in the image. The builder sees all of the machine so.
func TestTrapMountedPaths(t *testing.T) {
	guard(t)
	bed := kilnrun.Open(t, debian)
	var paths []string // that both the machine and the base image have
	for _, p := range []string{"/etc/os-release", "/usr/lib/os-release", "/etc/debian_version", "/etc/passwd", "/usr/bin/env", "/bin/ls"} {
		if _, err := os.Stat(p); err == nil {
			paths = append(paths, p)
		}
	}
	if len(paths) == 0 {
		t.Skip("this machine has nothing in common with the base image")
	}
	before := map[string]string{}
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		before[p] = string(b)
	}
	text := "ARG REGISTRY\nFROM ${REGISTRY}/library/debian:bookworm\nRUN mkdir -p /run/nvidia && echo in > /run/nvidia/socket\nCOPY f /etc/os-release\n"
	for _, p := range paths[1:] {
		text += fmt.Sprintf("COPY f %s\n", p)
	}
	ref, _ := bed.Build(t, dockerfile(t, bed, "context", text, files{"f": "replaced\n"}), "mounted")
	all := rootfs(t, ref)
	for _, p := range paths {
		real := strings.Replace(p, "/bin/", "/usr/bin/", 1) // where Debian's link leads
		if strings.HasPrefix(p, "/usr/") {
			real = p
		}
		if e := all[real]; e.Header != nil && e.Typeflag == tar.TypeSymlink {
			real = filepath.Join(filepath.Dir(real), e.Linkname)
		}
		if all[real].Data != "replaced\n" {
			t.Errorf("%s is %q in the image", p, all[real].Data)
		}
		if b, err := os.ReadFile(p); err != nil || string(b) != before[p] {
			t.Errorf("%s of the machine has changed: %v", p, err)
		}
	}
	if all["/run/nvidia/socket"].Data != "in\n" {
		t.Error("/run is not in the image")
	}
}

// TestTrapEpochKeepsBaseLayers: with SOURCE_DATE_EPOCH the base image's layers stay, byte
// by byte, though they are younger.
func TestTrapEpochKeepsBaseLayers(t *testing.T) {
	guard(t)
	bed := kilnrun.Open(t, busybox)
	dir := dockerfile(t, bed, "context", "ARG REGISTRY\nFROM ${REGISTRY}/library/busybox:latest\nRUN echo x > /x\nCOPY Dockerfile /\n", nil)
	base := layersOf(t, bed.Host+"/"+busybox)
	ref, _ := bed.Build(t, dir, "epoch", "--build-arg", "SOURCE_DATE_EPOCH=1000")
	have := layersOf(t, ref)
	if len(have) != len(base)+2 || !slices.Equal(have[:len(base)], base) {
		t.Errorf("layers %v on base %v", have, base)
	}
	for _, p := range []string{"/x", "/Dockerfile"} {
		if e := rootfs(t, ref)[p]; e.ModTime.Unix() != 1000 {
			t.Errorf("%s is of %v", p, e.ModTime)
		}
	}
}

// TestTrapAmbiguousKeys: what looks the same once it is strung together is not taken for
// the same, in steps, arguments, names and contents of files.
func TestTrapAmbiguousKeys(t *testing.T) {
	guard(t)
	bed := kilnrun.Open(t, busybox)
	const args = "ARG REGISTRY\nFROM ${REGISTRY}/library/busybox:latest\nARG A\nARG B\nRUN echo \"$A|$B\" > /out\n"
	const copies = "ARG REGISTRY\nFROM ${REGISTRY}/library/busybox:latest\nCOPY d /d\nRUN find /d -type f | sort | while read f; do echo \"$f=$(cat $f)\"; done > /out\n"
	const env = "ARG REGISTRY\nFROM ${REGISTRY}/library/busybox:latest\nENV %s\nRUN env | grep ^K | sort > /out\n"
	for i, c := range []struct {
		text string
		more files
		args []string
		want string
	}{
		{args, nil, []string{"--build-arg", "A=a-b", "--build-arg", "B=c"}, "a-b|c\n"},
		{args, nil, []string{"--build-arg", "A=a", "--build-arg", "B=b-c"}, "a|b-c\n"},
		{args, nil, []string{"--build-arg", "A=a|b", "--build-arg", "B="}, "a|b|\n"},
		{args, nil, []string{"--build-arg", "A=a", "--build-arg", "B=b|"}, "a|b|\n"},
		{copies, files{"d/ab": "c", "d/x": ""}, nil, "/d/ab=c\n/d/x=\n"},
		{copies, files{"d/a": "bc", "d/x": ""}, nil, "/d/a=bc\n/d/x=\n"},
		{copies, files{"d/a/b": "c", "d/x": ""}, nil, "/d/a/b=c\n/d/x=\n"},
		{copies, files{"d/a": "", "d/bc": "", "d/x": ""}, nil, "/d/a=\n/d/bc=\n/d/x=\n"},
		{fmt.Sprintf(env, `K1="a K2=b"`), nil, nil, "K1=a K2=b\n"},
		{fmt.Sprintf(env, `K1=a K2=b`), nil, nil, "K1=a\nK2=b\n"},
	} {
		ref, out := bed.Build(t, dockerfile(t, bed, fmt.Sprint("context", i), c.text, c.more), "keys", c.args...)
		if got := rootfs(t, ref)["/out"].Data; got != c.want {
			t.Errorf("case %d gave %q, want %q:\n%s", i, got, c.want, out)
		}
	}
}

// TestTrapArgsInText: arguments and environment in the text of COPY, ADD and WORKDIR
// are in their keys.
func TestTrapArgsInText(t *testing.T) {
	guard(t)
	bed := kilnrun.Open(t, busybox)
	dir := dockerfile(t, bed, "context", `ARG REGISTRY
FROM ${REGISTRY}/library/busybox:latest
ARG F=one
ARG D=x
COPY $F /copied
ENV E=$F
ADD ${E} /added
COPY --chown=$D:0 one /owned-$D
WORKDIR /w/$F
RUN pwd > /pwd
`, files{"one": "1", "two": "2"})
	for _, c := range []struct{ f, d, content string }{{"one", "5", "1"}, {"two", "5", "2"}, {"one", "6", "1"}, {"one", "5", "1"}} {
		ref, out := bed.Build(t, dir, "text", "--build-arg", "F="+c.f, "--build-arg", "D="+c.d)
		all := rootfs(t, ref)
		if all["/copied"].Data != c.content || all["/added"].Data != c.content || all["/pwd"].Data != "/w/"+c.f+"\n" ||
			fmt.Sprint(all["/owned-"+c.d].Uid) != c.d {
			t.Errorf("F=%s D=%s: %+v:\n%s", c.f, c.d, all["/owned-"+c.d], out)
		}
	}
}

// TestTrapOneBaseDownload: a base image that several stages start from, and several builds at
// once, is downloaded once.
func TestTrapOneBaseDownload(t *testing.T) {
	guard(t)
	bed, reg := counted(t)
	const text = `ARG REGISTRY
FROM ${REGISTRY}/library/busybox:latest AS a
RUN echo a > /a
FROM ${REGISTRY}/library/busybox:latest AS b
RUN echo b > /b
FROM ${REGISTRY}/library/busybox:latest
COPY --from=a /a /
COPY --from=b /b /
RUN echo %d > /c
`
	layers := len(layersOf(t, bed.Host+"/"+busybox))
	reg.ResetCounts()
	done := make(chan string)
	for i := range 3 {
		dir := dockerfile(t, bed, fmt.Sprint("context", i), fmt.Sprintf(text, i), nil)
		go func() {
			out, code, err := bed.Run(t.Context(), "build", "--progress", "plain", "--insecure-registry", bed.Host, "--build-arg", "REGISTRY="+bed.Host, dir)
			if err != nil || code != 0 {
				done <- fmt.Sprintf("exit code %d, %v\n%s", code, err, out)
				return
			}
			done <- ""
		}()
	}
	for range 3 {
		if failed := <-done; failed != "" {
			t.Error(failed)
		}
	}
	// Configs are blobs as well, and small: one for each build.
	if n := reg.Counts().BlobGets; n > layers+3 {
		t.Errorf("%d blobs were asked for; the base has %d layers", n, layers)
	}
}

// TestTrapBaseIsMounted: layers of the base image that the registry has in another repository
// are not sent.
func TestTrapBaseIsMounted(t *testing.T) {
	guard(t)
	bed, reg := counted(t)
	base := layersOf(t, bed.Host+"/"+busybox)
	dir := dockerfile(t, bed, "context", "ARG REGISTRY\nFROM ${REGISTRY}/library/busybox:latest\nCOPY Dockerfile /\n", nil)
	reg.ResetCounts()
	ref, _ := bed.Build(t, dir, "team/mounted")
	n := reg.Counts()
	if n.BlobMounts < len(base) || n.BlobPuts > 2 || n.BlobBytesSent > 100_000 {
		t.Errorf("pushing did %+v for %d layers of the base", n, len(base))
	}
	if have := layersOf(t, ref); !slices.Equal(have[:len(base)], base) {
		t.Errorf("layers %v on base %v", have, base)
	}
}

// TestTrapRelabel: another label makes another config, and no layer anew.
func TestTrapRelabel(t *testing.T) {
	guard(t)
	bed, reg := counted(t)
	dir := dockerfile(t, bed, "context", "ARG REGISTRY\nFROM ${REGISTRY}/library/busybox:latest\nRUN head -c 3000000 /dev/urandom > /big\n", nil)
	ref, _ := bed.Build(t, dir, "relabel", "--label", "version=1")
	first, before := layersOf(t, ref), digest(t, ref)
	reg.ResetCounts()
	ref, out := bed.Build(t, dir, "relabel", "--label", "version=2")
	n := reg.Counts()
	if have := layersOf(t, ref); !slices.Equal(have, first) || digest(t, ref) == before {
		t.Errorf("layers %v, before %v", have, first)
	}
	if n.BlobPuts != 1 || n.BlobBytesSent > 50_000 || n.BlobGets > 2 || len(executed(out)) > 0 {
		t.Errorf("a label cost %+v:\n%s", n, out)
	}
}

// TestTrapPulledBase: what was pulled beforehand is not downloaded by builds: `kiln pull` is what fills
// the store in advance.
func TestTrapPulledBase(t *testing.T) {
	guard(t)
	bed, reg := counted(t)
	if out, code := run(t, bed.Runner, "pull", "--insecure-registry", bed.Host, bed.Host+"/"+busybox); code != 0 {
		t.Fatal(out)
	}
	dir := dockerfile(t, bed, "context", "ARG REGISTRY\nFROM ${REGISTRY}/library/busybox:latest\nRUN cat /bin/busybox > /dev/null && echo x > /x\n", nil)
	build := []string{"build", "--progress", "plain", "--insecure-registry", bed.Host, "--build-arg", "REGISTRY=" + bed.Host, "--network", "none", dir}
	reg.ResetCounts()
	if out, code := run(t, bed.Runner, build...); code != 0 {
		t.Fatal(out)
	}
	if n := reg.Counts(); n.Requests != 0 {
		t.Errorf("a build on a pulled image asked for %+v", n)
	}
	// --pull asks whether it is still the same, and gets what is not.
	newBase(t, bed.Host)
	next, err := name.ParseReference(bed.Host+"/library/busybox:next", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(next)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Tag(next.Context().Tag("latest"), img); err != nil {
		t.Fatal(err)
	}
	out, code := run(t, bed.Runner, append(build[:len(build)-1:len(build)-1], "--pull", "-o", "type=oci,tar=false,dest="+filepath.Join(bed.Work, "layout"), dir)...)
	if code != 0 {
		t.Fatal(out)
	}
	if n := reg.Counts(); n.BlobGets == 0 {
		t.Errorf("--pull asked for %+v", n)
	}
}

// TestTrapNothingLeft: a build leaves nothing anywhere but in its store: neither files of the image in the
// builder's root, nor temporary ones.
func TestTrapNothingLeft(t *testing.T) {
	guard(t)
	bed := kilnrun.Open(t, busybox)
	tmp := filepath.Join(bed.Work, "tmp")
	if err := os.Mkdir(tmp, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := kilnrun.Own(tmp); err != nil {
		t.Fatal(err)
	}
	bed.Env = append(bed.Env, "HOME="+bed.Work, "TMPDIR="+tmp)
	dir := dockerfile(t, bed, "context", `ARG REGISTRY
FROM ${REGISTRY}/library/busybox:latest AS a
RUN echo leaked > /leaked-by-kiln && mkdir -p /usr/share/leaked-by-kiln && echo 1 > /tmp/leaked-by-kiln
FROM ${REGISTRY}/library/busybox:latest
RUN test ! -e /leaked-by-kiln && test ! -e /tmp/leaked-by-kiln
COPY --from=a /leaked-by-kiln /
`, nil)
	bed.Build(t, dir, "left")
	if _, code := run(t, bed.Runner, "build", "--insecure-registry", bed.Host, "--build-arg", "REGISTRY=nowhere.invalid", dir); code == 0 {
		t.Error("a build without its base image works")
	}
	for _, p := range []string{"/leaked-by-kiln", "/usr/share/leaked-by-kiln", "/tmp/leaked-by-kiln"} {
		if _, err := os.Lstat(p); err == nil {
			t.Errorf("%s is on the machine", p)
		}
	}
	var left []string
	err := filepath.WalkDir(bed.Work, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if p == bed.Store() {
			return fs.SkipDir
		}
		if p != bed.Work && p != tmp {
			left = append(left, p)
		}
		return nil
	})
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
	if es, err := os.ReadDir(filepath.Join(bed.Store(), "tmp")); err != nil || len(es) > 0 {
		t.Errorf("left in the store's tmp: %v, %v", es, err)
	}
}
