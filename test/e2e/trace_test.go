package e2e

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/test/kilnrun"
	"github.com/kiln-build/kiln/test/testenv"
)

// tracer records what the kernel's trace events tell of a process and all that
// it starts. Nobody is attached to them with ptrace(2), and no seccomp listener
// is set on them: gVisor's platform needs both for itself.
type tracer struct {
	dir  string // its instance in tracefs, with a buffer of its own
	fuse int    // inotify descriptor watching /dev/fuse, or -1
}

// privilegedCalls are what only a privileged builder needs.
func privilegedCalls() []string {
	return []string{
		"unshare", "setns", "mount", "umount", "pivot_root", "chroot", "fsopen", "fsmount", "move_mount", "open_tree",
		"mount_setattr", "clone3", "execveat",
	}
}

// newTracer skips the test where the kernel or its owner does not let trace.
func newTracer(t *testing.T) *tracer {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("not traced: tracefs takes root")
	}
	root := "/sys/kernel/tracing"
	if _, err := os.Stat(root + "/instances"); err != nil {
		root = t.TempDir()
		if err := unix.Mount("tracefs", root, "tracefs", 0, ""); err != nil {
			t.Skipf("not traced: mount tracefs: %v", err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(root, 0); err != nil {
				t.Error(err)
			}
		})
	}
	if _, err := os.Stat(root + "/events/syscalls/sys_exit_mount"); err != nil {
		t.Skipf("not traced: the kernel has no events for system calls: %v", err)
	}
	tr := &tracer{dir: fmt.Sprintf("%s/instances/kiln-e2e-%d", root, os.Getpid()), fuse: -1}
	if err := os.Mkdir(tr.dir, 0o700); err != nil {
		t.Skipf("not traced: %v", err)
	}
	t.Cleanup(func() {
		if err := os.Remove(tr.dir); err != nil {
			t.Error(err)
		}
	})
	tr.choose(t)
	tr.watchFuse(t)
	return tr
}

// choose filters the events. A call that seccomp refuses has no event when it
// is entered, but one when it returns.
func (tr *tracer) choose(t *testing.T) {
	t.Helper()
	tr.set(t, "options/event-fork", "1")
	tr.set(t, "events/syscalls/sys_enter_clone/filter", fmt.Sprintf("clone_flags & %#x", unix.CLONE_NEWNS|unix.CLONE_NEWCGROUP|
		unix.CLONE_NEWUTS|unix.CLONE_NEWIPC|unix.CLONE_NEWUSER|unix.CLONE_NEWPID|unix.CLONE_NEWNET))
	for _, c := range []string{"clone", "execve"} {
		tr.set(t, "events/syscalls/sys_exit_"+c+"/filter", "ret < 0")
	}
	// Which file it was that could not be opened does not matter: none is expected.
	for _, c := range []string{"openat", "openat2"} {
		tr.set(t, "events/syscalls/sys_exit_"+c+"/filter", fmt.Sprintf("ret == %d || ret == %d", -int(unix.EACCES), -int(unix.EPERM)))
	}
}

// enable turns the events on or off: "1" or "0".
func (tr *tracer) enable(t *testing.T, value string) {
	t.Helper()
	for _, c := range append(privilegedCalls(), "clone", "execve", "openat", "openat2") {
		tr.set(t, "events/syscalls/sys_exit_"+c+"/enable", value)
	}
	tr.set(t, "events/syscalls/sys_enter_clone/enable", value)
	tr.set(t, "events/sched/sched_process_exec/enable", value)
}

func (tr *tracer) set(t *testing.T, file, value string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(tr.dir, file), []byte(value), 0); err != nil {
		t.Fatal(err)
	}
}

// watchFuse: which file is opened no event says, but the file itself does.
func (tr *tracer) watchFuse(t *testing.T) {
	t.Helper()
	if _, err := os.Stat("/dev/fuse"); err != nil {
		return
	}
	var err error
	if tr.fuse, err = unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(tr.fuse) })
	if _, err := unix.InotifyAddWatch(tr.fuse, "/dev/fuse", unix.IN_OPEN); err != nil {
		t.Fatal(err)
	}
}

// run runs a command to its end, held back until it is followed. It returns, in their order, the
// programs that it and its children ran, as "exec PATH", and the privileged calls that they made.
func (tr *tracer) run(t *testing.T, cmd *exec.Cmd) (events []string, out string) {
	t.Helper()
	cmd.Args = append([]string{"sh", "-c", `read go && exec "$@"`, "sh"}, cmd.Args...)
	cmd.Path = "/bin/sh"
	hold, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	cmd.Stdout, cmd.Stderr = &b, &b
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	tr.set(t, "set_event_pid", fmt.Sprint(cmd.Process.Pid))
	tr.enable(t, "1")
	if _, err := io.WriteString(hold, "go\n"); err != nil {
		t.Error(err)
	}
	if err := errors.Join(hold.Close(), cmd.Wait()); err != nil {
		t.Errorf("%v\n%s", err, b.String())
	}
	tr.wait(t)
	tr.enable(t, "0")
	return tr.read(t), b.String()
}

// wait is for the last process that is followed: the kernel takes the dead off the list.
func (tr *tracer) wait(t *testing.T) {
	t.Helper()
	for range 100 {
		left, err := os.ReadFile(filepath.Join(tr.dir, "set_event_pid"))
		if err != nil {
			t.Fatal(err)
		}
		if len(left) == 0 {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Error("a process lives on 10 s after the command")
}

// read takes the record out of the buffer.
func (tr *tracer) read(t *testing.T) (events []string) {
	t.Helper()
	record, err := os.ReadFile(filepath.Join(tr.dir, "trace"))
	if err != nil {
		t.Fatal(err)
	}
	n := regexp.MustCompile(`entries-in-buffer/entries-written: (\d+)/(\d+)`).FindSubmatch(record)
	if n == nil || string(n[1]) != string(n[2]) {
		t.Errorf("events were lost: %q", n)
	}
	exec := regexp.MustCompile(`sched_process_exec: filename=(.*) pid=`)
	for line := range strings.Lines(string(record)) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		if m := exec.FindStringSubmatch(line); m != nil {
			events = append(events, "exec "+m[1])
		} else {
			events = append(events, strings.TrimSpace(line))
		}
	}
	tr.set(t, "trace", "")
	if tr.fuse >= 0 {
		if n, err := unix.Read(tr.fuse, make([]byte, 4096)); err == nil && n > 0 {
			events = append(events, "open /dev/fuse")
		}
	}
	return events
}

// TestNoHelpersTouched traces a whole build, the sandbox and what runs in it
// included: no program but Kiln is run, no namespace made or entered, nothing mounted,
// no chroot, no /dev/fuse opened, nor any of it tried.
func TestNoHelpersTouched(t *testing.T) {
	guard(t)
	tr := newTracer(t)
	bed := kilnrun.Open(t, "library/busybox:latest")
	dir := oneStep(t, bed)
	if events, _ := tr.run(t, exec.CommandContext(t.Context(), "/bin/true")); !slices.Equal(events, []string{"exec /bin/true"}) {
		t.Fatalf("of /bin/true the trace shows %q", events)
	}
	tr.showsWhatIsRefused(t)

	events, out := tr.run(t, bed.Command(t.Context(), "build", "--progress", "plain", "--push", "--insecure-registry", bed.Host, "-t", bed.Host+"/traced", dir))
	// Before the builder there is the program that takes its privileges away.
	start := slices.Index(events, "exec "+bed.Bin)
	if start < 0 {
		t.Fatalf("the trace does not show the builder, but %q:\n%s", events, out)
	}
	// The sandbox is the builder again, as shim and as sentry.
	if got, want := events[start:], []string{"exec " + bed.Bin, "exec /proc/self/exe", "exec /proc/self/exe"}; !slices.Equal(got, want) {
		t.Errorf("the trace shows %q, want %q", got, want)
	}
}

// showsWhatIsRefused asserts that the trace tells of calls that docker's seccomp
// profile or the kernel refuses.
func (tr *tracer) showsWhatIsRefused(t *testing.T) {
	t.Helper()
	tool, err := testenv.Tool(t.Context(), "unpriv")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"/unshare", "sys_unshare -> ", "sys_chroot -> ", "sys_umount -> ", "sys_openat -> "}
	if fi, err := os.Stat("/dev/fuse"); err == nil && fi.Mode()&0o006 == 0o006 {
		want = append(want, "open /dev/fuse")
	}
	script := "unshare -U true; chroot / true; umount /proc; true < /dev/fuse; true < /etc/shadow; exit 0"
	events, out := tr.run(t, exec.CommandContext(t.Context(), tool, "--", "sh", "-c", script))
	for _, c := range want {
		if !strings.Contains(strings.Join(events, "\n"), c) {
			t.Errorf("the trace does not show %q, but %q:\n%s", c, events, out)
		}
	}
}
