package main

import (
	"context"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/test/testenv"
)

// TestMain lets the test binary be a process of known size: it holds 96 MiB and
// burns processor time for a while.
func TestMain(m *testing.M) {
	if os.Getenv("BENCH_TEST") == "hog" {
		b := make([]byte, 96<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		for end := time.Now().Add(400 * time.Millisecond); time.Now().Before(end); {
			b[0]++
		}
		return
	}
	os.Exit(m.Run())
}

func TestMeasure(t *testing.T) {
	g := newCPUGroup("kiln-bench-test")
	defer g.close()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	u, err := measure(t.Context(), g, func(ctx context.Context) error {
		argv := g.wrap([]string{"sh", "-c", `"$0"; true`, exe}) // a grandchild
		cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
		cmd.Env = []string{"BENCH_TEST=hog", "PATH=" + os.Getenv("PATH")}
		return cmd.Run()
	})
	if err != nil {
		t.Fatal(err)
	}
	if u.PeakMemory < 96<<20 || u.PeakMemory > 160<<20 {
		t.Errorf("peak memory %d MiB of a process with 96", u.PeakMemory>>20)
	}
	if u.PeakPSS < 96<<20 || u.PeakWithRSS < u.PeakMemory {
		t.Errorf("pss %d MiB, rss %d MiB", u.PeakPSS>>20, u.PeakWithRSS>>20)
	}
	if u.CPU < 0.1 || u.Wall < 0.4 {
		t.Errorf("%.2f s of processor time in %.2f s, of a process that burns 0.4", u.CPU, u.Wall)
	}
}

func TestCounterCountsBodies(t *testing.T) {
	var c counter
	reg, err := testenv.StartRegistry("127.0.0.1:0", t.TempDir(), c.wrap)
	if err != nil {
		t.Fatal(err)
	}
	defer reg.Close()
	resp, err := http.Post("http://"+reg.Host+"/v2/a/blobs/uploads/", "application/octet-stream", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	req, err := http.NewRequest(http.MethodPatch, "http://"+reg.Host+resp.Header.Get("Location"), strings.NewReader(strings.Repeat("x", 12345)))
	if err != nil {
		t.Fatal(err)
	}
	if resp, err = http.DefaultClient.Do(req); err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if n, _ := c.take(); n != 12345 {
		t.Errorf("%d bytes, want 12345", n)
	}
	if sent, got := c.take(); sent != 0 || got != 0 {
		t.Errorf("%d and %d bytes after taking", sent, got)
	}
	if resp, err = http.Get("http://" + reg.Host + "/v2/a/tags/list"); err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if _, got := c.take(); err != nil || got != int64(len(body)) || got == 0 {
		t.Errorf("%d bytes of an answer of %d (%v)", got, len(body), err)
	}
}

func TestTable(t *testing.T) {
	r := func(builder string, wall float64) result {
		return result{Workload: "W", Scenario: "cold", Builder: builder, usage: usage{Wall: wall, CPU: 2 * wall, PeakMemory: 1 << 20}}
	}
	var b strings.Builder
	printTable(&b, []result{r("kiln", 1), r("buildkit", 2), r("kiln", 9), r("buildkit", 4), r("kiln", 3), r("buildkit", 6)})
	lines := strings.Split(strings.TrimSpace(b.String()), "\n")
	if len(lines) != 3 || !strings.Contains(lines[1], "3.00") || !strings.Contains(lines[1], "0.75") {
		t.Errorf("want a median of 3.00 and a ratio of 0.75:\n%s", b.String())
	}
}

func TestWalls(t *testing.T) {
	r := func(scenario string, wall float64) result {
		return result{Workload: "W1", Scenario: scenario, Builder: "kiln", usage: usage{Wall: wall}}
	}
	var b strings.Builder
	printWalls(&b, []result{r("cold", 9), r("registry", 2), r("unchanged", 1), r("cold", 7)})
	lines := strings.Split(strings.TrimSpace(b.String()), "\n")
	if len(lines) != 2 || strings.Join(strings.Fields(lines[1]), " ") != "W1 kiln 8.00 1.00 2.00 - - -" {
		t.Errorf("got\n%s", b.String())
	}
}
