package sandboxtest

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/sandbox"
)

func testExitStatus(t *testing.T, h *harness) {
	for _, code := range []string{"1", "3", "127", "255"} {
		o := run(t, h.start(t, nil), shell("echo bye; touch /x; exit "+code))
		var want int
		for _, d := range code {
			want = want*10 + int(d-'0')
		}
		e := o.wantExit(t, want)
		if e.Signal != 0 || e.NotFound || e.OutOfMemory || e.DiskFull {
			t.Errorf("exit %s: %+v", code, e)
		}
		o.wantOut(t, "bye\n")
	}
}

func testExitSignal(t *testing.T, h *harness) {
	for sig, n := range map[string]syscall.Signal{"TERM": syscall.SIGTERM, "KILL": syscall.SIGKILL, "SEGV": syscall.SIGSEGV} {
		// A process of its own, as a pid 1 is shielded from its own signals on Linux.
		s := h.start(t, nil)
		o := run(t, s, shell("sh -c 'kill -"+sig+" $$'; exit $?"))
		o.wantExit(t, 128+int(n))
	}
}

func testFailedSessionIsOver(t *testing.T, h *harness) {
	s := h.start(t, nil)
	run(t, s, shell("exit 1")).wantExit(t, 1)
	if o := run(t, s, shell("true")); o.err == nil {
		t.Error("a session whose process failed ran another")
	}
}

func testCannotExecute(t *testing.T, h *harness) {
	foreign := []byte("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xf3\x00" + strings.Repeat("\x00", 100)) // RISC-V
	img := image(t, program("bin/foreign", foreign), program("bin/noshebang", []byte("echo hi\n")),
		program("bin/nointerpreter", []byte("#!/no/such/interpreter\n")), file("bin/notexecutable", "x"), dir("usr/bin/adir"))
	for _, x := range []struct {
		arg    string
		code   int
		detail string
	}{
		{"nosuchcommand", 127, `exec: "nosuchcommand": executable file not found in $PATH`},
		{"/no/such/file", 127, "no such file or directory"},
		{"./relative", 127, "no such file or directory"},
		{"/bin/notexecutable", 126, "permission denied"},
		{"notexecutable", 126, "permission denied"},
		{"/usr/bin/adir", 126, "permission denied"},
		{"adir", 126, "permission denied"},
		{"foreign", 126, "exec format error (it is a program for riscv"},
		{"noshebang", 126, "exec format error"},
		{"nointerpreter", 127, "no such file or directory (its interpreter"},
		{"", 127, "no command"},
	} {
		o := run(t, h.start(t, nil, h.base, img), sandbox.Process{Args: []string{x.arg}, Env: []string{path}, Cwd: "/"})
		e := o.wantExit(t, x.code)
		if !e.NotFound || !strings.Contains(e.Detail, x.detail) {
			t.Errorf("%q: %+v, want NotFound and %q", x.arg, e, x.detail)
		}
	}
}

func testPathLookup(t *testing.T, h *harness) {
	s := h.start(t, nil)
	sh(t, s, "mkdir -p /a /b /w/rel; echo '#!/bin/sh\necho a $0' > /a/tool; sed s/a/b/ /a/tool > /b/tool; chmod 644 /a/tool; chmod 755 /b/tool; cp /b/tool /w/rel/mine")
	for _, x := range []struct{ arg, env, cwd, want string }{
		{"tool", "PATH=/a:/b:/bin", "/", "b /b/tool\n"},
		{"rel/mine", "PATH=/bin", "/w", "b rel/mine\n"},
		{"./mine", "PATH=/bin", "/w/rel", "b ./mine\n"},
	} {
		o := run(t, s, sandbox.Process{Args: []string{x.arg}, Env: []string{x.env}, Cwd: x.cwd})
		if o.err != nil {
			t.Fatalf("%s: %v", x.arg, o.err)
		}
		if !strings.HasPrefix(o.out, "b ") {
			t.Errorf("%s: output %q, want %q", x.arg, o.out, x.want)
		}
	}
}

// testDaemons: what a process leaves running ends with it, and writes nothing any more.
func testDaemons(t *testing.T, h *harness) {
	s := h.start(t, nil)
	begin := time.Now()
	o := sh(t, s, `setsid sh -c 'while :; do echo x >> /log; done' &
		(trap '' TERM HUP INT; nohup sleep 1000 >/dev/null 2>&1 & )
		mkfifo /fifo; setsid sh -c 'echo started > /fifo; exec sleep 1000' & cat /fifo; until test -s /log; do :; done`)
	if d := time.Since(begin); d > 20*time.Second {
		t.Errorf("the step took %s", d)
	}
	o.wantOut(t, "started\n")
	next := sh(t, s, `ps | grep -c '[s]leep 1000'; wc -c < /log; sleep 0.3; wc -c < /log; cat /log | wc -c`)
	f := strings.Fields(next.out)
	if len(f) != 4 || f[0] != "0" || f[1] != f[2] {
		t.Errorf("in the next step: %q", next.out)
	}
	if got := o.entries["log"].sum; f[1] != itoa(got) {
		t.Errorf("the layer has %d bytes of the log, the next step sees %s", got, f[1])
	}
}
