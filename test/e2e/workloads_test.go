// Package e2e builds real workloads with the real binary, as an ordinary user
// without any privilege, and asserts what can only be seen from outside.
// KILN_E2E=1 runs it: scripts/test e2e.
package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/test/compare"
	"github.com/kiln-build/kiln/test/kilnrun"
	"github.com/kiln-build/kiln/test/testenv"
	"github.com/kiln-build/kiln/test/workloads"
)

func guard(t *testing.T) {
	t.Helper()
	if os.Getenv("KILN_E2E") == "" {
		t.Skip("set KILN_E2E=1: scripts/test e2e")
	}
}

// TestUnprivilegedReallyIs asserts that the state that the workloads are built
// in refuses what a restricted pod refuses.
func TestUnprivilegedReallyIs(t *testing.T) {
	guard(t)
	tool, err := testenv.Tool(t.Context(), "unpriv")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), tool, "-check").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// TestWorkloads builds and pushes W1 to W7, builds each again unchanged, which
// must execute and upload nothing, reads every pushed layer back, and compares
// with buildah's image.
func TestWorkloads(t *testing.T) {
	guard(t)
	for _, w := range workloads.All() {
		t.Run(w.Name, func(t *testing.T) {
			bed := kilnrun.Open(t, w.Bases...)
			dir := filepath.Join(bed.Dir, "context")
			if err := w.Write(dir); err != nil {
				t.Fatal(err)
			}
			ref, _ := bed.Build(t, dir, w.Name)
			first, err := compare.Open(ref)
			if err != nil {
				t.Fatal(err)
			}
			d1, err := first.Digest()
			if err != nil {
				t.Fatal(err)
			}
			r, err := compare.Images(first, first, compare.Options{})
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range r.ProblemsB {
				t.Error(p)
			}
			secondOpinion(t, bed, w, dir, first)
			ref, out := bed.Build(t, dir, w.Name)
			second, err := compare.Open(ref)
			if err != nil {
				t.Fatal(err)
			}
			if d2, err := second.Digest(); err != nil || d1 != d2 {
				t.Errorf("an unchanged rebuild pushed %s, not %s: %v", d2, d1, err)
			}
			for line := range strings.Lines(out) {
				if regexp.MustCompile(`^#\d+ \d+\.\d+ `).MatchString(line) {
					t.Errorf("an unchanged rebuild executed a step: %s", line)
				}
			}
			if err := w.Change(dir); err != nil {
				t.Fatal(err)
			}
			ref, _ = bed.Build(t, dir, w.Name)
			third, err := compare.Open(ref)
			if err != nil {
				t.Fatal(err)
			}
			if d3, err := third.Digest(); err != nil || d1 == d3 {
				t.Errorf("a changed file made no other image: %v", err)
			}
		})
	}
}

// TestOtherToolsAccept gives an image to skopeo, umoci and crane.
func TestOtherToolsAccept(t *testing.T) {
	guard(t)
	for _, tool := range []string{"skopeo", "umoci"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("no %s: scripts/deps.sh oracle, as root", tool)
		}
	}
	w, err := workloads.Find("W4")
	if err != nil {
		t.Fatal(err)
	}
	bed := kilnrun.Open(t, w.Bases...)
	dir := filepath.Join(bed.Dir, "context")
	if err := w.Write(dir); err != nil {
		t.Fatal(err)
	}
	ref, _ := bed.Build(t, dir, w.Name)
	run := func(argv ...string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), argv[0], argv[1:]...).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", strings.Join(argv, " "), err, out)
		}
		return string(out)
	}
	if out := run("skopeo", "inspect", "--tls-verify=false", "docker://"+ref); !strings.Contains(out, `"Layers"`) {
		t.Errorf("skopeo inspect prints no layers:\n%s", out)
	}
	lay := filepath.Join(bed.Dir, "layout")
	run("skopeo", "copy", "-q", "--src-tls-verify=false", "docker://"+ref, "oci:"+lay+":w4")
	unpack := []string{"umoci", "unpack", "--image", lay + ":w4", filepath.Join(bed.Dir, "bundle")}
	if os.Geteuid() != 0 {
		unpack = append(unpack[:2], append([]string{"--rootless"}, unpack[2:]...)...)
	}
	run(unpack...)
	log, err := os.ReadFile(filepath.Join(bed.Dir, "bundle", "rootfs", "l", "log.txt"))
	if err != nil || !strings.HasSuffix(string(log), "step 29\n") {
		t.Errorf("unpacked log ends with %q, %v", tail(log), err)
	}
	if crane := oracleProgram(t, "crane"); crane != "" {
		run(crane, "validate", "--insecure", "--remote", ref)
	}
}

func tail(b []byte) string { return string(b[max(0, len(b)-40):]) }

// oracleProgram is one of the programs of test/oracle, if they were built.
func oracleProgram(t *testing.T, name string) string {
	t.Helper()
	cache, err := testenv.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	found, err := filepath.Glob(filepath.Join(cache, "bin", "oracle-*", name))
	if err != nil || len(found) == 0 {
		t.Logf("no %s: scripts/test conformance builds it", name)
		return ""
	}
	return found[0]
}

// TestNoNamespaceTouched builds where any attempt at a namespace, a mount or a
// chroot kills the process that makes it.
func TestNoNamespaceTouched(t *testing.T) {
	guard(t)
	if os.Geteuid() != 0 {
		t.Skip("needs root, to load the filter in front of the builder")
	}
	bed := kilnrun.Open(t, "library/busybox:latest")
	bed.Deadly = true
	bed.Build(t, oneStep(t, bed), "deadly")
}

// oneStep is a context whose RUN does what root does.
func oneStep(t *testing.T, bed *kilnrun.Bed) string {
	t.Helper()
	dir := filepath.Join(bed.Dir, "context")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	dockerfile := fmt.Sprintf("FROM %s/library/busybox:latest\nRUN id -u > /uid && mknod /n c 1 3 && chown 5:5 /uid\n", bed.Host)
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(dockerfile), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}
