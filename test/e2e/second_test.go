package e2e

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/kiln-build/kiln/test/compare"
	"github.com/kiln-build/kiln/test/kilnrun"
	"github.com/kiln-build/kiln/test/refbuild"
	"github.com/kiln-build/kiln/test/testenv"
	"github.com/kiln-build/kiln/test/workloads"
)

// buildahIgnores are the workloads that buildah builds as well, with the paths
// that are not the same twice (logs with times in them) or where it supplies
// files to RUN. W5 is about size, and W7 is W4 again.
func buildahIgnores() map[string][]string {
	return map[string][]string{
		"W1-hello-go":    nil,
		"W2-apt-python":  {"/var/log/**", "/var/cache/ldconfig/aux-cache"},
		"W3-node-app":    {"/root/.npm/**"},
		"W4-many-layers": nil,
		"W6-parallel":    nil,
	}
}

// secondOpinion compares Kiln's image of a workload, written to dir, with
// buildah's. As in the conformance test, asking takes root, and answers are kept.
func secondOpinion(t *testing.T, bed *kilnrun.Bed, w workloads.Workload, dir string, got v1.Image) {
	t.Helper()
	ignore, ok := buildahIgnores()[w.Name]
	if !ok || os.Getenv("KILN_BUILDAH") == "off" {
		return
	}
	cache, err := testenv.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	kept := refbuild.Answers(filepath.Join(cache, "buildah"))
	key := question(t, bed, w, dir)
	a, err := kept.Kept(key)
	if err != nil {
		t.Fatal(err)
	}
	if a == nil && os.Geteuid() != 0 {
		t.Log("not compared with buildah's image: asking takes root")
		return
	}
	if a == nil {
		a = askBuildah(t, bed, string(kept), dir)
		if err := kept.Keep(key, *a); err != nil {
			t.Fatal(err)
		}
	}
	ignore = append(ignore, refbuild.BuildahPlaces()...)
	r, err := compare.Images(a.Image, got, compare.Options{Ignore: ignore, Meaning: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range r.Diffs {
		t.Errorf("%s: buildah %s, Kiln %s", d.Where, d.A, d.B)
	}
}

func askBuildah(t *testing.T, bed *kilnrun.Bed, parent, dir string) *refbuild.Answer {
	t.Helper()
	b, err := refbuild.OpenBuildah(t.Context(), parent, bed.Host)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}()
	ref, start := bed.Host+"/buildah", time.Now()
	out, err := b.Build(t.Context(), dir, ref, "--network", "host", "--build-arg", "REGISTRY="+bed.Host)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("buildah built it in %.2f s", time.Since(start).Seconds())
	img, err := compare.Open(ref)
	if err != nil {
		t.Fatal(err)
	}
	return &refbuild.Answer{Image: img, Log: out}
}

// question names buildah's answer by all that it depends on. Debian's archive
// changes, so an answer to W2 counts for its day.
func question(t *testing.T, bed *kilnrun.Bed, w workloads.Workload, dir string) string {
	t.Helper()
	h := sha256.New()
	fmt.Fprintln(h, refbuild.BuildahVersion)
	if w.Name == "W2-apt-python" {
		fmt.Fprintln(h, time.Now().UTC().Format(time.DateOnly))
	}
	for _, base := range w.Bases {
		img, err := compare.Open(bed.Host + "/" + base)
		if err != nil {
			t.Fatal(err)
		}
		d, err := img.Digest()
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(h, base, d)
	}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(p)
		fmt.Fprintf(h, "%s %x\n", p[len(dir):], sha256.Sum256(data))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%s-%x", w.Name, h.Sum(nil)[:8])
}
