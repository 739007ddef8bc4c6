package sandboxtest

import (
	"testing"

	"github.com/kiln-build/kiln/internal/sandbox"
)

// Run checks a sandbox.
func Run(t *testing.T, newSandbox func() sandbox.Sandbox, opts Options) {
	h := &harness{opts: opts, box: newSandbox(), base: image(t, base(t)...)}
	for _, x := range []struct {
		name string
		test func(*testing.T, *harness)
	}{
		{"Hello", testHello},
	} {
		t.Run(x.name, func(t *testing.T) { x.test(t, h) })
	}
}

func testHello(t *testing.T, h *harness) {
	o := h.once(t, "id -u; echo hello > /greeting; ls /; cat /etc/resolv.conf; ls -la /proc/self/fd /dev; cat /proc/self/status /proc/mounts")
	t.Log(o.out)
	o.wantNames(t, "greeting")
}
