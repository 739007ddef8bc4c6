package sandboxtest
import ("testing";"os")
func testDebug(t *testing.T, h *harness) {
	s := h.start(t, nil, h.base, h.tools)
	o := run(t, s, shell(os.Getenv("SCRIPT")))
	t.Log(o.out, o.err, o.order)
}
