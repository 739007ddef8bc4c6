package gvisor

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/internal/sandbox"
	"github.com/kiln-build/kiln/internal/sandbox/sandboxtest"
)

// memoryGroup makes a control group with a limit, if the test may, and returns
// the file that takes its processes.
func memoryGroup(t *testing.T, limit int) string {
	t.Helper()
	name := "kiln-test-" + strconv.Itoa(os.Getpid())
	for dir, file := range map[string]string{
		"/sys/fs/cgroup/memory": "memory.limit_in_bytes", "/sys/fs/cgroup": "memory.max",
	} {
		if _, err := os.Stat(filepath.Join(dir, "cgroup.procs")); err != nil {
			continue
		}
		d := filepath.Join(dir, name)
		if err := os.Mkdir(d, 0o755); err != nil {
			continue
		}
		t.Cleanup(func() { os.Remove(d) })
		if err := os.WriteFile(filepath.Join(d, file), []byte(strconv.Itoa(limit)), 0o644); err != nil {
			continue
		}
		return filepath.Join(d, "cgroup.procs")
	}
	t.Skip("needs a control group of its own")
	return ""
}

// TestLimitedBuilder is no test: it is the builder that runs out of memory.
func TestLimitedBuilder(t *testing.T) {
	layers := os.Getenv("KILN_TEST_LIMITED_BUILDER")
	if layers == "" {
		t.Skip("run by TestOutOfMemory")
	}
	sess := startSession(t, New(Options{}), strings.Split(layers, ":")...)
	// Data on disk is not memory.
	if err := sess.Run(context.Background(), sandboxtest.Shell("dd if=/dev/zero of=/big bs=1M count=400; rm /big"), io.Discard, io.Discard); err != nil {
		t.Fatalf("a file larger than the memory: %v", err)
	}
	var out strings.Builder
	err := sess.Run(context.Background(), sandboxtest.Shell("guesttool eat 1000"), &out, io.Discard)
	var e *sandbox.ExitError
	if !errors.As(err, &e) || !e.OutOfMemory || !strings.Contains(e.Detail, "out-of-memory killer") {
		t.Errorf("got %+v; output %q", err, out.String())
	}
}

func TestOutOfMemory(t *testing.T) {
	group := memoryGroup(t, 200<<20)
	layers := sandboxtest.BaseLayer(t) + ":" + sandboxtest.ToolLayer(t)
	cmd := exec.Command("/bin/sh", "-c", `echo $$ > "$0" && exec "$@"`, group, "/proc/self/exe", "-test.run", "^TestLimitedBuilder$", "-test.v")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Args[4] = self
	cmd.Env = append(os.Environ(), "KILN_TEST_LIMITED_BUILDER="+layers)
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil || strings.Contains(string(out), "--- SKIP") {
		t.Errorf("the builder: %v", err)
	}
}
