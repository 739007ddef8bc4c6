package e2e

import (
	"archive/tar"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/kiln-build/kiln/test/compare"
	"github.com/kiln-build/kiln/test/kilnrun"
	"github.com/kiln-build/kiln/test/testenv"
	"github.com/kiln-build/kiln/test/workloads"
)

// metadata reads what a client has written of its build.
func metadata(t *testing.T, file string) (digest, name string) {
	t.Helper()
	var m struct {
		Digest string `json:"containerimage.digest"`
		Name   string `json:"image.name"`
	}
	if err := json.Unmarshal([]byte(read(t, file)), &m); err != nil || m.Digest == "" {
		t.Fatalf("%s has no digest: %v", read(t, file), err)
	}
	return m.Digest, m.Name
}

// TestClientsWorkloads builds and pushes W1 to W4 with unmodified buildctl and buildx, each half of them first, since
// executing all twice would double the minutes that this takes. The other client profits from that, and pushes to another
// registry: it is the same image, and whole.
func TestClientsWorkloads(t *testing.T) {
	guard(t)
	var bases []string
	var all []workloads.Workload
	for _, name := range []string{"W1", "W2", "W3", "W4"} {
		w, err := workloads.Find(name)
		if err != nil {
			t.Fatal(err)
		}
		all, bases = append(all, w), append(bases, w.Bases...)
	}
	bed := kilnrun.Open(t, bases...)
	other, err := testenv.StartRegistry("127.0.0.1:0", filepath.Join(bed.Dir, "other"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	s := serveBed(t, bed, "--insecure-registry", other.Host)
	clients := s.clients()
	for i, w := range all {
		t.Run(w.Name, func(t *testing.T) {
			dir := filepath.Join(bed.Dir, w.Name)
			if err := w.Write(dir); err != nil {
				t.Fatal(err)
			}
			build := func(c *client, host string) (ref, digest, out string) {
				t.Helper()
				ref = host + "/" + strings.ToLower(w.Name)
				meta := filepath.Join(t.TempDir(), "meta.json")
				out = c.in(t).build(order{dir: dir, args: []string{"REGISTRY=" + bed.Host}, more: []string{"--output", "type=image,push=true,name=" + ref, "--metadata-file", meta}})
				digest, name := metadata(t, meta)
				if name != ref+":latest" {
					t.Errorf("the image is called %s", name)
				}
				return ref, digest, out
			}
			ref, first, out := build(clients[i%2], bed.Host)
			if len(executed(out)) == 0 && w.Name != "W4-many-layers" {
				t.Errorf("no step says anything:\n%s", out)
			}
			ref2, second, out := build(clients[1-i%2], other.Host)
			if second != first {
				t.Errorf("%s pushes %s, %s pushes %s", clients[i%2].name, first, clients[1-i%2].name, second)
			}
			if did := notDone(out); len(did) > 0 || len(executed(out)) > 0 {
				t.Errorf("the second client executes %q:\n%s", did, out)
			}
			a, err := compare.Open(ref)
			if err != nil {
				t.Fatal(err)
			}
			if a, b := whole(t, ref), whole(t, ref2); a != first || b != second {
				t.Errorf("the registries have %s and %s, --metadata-file says %s", a, b, second)
			}
			secondOpinion(t, bed, w, dir, a)
		})
	}
}

// whole reads and verifies every blob of an image, and returns its digest.
func whole(t *testing.T, ref string) string {
	t.Helper()
	img, err := compare.Open(ref)
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := img.ConfigFile(); err != nil {
		t.Errorf("the config of %s: %v", ref, err)
	}
	for i, l := range layers {
		rc, err := l.Compressed() // which compares the digest
		if err != nil {
			t.Errorf("layer %d of %s: %v", i, ref, err)
			continue
		}
		if _, err := io.Copy(io.Discard, rc); err != nil {
			t.Errorf("layer %d of %s: %v", i, ref, err)
		}
		rc.Close()
	}
	return digest(t, ref)
}

// outputs are those that a build is to have, below dir. The options of both clients are the same.
func outputs(dir, ref string) []string {
	var args []string
	for _, o := range []string{
		"type=local,dest=" + filepath.Join(dir, "local"), "type=tar,dest=" + filepath.Join(dir, "tar"), "type=oci,dest=" + filepath.Join(dir, "oci"),
		"type=oci,tar=false,dest=" + filepath.Join(dir, "layout"), "type=docker,name=example/app:1,dest=" + filepath.Join(dir, "docker"),
		"type=image,push=true,name=" + ref,
	} {
		args = append(args, "--output", o)
	}
	return append(args, "--metadata-file", filepath.Join(dir, "meta.json"))
}

// tarFile is what a file in a tar has, nil if there is none of that name.
func tarFile(t *testing.T, archive, name string) []byte {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			t.Fatalf("%s: %v", archive, err)
		}
		if strings.TrimPrefix(h.Name, "./") != name {
			continue
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
}

// indexed is the digest of the only manifest that an index.json names.
func indexed(t *testing.T, index []byte) string {
	t.Helper()
	var i v1.IndexManifest
	if err := json.Unmarshal(index, &i); err != nil || len(i.Manifests) != 1 {
		t.Fatalf("index.json is %q: %v", index, err)
	}
	return i.Manifests[0].Digest.String()
}

// checkOutputs looks at what outputs has asked for, and returns the digest.
func checkOutputs(t *testing.T, dir, ref string) string {
	t.Helper()
	said, name := metadata(t, filepath.Join(dir, "meta.json"))
	if name != ref+":latest" {
		t.Errorf("--metadata-file has the name %q", name)
	}
	for what, got := range map[string]string{
		"the registry": digest(t, ref), "type=oci": indexed(t, tarFile(t, filepath.Join(dir, "oci"), "index.json")),
		"the layout": indexed(t, []byte(read(t, filepath.Join(dir, "layout", "index.json")))),
	} {
		if got != said {
			t.Errorf("%s has %s, --metadata-file says %s", what, got, said)
		}
	}
	var m []struct {
		RepoTags, Layers []string
		Config           string
	}
	if err := json.Unmarshal(tarFile(t, filepath.Join(dir, "docker"), "manifest.json"), &m); err != nil || len(m) != 1 || !slices.Equal(m[0].RepoTags, []string{"example/app:1"}) || len(m[0].Layers) != 3 {
		t.Errorf("docker load would find %+v: %v", m, err)
	} else if c := tarFile(t, filepath.Join(dir, "docker"), m[0].Config); !json.Valid(c) {
		t.Errorf("docker load would find the config %q", c)
	}
	for what, got := range map[string]string{
		"type=local": read(t, filepath.Join(dir, "local", "made")), "type=tar": string(tarFile(t, filepath.Join(dir, "tar"), "made")), "the registry": rootfs(t, ref)["/made"].Data,
	} {
		if got != "made by Kiln\n" {
			t.Errorf("%s has /made with %q", what, got)
		}
	}
	return said
}

// TestClientsOutputs: every kind of output, all of one build, and what the clients show of it and of the next build, which
// finds everything done. Both get the same.
func TestClientsOutputs(t *testing.T) {
	guard(t)
	bed := kilnrun.Open(t, busybox)
	dir := files{
		"Dockerfile": "ARG REGISTRY=docker.io\nFROM ${REGISTRY}/library/busybox:latest AS base\nCOPY input /input\nRUN echo be\"\"gun; cat /input; cat /input > /made\n",
		"input":      "made by Kiln\n",
	}.write(t, filepath.Join(bed.Dir, "context"))
	digests := map[string]string{}
	for i, start := range []func(*testing.T, *kilnrun.Bed) *server{
		func(t *testing.T, b *kilnrun.Bed) *server { return serveBed(t, b) }, serveEmpty,
	} {
		s := start(t, bed)
		c := s.clients()[i]
		t.Run(c.name, func(t *testing.T) {
			c := c.in(t)
			ref, out := bed.Host+"/outputs-"+c.name, t.TempDir()
			o := order{dir: dir, args: []string{"REGISTRY=" + bed.Host, "SOURCE_DATE_EPOCH=1700000000"}, more: outputs(out, ref)}
			first := c.build(o)
			digests[c.name] = checkOutputs(t, out, ref)
			want(t, first, 0, 0, `(?m)^#\d+ \[2/3\] COPY input /input$`, `(?m)^#(\d+) \[3/3\] RUN echo be"" ?gun; cat /input; cat /input > /made$`,
				`(?m)^#\d+ \d+\.\d+ begun$`, `(?m)^#\d+ \d+\.\d+ made by Kiln$`, `(?m)^#\d+ DONE \d+\.\ds$`, "(?m)^#\\d+ \\[internal\\] load build context$", `(?m)^#\d+ transferring context: \d+B .*done$`, "(?m)^#\\d+ pushing manifest for "+ref+":latest@"+digests[c.name]+" ")
			second := c.build(o)
			if ran, did := executed(second), notDone(second); len(ran)+len(did) > 0 {
				t.Errorf("the second build executes %q %q:\n%s", ran, did, second)
			}
			want(t, second, 0, 0, `(?m)^#(\d+) \[3/3\] RUN echo .*\n#\d+ CACHED$`)
			if d := checkOutputs(t, out, ref); d != digests[c.name] {
				t.Errorf("the second build is %s, not %s", d, digests[c.name])
			}
			fromLayout(t, c, filepath.Join(out, "layout"), digests[c.name])
		})
	}
	if digests["buildctl"] != digests["buildx"] {
		t.Errorf("the clients get %v", digests)
	}
}

// fromLayout builds from an image in a directory of the client's.
func fromLayout(t *testing.T, c *client, layout, digest string) {
	t.Helper()
	dir := files{"Dockerfile": "FROM scratch\nCOPY --from=made /made /again\n"}.write(t, t.TempDir())
	out := t.TempDir()
	o := order{dir: dir, more: []string{"--output", out}}
	if c.name == "buildx" {
		o.contexts = map[string]string{"made": "oci-layout://" + layout + "@" + digest}
	} else {
		o.contexts = map[string]string{"made": "oci-layout://layout@" + digest}
		o.more = []string{"--output", "type=local,dest=" + out, "--oci-layout", "layout=" + layout}
	}
	c.build(o)
	if got := read(t, filepath.Join(out, "again")); got != "made by Kiln\n" {
		t.Errorf("of the layout comes %q", got)
	}
}

// TestClientsPlatforms: an index of two platforms with annotations, and, of one, the image's ID in a file.
func TestClientsPlatforms(t *testing.T) {
	guard(t)
	t.Parallel()
	bed := kilnrun.Open(t, busybox)
	s := serveBed(t, bed)
	dir := files{"Dockerfile": "FROM scratch\nARG TARGETARCH\nCOPY $TARGETARCH /arch\n", "amd64": "of amd64\n", "arm64": "of arm64\n"}.write(t, filepath.Join(bed.Dir, "context"))
	for _, c := range s.clients() {
		t.Run(c.name, func(t *testing.T) {
			ref, meta := bed.Host+"/platforms-"+c.name, filepath.Join(t.TempDir(), "meta.json")
			o := order{dir: dir, opts: map[string]string{"platform": "linux/amd64,linux/arm64"}, more: []string{"--metadata-file", meta, "--output"}}
			if c.name == "buildx" {
				o.more = append(o.more, "type=registry,name="+ref, "--annotation", "index,manifest:org.example.by=me")
			} else {
				o.more = append(o.more, "type=image,push=true,name="+ref+",annotation-index.org.example.by=me,annotation.org.example.by=me")
			}
			c := c.in(t)
			c.build(o)
			said, _ := metadata(t, meta)
			r, err := name.ParseReference(ref, name.Insecure)
			if err != nil {
				t.Fatal(err)
			}
			index, err := remote.Index(r)
			if err != nil {
				t.Fatal(err)
			}
			if d, err := index.Digest(); err != nil || d.String() != said {
				t.Errorf("the registry has %s (%v), --metadata-file says %s", d, err, said)
			}
			m, err := index.IndexManifest()
			if err != nil || len(m.Manifests) != 2 || m.Annotations["org.example.by"] != "me" {
				t.Fatalf("the index is %+v: %v", m, err)
			}
			for _, d := range m.Manifests {
				if got := rootfs(t, ref+"@"+d.Digest.String())["/arch"].Data; got != "of "+d.Platform.Architecture+"\n" {
					t.Errorf("%s has %q", d.Platform, got)
				}
				if a := manifestOf(t, ref+"@"+d.Digest.String()).Annotations; a["org.example.by"] != "me" {
					t.Errorf("%s has the annotations %v", d.Platform, a)
				}
			}
			if c.name != "buildx" {
				return
			}
			iid := filepath.Join(t.TempDir(), "iid")
			c.build(order{dir: dir, more: []string{"--iidfile", iid, "--output", "type=registry,name=" + ref, "--metadata-file", meta}})
			if d, _ := metadata(t, meta); digest(t, ref) != d {
				t.Errorf("--metadata-file has %s, the registry %s", d, digest(t, ref))
			}
			if id := manifestOf(t, ref).Config.Digest.String(); read(t, iid) != id { // docker's, the config's digest
				t.Errorf("--iidfile has %s, the image's ID is %s", read(t, iid), id)
			}
		})
	}
}
