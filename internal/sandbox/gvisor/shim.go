package gvisor

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/internal/sandbox/gvisor/wire"
)

// exitShimFailed is the shim's status if it could not start the sentry.
const exitShimFailed = 125

// shim starts the sentry and waits for it and everything below it.
//
// gVisor runs guest processes in stubs, about two host processes for each.
// They die with the sentry, but as orphans, and would stay zombies of the
// container's first process, which often is a builder that waits for its
// own children alone. So the shim adopts them (it is a subreaper) and reaps
// until none is left. It cannot be the builder itself, where wait4(-1) would
// take away the statuses of children that others wait for.
//
// It kills the sentry when the builder's end of the control socket is closed,
// which the kernel sees to however the builder ends.
func shim(layers int) int {
	// The death of the thread that forks is what Pdeathsig is about.
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		fmt.Fprintf(os.Stderr, "%s: set subreaper: %v\n", argv0, err)
		return exitShimFailed
	}
	files := make([]uintptr, wire.FDLayers+layers)
	for i := range files {
		files[i] = uintptr(i)
	}
	pid, err := syscall.ForkExec("/proc/self/exe", []string{argv0, roleSentry, strconv.Itoa(layers)}, &syscall.ProcAttr{
		Dir: "/", Env: []string{}, Files: files,
		Sys: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	})
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: start sentry: %v\n", argv0, err)
		return exitShimFailed
	}
	for fd := wire.FDUpper; fd < len(files); fd++ {
		unix.Close(fd)
	}
	c := &child{pid: pid}
	go c.killOnHangup()
	return exitStatus(c.reap())
}

// child is the sentry. Its process id is its own until reaped is set.
type child struct {
	pid    int
	mu     sync.Mutex
	reaped bool
}

// killOnHangup waits for the builder to close the control socket, without
// reading from it.
func (c *child) killOnHangup() {
	fds := []unix.PollFd{{Fd: wire.FDControl}} // POLLHUP needs not be asked for
	for {
		n, err := unix.Poll(fds, -1)
		if err != nil && err != unix.EINTR {
			return
		}
		if n > 0 {
			break
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.reaped {
		_ = unix.Kill(c.pid, unix.SIGKILL)
	}
}

// reap waits until there are no children left, and returns the sentry's status.
func (c *child) reap() unix.WaitStatus {
	var status unix.WaitStatus
	for {
		// Look first, and reap under the lock: a process id is free for
		// others as soon as it is reaped.
		var info unix.Siginfo
		err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOWAIT, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return status // ECHILD: all gone
		}
		c.mu.Lock()
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
		if err == nil && pid == c.pid {
			status, c.reaped = ws, true
			go killOrphans()
		}
		c.mu.Unlock()
	}
}

// killOrphans ends what might survive the sentry. Stubs ask the kernel to be
// killed with it; one that was just being made may not have come to that.
func killOrphans() {
	self := os.Getpid()
	for range 20 {
		time.Sleep(100 * time.Millisecond)
		entries, err := os.ReadDir("/proc")
		if err != nil {
			return
		}
		for _, e := range entries {
			if pid, err := strconv.Atoi(e.Name()); err == nil && parentOf(pid) == self {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
	}
}

// parentOf is the parent's process id, 0 if there is none to be found.
func parentOf(pid int) int {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return 0
	}
	var ppid int
	for line := range lines(string(b)) {
		if n, err := fmt.Sscanf(line, "PPid:\t%d", &ppid); n == 1 && err == nil {
			return ppid
		}
	}
	return 0
}

// exitStatus is a wait status as a shell has it.
func exitStatus(ws unix.WaitStatus) int {
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}
