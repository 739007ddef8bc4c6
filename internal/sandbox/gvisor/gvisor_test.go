package gvisor_test

import (
	"context"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/sandbox"
	"github.com/kiln-build/kiln/internal/sandbox/gvisor"
	"github.com/kiln-build/kiln/internal/sandbox/sandboxtest"
)

func TestMain(m *testing.M) {
	if code, ok := gvisor.Main(os.Args); ok {
		os.Exit(code)
	}
	if code, ok := sandboxtest.GuestMain(os.Args); ok {
		os.Exit(code)
	}
	os.Exit(m.Run())
}

func TestConformance(t *testing.T) {
	sandboxtest.Run(t, func() sandbox.Sandbox { return gvisor.New(gvisor.Options{}) }, sandboxtest.Options{})
}

// TestConformancePtrace is the same on the slower platform.
func TestConformancePtrace(t *testing.T) {
	if testing.Short() {
		t.Skip("takes as long again")
	}
	sandboxtest.Run(t, func() sandbox.Sandbox { return gvisor.New(gvisor.Options{Platform: gvisor.Ptrace}) }, sandboxtest.Options{})
}

// TestFIFOOfLowerLayer: what docs/compatibility.md says of a FIFO that an
// earlier step made. Should gVisor learn to copy one up, this fails, and the page is wrong.
func TestFIFOOfLowerLayer(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // a FIFO is easily waited for
	defer cancel()
	sess, err := gvisor.New(gvisor.Options{}).Start(ctx, sandbox.Config{Layers: []string{sandboxtest.BaseLayer(t)}, Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer sess.Close()
	for _, x := range []struct{ script, want string }{
		{"mkdir /d; mkfifo /d/f /d/g; chmod 600 /d/f; chown 1:2 /d/f", ""},
		{"chmod 644 /d/f", "Operation not permitted\n"},
		{"chown 3 /d/f", "Operation not permitted\n"},
		{"mv /d/f /d/h", "Operation not permitted\n"},
		{"ln /d/f /d/h", "Operation not permitted\n"},
		{"touch /d/f", "Operation not permitted\n"},
		{"rm /d/f && mkfifo -m 644 /d/f && stat -c '%a %u' /d/f && chown 5 /d/f && stat -c %u /d/f", "644 0\n5\n"},
		{"rm -r /d && test ! -e /d", ""},
	} {
		var out strings.Builder
		// What fails, fails with a message, and the step goes on.
		script := x.script
		if strings.Contains(x.want, "not permitted") {
			script += " 2>&1 && echo works || true"
		}
		if err := sess.Run(ctx, sandboxtest.Shell(script), &out, io.Discard); err != nil || !strings.HasSuffix(out.String(), x.want) {
			t.Errorf("%s: %v; got %q, want %q", x.script, err, out.String(), x.want)
		}
	}
}
