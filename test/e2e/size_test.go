package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/test/testenv"
)

const (
	largest = 60_000_000
	// slowest is the promise; a machine that does other things gets three times that.
	slowest = 50 * time.Millisecond
)

// TestBinarySize cross-builds the stripped, static binary as it is released.
func TestBinarySize(t *testing.T) {
	guard(t)
	root, err := testenv.Root()
	if err != nil {
		t.Fatal(err)
	}
	for _, arch := range []string{"amd64", "arm64"} {
		t.Run(arch, func(t *testing.T) {
			out := filepath.Join(t.TempDir(), "kiln")
			cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, "./cmd/kiln")
			cmd.Dir = root
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
			if b, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, b)
			}
			fi, err := os.Stat(out)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%s: %.1f MB", arch, float64(fi.Size())/1e6)
			if fi.Size() > largest {
				t.Errorf("the binary has %d bytes, more than %d", fi.Size(), largest)
			}
			if arch == runtime.GOARCH {
				startsQuickly(t, out)
			}
		})
	}
}

func startsQuickly(t *testing.T, bin string) {
	var took []time.Duration
	for range 20 {
		start := time.Now()
		cmd := exec.CommandContext(t.Context(), bin, "version")
		cmd.Env = []string{}
		if b, err := cmd.CombinedOutput(); err != nil || len(b) == 0 {
			t.Fatalf("kiln version: %v %s", err, b)
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	median := took[len(took)/2]
	t.Logf("kiln version: %v (median of %d; %v to %v)", median, len(took), took[0], took[len(took)-1])
	if median > 3*slowest {
		t.Errorf("kiln version takes %v, three times more than %v", median, slowest)
	}
}

// TestForbiddenModules asserts of the binary itself what internal/layering_test.go
// asserts of imports, which holds the list with its reasons.
func TestForbiddenModules(t *testing.T) {
	guard(t)
	root, err := testenv.Root()
	if err != nil {
		t.Fatal(err)
	}
	bin, err := testenv.Kiln(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := exec.CommandContext(t.Context(), "go", "version", "-m", bin).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, b)
	}
	if !strings.Contains(string(b), "gvisor.dev/gvisor") {
		t.Fatalf("%s does not say what it was made of:\n%s", bin, b)
	}
	rules, err := os.ReadFile(filepath.Join(root, "internal", "layering_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []string{"k8s.io", "sigs.k8s.io", "github.com/aws/aws-sdk-go", "github.com/aws/aws-sdk-go-v2/service/ecr", "github.com/aws/aws-sdk-go-v2/service/s3", "github.com/Azure/azure-sdk-for-go", "cloud.google.com/go", "github.com/docker/docker"} {
		if !strings.Contains(string(rules), fmt.Sprintf("{%q, ", m)) {
			t.Errorf("internal/layering_test.go does not forbid %s", m)
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) > 2 && f[0] == "dep" && (f[1] == m || strings.HasPrefix(f[1], m+"/")) {
				t.Errorf("the builder has %s", strings.TrimSpace(line))
			}
		}
	}
}
