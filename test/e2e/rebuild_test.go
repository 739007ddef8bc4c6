package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/kiln-build/kiln/internal/registry/registrytest"
	"github.com/kiln-build/kiln/test/compare"
	"github.com/kiln-build/kiln/test/kilnrun"
)

// rebuilt has two stages that depend on one file each, and a step on neither.
const rebuilt = `ARG REGISTRY
ARG TAG=latest
FROM ${REGISTRY}/library/busybox:${TAG} AS a
COPY a.txt /a.txt
RUN echo ran-a; tr a-z A-Z < /a.txt > /A.txt
FROM ${REGISTRY}/library/busybox:${TAG} AS b
COPY dir /dir
RUN echo ran-b; cat /dir/*.txt > /B.txt
FROM ${REGISTRY}/library/busybox:${TAG}
ARG UNUSED
ARG USED
RUN echo ran-base > /base
COPY --from=a /A.txt /
COPY --from=b /B.txt /
ARG LATE
RUN echo ran-last; cat /A.txt /B.txt > /all
`

// cachedBed is a bed whose registry counts what it is asked for.
type cachedBed struct {
	*kilnrun.Bed
	reg     *registrytest.Registry
	context string
}

func newCachedBed(t *testing.T) cachedBed {
	bed := kilnrun.Open(t, busybox)
	reg := registrytest.New(t, registrytest.Options{})
	pushBases(t, reg.Host(), busybox)
	bed.Host = reg.Host()
	dir := files{"Dockerfile": rebuilt, "a.txt": "first\n", "dir/1.txt": "one\n", "dir/2.txt": "two\n", "dir/sub/": ""}.
		write(t, filepath.Join(bed.Dir, "context"))
	old := time.Now().Add(-time.Hour)
	for _, f := range []string{"a.txt", "dir/1.txt", "dir/2.txt", "dir/sub", "dir"} {
		if err := os.Chtimes(filepath.Join(dir, f), old, old); err != nil {
			t.Fatal(err)
		}
	}
	return cachedBed{bed, reg, dir}
}

// rebuild builds and returns the digest, which steps ran, and the requests.
func (b cachedBed) rebuild(t *testing.T, args ...string) (string, []string, registrytest.Counts, string) {
	t.Helper()
	b.reg.ResetCounts()
	ref, out := b.Build(t, b.context, "rebuilt", args...)
	noPanic(t, out)
	n := b.reg.Counts()
	var ran []string
	for _, l := range executed(out) {
		if m := regexp.MustCompile(`ran-\w+`).FindString(l); m != "" {
			ran = append(ran, m)
		}
	}
	slices.Sort(ran)
	return digest(t, ref), ran, n, out
}

// notDone are the planned steps of a Dockerfile that were not cached: "RUN echo ran-a".
func notDone(out string) []string {
	names := map[string]string{}
	var did []string
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		if m := regexp.MustCompile(`^#(\d+) (\[(?:\w+ )?\d+/\d+\] .*)$`).FindStringSubmatch(line); m != nil {
			names[m[1]] = m[2]
		}
		if m := regexp.MustCompile(`^#(\d+) DONE`).FindStringSubmatch(line); m != nil && names[m[1]] != "" {
			did = append(did, names[m[1]])
		}
	}
	slices.Sort(did)
	return did
}

func TestUnchangedRebuild(t *testing.T) {
	guard(t)
	b := newCachedBed(t)
	d1, ran, n, out := b.rebuild(t)
	if want := []string{"ran-a", "ran-b", "ran-last"}; !slices.Equal(ran, want) {
		t.Fatalf("the first build ran %v:\n%s", ran, out)
	}
	if n.BlobPuts == 0 || n.ManifestPuts != 1 || n.BlobGets == 0 {
		t.Errorf("the first build asked for %+v", n)
	}
	start := time.Now()
	d2, ran, n, out := b.rebuild(t)
	took := time.Since(start)
	t.Logf("the unchanged rebuild took %v", took)
	if took > 30*time.Second {
		t.Errorf("the unchanged rebuild took %v", took)
	}
	if d1 != d2 {
		t.Errorf("the unchanged rebuild is %s, not %s", d2, d1)
	}
	if did := notDone(out); len(ran)+len(did) > 0 {
		t.Errorf("the unchanged rebuild did %q, ran %v:\n%s", did, ran, out)
	}
	for _, step := range []string{`\[a 2/3\] COPY`, `\[stage-2 5/5\] RUN|\[stage-2 [45]/5\]`} {
		if !regexp.MustCompile(`(?m)^#(\d+) ` + step).MatchString(out) {
			t.Errorf("no step %s is shown:\n%s", step, out)
		}
	}
	// The base image's config is read, and one upload begun and given up, to
	// find out whether pushing is allowed.
	if n.BlobPuts+n.BlobMounts != 0 || n.BlobBytesSent != 0 || n.UploadStarts > 1 || n.BlobGets > 1 {
		t.Errorf("the unchanged rebuild moved something: %+v", n)
	}
}

func TestWhatRebuilds(t *testing.T) {
	guard(t)
	b := newCachedBed(t)
	first, _, _, _ := b.rebuild(t)
	set := func(name, content string) func(*testing.T) {
		return func(t *testing.T) { files{name: content}.write(t, b.context) }
	}
	for _, c := range []struct {
		name   string
		change func(t *testing.T)
		args   []string
		ran    []string
		same   bool // as the first build
	}{
		{name: "touch", same: true, change: func(t *testing.T) {
			now := time.Now()
			for _, f := range []string{"a.txt", "dir/1.txt", "dir", "dir/sub", "Dockerfile"} {
				if err := os.Chtimes(filepath.Join(b.context, f), now, now); err != nil {
					t.Fatal(err)
				}
			}
		}},
		{name: "rewritten with the same", same: true, change: set("a.txt", "first\n")},
		{name: "unused arg", same: true, args: []string{"--build-arg", "UNDECLARED=1"}},
		{name: "a file that is not copied", same: true, change: set("other.txt", "new\n")},
		{name: "another file's comment", same: true, change: set("Dockerfile", "# what follows\n"+rebuilt)},
		{name: "a.txt", change: set("a.txt", "second\n"), ran: []string{"ran-a", "ran-last"}},
		{name: "a.txt back", same: true, change: set("a.txt", "first\n")},
		{name: "one of the directory", change: set("dir/2.txt", "TWO\n"), ran: []string{"ran-b", "ran-last"}},
		{name: "one more in the directory, not seen", change: set("dir/sub/x", "x"), ran: []string{"ran-b"}},
		{name: "mode", change: func(t *testing.T) {
			if err := os.Chmod(filepath.Join(b.context, "a.txt"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := kilnrun.Own(b.context); err != nil {
				t.Fatal(err)
			}
		}, ran: []string{"ran-a"}},
		{name: "no-cache", args: []string{"--no-cache"}, ran: []string{"ran-a", "ran-b", "ran-last"}},
		{name: "late arg", args: []string{"--build-arg", "LATE=1"}, ran: []string{"ran-last"}},
		{name: "base", change: func(t *testing.T) { newBase(t, b.Host) }, args: []string{"--build-arg", "TAG=next"}, ran: []string{"ran-a", "ran-b", "ran-last"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.change != nil {
				c.change(t)
			}
			d, ran, _, out := b.rebuild(t, c.args...)
			if !slices.Equal(ran, c.ran) {
				t.Errorf("ran %v, not %v:\n%s", ran, c.ran, out)
			}
			if c.same && d != first {
				t.Errorf("made another image: %s, not %s", d, first)
			}
			if did := notDone(out); c.same && len(did) > 0 {
				t.Errorf("did %q", did)
			}
			again, ran, n, out := b.rebuild(t, slices.DeleteFunc(slices.Clone(c.args), func(a string) bool { return a == "--no-cache" })...)
			if again != d || len(ran) > 0 || n.BlobPuts > 0 {
				t.Errorf("built once more it is %s, not %s, ran %v and sent %+v:\n%s", again, d, ran, n, out)
			}
		})
	}
}

// TestMovedTag: a base image whose tag says something else now is asked for,
// and everything on it is made anew.
func TestMovedTag(t *testing.T) {
	guard(t)
	b := newCachedBed(t)
	first, _, _, _ := b.rebuild(t)
	newBase(t, b.Host)
	next, err := name.ParseReference(b.Host+"/library/busybox:next", name.Insecure)
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
	d, ran, _, out := b.rebuild(t)
	if d == first || !slices.Equal(ran, []string{"ran-a", "ran-b", "ran-last"}) {
		t.Errorf("with another base image ran %v:\n%s", ran, out)
	}
	if got := rootfs(t, b.Host+"/rebuilt")["/new"].Data; got == "" {
		t.Error("the image is not on its new base")
	}
}

// newBase pushes busybox:next, which differs from busybox:latest.
func newBase(t *testing.T, host string) {
	t.Helper()
	img, err := compare.Open(host + "/" + busybox)
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	l := tarLayer(t, tarEntry{Name: "new", Body: fmt.Sprint(time.Now().UnixNano())})
	next, err := mutate.AppendLayers(empty.Image, append(slices.Clone(layers), l)...)
	if err != nil {
		t.Fatal(err)
	}
	c, err := next.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	c.OS, c.Architecture, c.Config = config.OS, config.Architecture, config.Config
	if next, err = mutate.ConfigFile(next, c); err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(host+"/library/busybox:next", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, next); err != nil {
		t.Fatal(err)
	}
}
