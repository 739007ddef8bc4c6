package gvisor

import (
	"bytes"
	"context"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/internal/sandbox"
	"github.com/kiln-build/kiln/internal/sandbox/sandboxtest"
)

// benchSession runs steps in a session of its own.
func benchSession(b *testing.B, s *Sandbox, layers []string, steps ...string) (peakKiB float64) {
	b.Helper()
	sess, err := s.startChosen(context.Background(), sandbox.Config{Layers: layers, Dir: b.TempDir(), Network: true})
	if err != nil {
		b.Fatal(err)
	}
	defer sess.Close()
	sentry := 0
	for _, step := range steps {
		var out bytes.Buffer
		if err := sess.Run(context.Background(), sandboxtest.Shell(step), &out, io.Discard); err != nil {
			b.Fatalf("%s: %v\n%s", step, err, out.String())
		}
	}
	// Not the shim's rusage, for a stub that maps a large file counts it as its own.
	if kids, err := os.ReadFile("/proc/" + strconv.Itoa(sess.shim.Pid) + "/task/" + strconv.Itoa(sess.shim.Pid) + "/children"); err == nil {
		sentry, _ = strconv.Atoi(strings.Fields(string(kids) + " 0")[0])
	}
	status, err := os.ReadFile("/proc/" + strconv.Itoa(sentry) + "/status")
	if err != nil {
		return 0
	}
	for line := range lines(string(status)) {
		if v, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			n, _ := strconv.ParseFloat(strings.Fields(v)[0], 64)
			return n
		}
	}
	return 0
}

func bench(b *testing.B, tool bool, steps ...string) {
	layers := []string{sandboxtest.BaseLayer(b)}
	if tool {
		layers = append(layers, sandboxtest.ToolLayer(b))
	}
	s := New(Options{})
	var kib float64
	for b.Loop() {
		kib = max(kib, benchSession(b, s, layers, steps...))
	}
	b.ReportMetric(kib/1024, "MiB-anon")
}

// BenchmarkTrue is a session for a process that does nothing, from start to close.
func BenchmarkTrue(b *testing.B) { bench(b, false, "true") }

func BenchmarkSession30(b *testing.B) {
	steps := make([]string, 30)
	for i := range steps {
		steps[i] = "echo > /file" + strconv.Itoa(i)
	}
	bench(b, false, steps...)
}

// BenchmarkFiles60000 is what the upper layer's inodes cost.
func BenchmarkFiles60000(b *testing.B) {
	bench(b, true, "mkdir /w; exec guesttool files /w 60000 2000")
}
