package gvisor_test

import (
	"os"
	"testing"

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
