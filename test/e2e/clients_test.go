package e2e

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

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

// TestClientsWorkloads builds and pushes W1 to W4 with unmodified buildctl and buildx, each half of them first. The other
// client profits from that, and pushes to another registry: it is the same image, and whole.
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
			b, err := compare.Open(ref2)
			if err != nil {
				t.Fatal(err)
			}
			if d, err := b.Digest(); err != nil || d.String() != second {
				t.Errorf("the registry has %s (%v), --metadata-file says %s", d, err, second)
			}
			r, err := compare.Images(a, b, compare.Options{Layers: true}) // reads and verifies every layer
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range r.Diffs {
				t.Errorf("%s: %s in one registry, %s in the other", d.Where, d.A, d.B)
			}
			for _, p := range r.ProblemsB {
				t.Error(p)
			}
			secondOpinion(t, bed, w, dir, a)
		})
	}
}
