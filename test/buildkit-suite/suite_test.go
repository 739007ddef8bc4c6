// Package buildkitsuite runs BuildKit's own integration tests, those of its client and of its Dockerfile front end
// at the version that Kiln has the front end of, against `kiln buildkitd`. BuildKit's harness starts a program named
// buildkitd from PATH for each test and insists on root; here that name is a script that gives up every privilege
// before it becomes Kiln.
//
// known.txt lists the tests that do not pass, each with its reason. Any other test that fails is a failure here, and
// so is one of the list that passes, if that is so a second time.
package buildkitsuite

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/test/refbuild"
	"github.com/kiln-build/kiln/test/testenv"
)

// frontendOnly makes the front end's tests ask for the front end that is linked in; the other choice is to run it as an image.
const frontendOnly = "FRONTEND_BUILTIN_ONLY=1"

func TestDockerfile(t *testing.T) { testPackage(t, "frontend/dockerfile") }

func TestClient(t *testing.T) { testPackage(t, "client") }

// testPackage runs the tests of one of BuildKit's packages, all or those that match $KILN_BUILDKIT_SUITE_RUN.
func testPackage(t *testing.T, pkg string) {
	if os.Getenv("KILN_BUILDKIT_SUITE") == "" {
		t.Skip("KILN_BUILDKIT_SUITE=1 runs BuildKit's integration tests")
	}
	if os.Geteuid() != 0 {
		t.Skip("BuildKit's harness takes root")
	}
	b := newBed(t)
	known := readKnown(t, filepath.Base(pkg))
	program, dir := compile(t, pkg)
	run := func(log, pattern string) (output []byte, err error) {
		out, err := os.Create(log)
		if err != nil {
			return nil, err
		}
		defer out.Close()
		args := []string{
			"-test.v", "-test.timeout=20m", fmt.Sprintf("-test.parallel=%d", runtime.GOMAXPROCS(0)+1),
			"-test.run=^Test.*Integration$/" + pattern + "/worker=oci$",
		}
		if s := known.notRun(); len(s) > 0 {
			args = append(args, "-test.skip=^Test.*Integration$/^("+strings.Join(s, "|")+")$")
		}
		ctx, cancel := context.WithTimeout(t.Context(), 21*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, program, args...)
		cmd.Dir, cmd.Stdout, cmd.Stderr = dir, out, out
		cmd.Env = append(os.Environ(), frontendOnly, "BUILDKIT_REGISTRY_MIRROR_DIR="+b.mirror, "PATH="+b.bin+":"+os.Getenv("PATH"), "TMPDIR="+b.tmp)
		err = cmd.Run()
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() == 1 {
			err = nil // tests failed; other codes are of a panic, or a signal
		}
		output, readErr := os.ReadFile(log)
		return output, errors.Join(err, readErr)
	}
	log := filepath.Join(b.logs, filepath.Base(pkg)+".log")
	pattern := os.Getenv("KILN_BUILDKIT_SUITE_RUN")
	text, err := run(log, pattern)
	if err != nil {
		t.Errorf("the tests did not run to their end (%v):\n%s", err, text[max(0, len(text)-4000):])
	}
	surprises := judge(t, text, known, pattern == "")
	if len(surprises) > 0 && len(surprises) <= maxAgain {
		// Their tests wait for other processes, and some for a time that is short on a busy machine.
		names := slices.Sorted(maps.Keys(surprises))
		t.Logf("once more: %s", strings.Join(names, ", "))
		if text, err = run(strings.TrimSuffix(log, ".log")+"-again.log", "^("+strings.Join(bases(names), "|")+")$"); err != nil {
			t.Errorf("the tests did not run to their end a second time: %v", err)
		}
		again := judge(t, text, known, false)
		maps.DeleteFunc(surprises, func(name, _ string) bool { _, still := again[name]; return !still })
	}
	for _, name := range slices.Sorted(maps.Keys(surprises)) {
		t.Error(surprises[name])
	}
	t.Logf("all that was said is in %s", log)
}

// maxAgain is how many tests may do otherwise than known and are run once more.
const maxAgain = 8

// bases are the functions that tests are in, each once, as regular expressions.
func bases(names []string) []string {
	var out []string
	for _, n := range names {
		base, _, _ := strings.Cut(n, "/")
		out = append(out, regexp.QuoteMeta(base))
	}
	return slices.Compact(out)
}

// judge compares what the tests came to with what is known of them, and says by test what is otherwise; whole says that
// all were asked for.
func judge(t *testing.T, log []byte, known knownTests, whole bool) map[string]string {
	t.Helper()
	surprises := map[string]string{}
	got := results(log)
	count := map[string]int{}
	for name, result := range got {
		count[result]++
		k, listed := known[name]
		switch {
		case result == "FAIL" && !listed:
			surprises[name] = fmt.Sprintf("%s fails:\n%s", name, complaint(log, name))
		case result != "FAIL" && listed && !k.mayPass:
			surprises[name] = fmt.Sprintf("%s does not fail any more (%s): take it out of known.txt, where the reason is %q", name, result, k.reason)
		}
	}
	for name, k := range known {
		if _, ran := got[name]; whole && !ran && !k.notRun {
			surprises[name] = name + " is in known.txt, but is no test, or was not reached"
		}
	}
	if len(got) == 0 {
		t.Error("no test was run")
	}
	t.Logf("%d tests pass, %d are skipped by BuildKit, %d fail, %d are not run", count["PASS"], count["SKIP"], count["FAIL"], len(known.notRun()))
	return surprises
}

var (
	ended   = regexp.MustCompile(`(?m)^    --- (PASS|FAIL|SKIP): Test\w*Integration/(\S+)`)
	trimmed = regexp.MustCompile(`/(worker=oci|frontend=builtin)\b`)
)

// results maps the names of tests, without what is the same for all of them, to PASS, FAIL or SKIP.
func results(log []byte) map[string]string {
	got := map[string]string{}
	for _, m := range ended.FindAllSubmatch(log, -1) {
		got[trimmed.ReplaceAllString(string(m[2]), "")] = string(m[1])
	}
	return got
}

// complaint is what a failed test said first.
func complaint(log []byte, name string) string {
	base, _, _ := strings.Cut(name, "/")
	var said []string
	in := false
	for line := range strings.Lines(string(log)) {
		switch {
		case strings.HasPrefix(line, "=== "):
			in = strings.Contains(line, "/"+base+"/")
		case strings.Contains(line, "--- "):
			in = strings.Contains(line, "--- FAIL") && strings.Contains(line, "/"+base+"/")
		case in && len(said) < 25:
			said = append(said, line)
		}
	}
	return strings.Join(said, "")
}

// compile builds the tests of a package and returns the program, and the directory that they run in.
func compile(t *testing.T, pkg string) (program, dir string) {
	t.Helper()
	root, err := testenv.Root()
	if err != nil {
		t.Fatal(err)
	}
	cache, err := testenv.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	path := "github.com/moby/buildkit/" + pkg
	program = filepath.Join(cache, "bin", "buildkit-"+refbuild.Version+"-"+filepath.Base(pkg)+".test")
	run := func(args ...string) string {
		cmd := exec.CommandContext(t.Context(), "go", args...)
		cmd.Dir = filepath.Join(root, "test", "oracle")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		cmd.Stderr = t.Output()
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("go %s: %v", strings.Join(args, " "), err)
		}
		return strings.TrimSpace(string(out))
	}
	run("test", "-c", "-o", program, path)
	return program, run("list", "-f", "{{.Dir}}", path)
}

// knownTest is one that does not pass.
type knownTest struct {
	notRun  bool // it hangs, or takes the whole run with it
	mayPass bool // it passes at times
	reason  string
}

type knownTests map[string]knownTest

func (k knownTests) notRun() []string {
	var names []string
	for name, t := range k {
		if t.notRun {
			names = append(names, regexp.QuoteMeta(name))
		}
	}
	slices.Sort(names)
	return names
}

// readKnown reads the lines PACKAGE NAME fails|flaky|not-run REASON of known.txt that are a package's.
func readKnown(t *testing.T, pkg string) knownTests {
	t.Helper()
	data, err := os.ReadFile("known.txt")
	if err != nil {
		t.Fatal(err)
	}
	known := knownTests{}
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		f := strings.SplitN(line, " ", 4)
		if len(f) != 4 || !slices.Contains([]string{"fails", "flaky", "not-run"}, f[2]) {
			t.Fatalf("known.txt: not PACKAGE NAME fails|flaky|not-run REASON: %q", line)
		}
		if f[0] == pkg {
			known[f[1]] = knownTest{notRun: f[2] == "not-run", mayPass: f[2] == "flaky", reason: f[3]}
		}
	}
	return known
}

// TestJudge finds what is otherwise than known, in both directions.
func TestJudge(t *testing.T) {
	log := []byte(`=== RUN   TestIntegration/TestNew/worker=oci
    a_test.go:1: it went wrong
    --- FAIL: TestIntegration/TestNew/worker=oci (0.10s)
    --- FAIL: TestIntegration/TestKnown/worker=oci (0.10s)
    --- PASS: TestIntegration/TestMended/worker=oci (0.10s)
    --- PASS: TestIntegration/TestFlaky/worker=oci (0.10s)
`)
	known := knownTests{"TestKnown": {}, "TestMended": {reason: "it did"}, "TestFlaky": {mayPass: true}, "TestGone": {}}
	got := judge(t, log, known, true)
	for name, want := range map[string]string{"TestNew": "it went wrong", "TestMended": `"it did"`, "TestGone": "not reached"} {
		if !strings.Contains(got[name], want) {
			t.Errorf("%s: %q", name, got[name])
		}
	}
	if len(got) != 3 {
		t.Errorf("%v", got)
	}
}

// TestResults reads what a run prints: the tests themselves count, not their parts.
func TestResults(t *testing.T) {
	log := []byte(`=== RUN   TestIntegration
--- FAIL: TestIntegration (1.00s)
    --- PASS: TestIntegration/TestOne/worker=oci/frontend=builtin (0.10s)
        --- FAIL: TestIntegration/TestOne/worker=oci/frontend=builtin/part (0.10s)
    --- FAIL: TestIntegration/TestTwo/worker=oci/frontend=builtin/env=simple (0.10s)
    --- SKIP: TestClientGatewayIntegration/TestThree/worker=oci (0.10s)
`)
	want := map[string]string{"TestOne": "PASS", "TestTwo/env=simple": "FAIL", "TestThree": "SKIP"}
	if got := results(log); !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
