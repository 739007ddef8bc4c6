package unpriv

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Check asserts that the calling process has no privilege: what a restricted
// pod refuses fails, and what Kiln's sandbox lives on works. scratch is a
// directory that can be written. The error names every assertion that failed.
// The calling thread is used up by it; call it in a process made for it.
func Check(scratch string) error {
	runtime.LockOSThread()
	var errs []error
	errs = append(errs, checkStatus()...)
	for _, r := range refusals(scratch) {
		if err := r.try(); err == nil {
			errs = append(errs, fmt.Errorf("%s works", r.what))
		} else if !errors.Is(err, unix.EPERM) && !errors.Is(err, r.or) {
			errs = append(errs, fmt.Errorf("%s fails with %w, not EPERM", r.what, err))
		}
	}
	if err := traceOwnChild(); err != nil {
		errs = append(errs, fmt.Errorf("ptrace of an own child: %w", err))
	}
	if err := ownFilter(); err != nil {
		errs = append(errs, fmt.Errorf("own seccomp filter: %w", err))
	}
	if err := memfd(); err != nil {
		errs = append(errs, fmt.Errorf("memfd: %w", err))
	}
	return errors.Join(errs...)
}

// checkStatus reads what the kernel says of the process.
func checkStatus() []error {
	f, err := os.Open("/proc/thread-self/status")
	if err != nil {
		return []error{err}
	}
	defer f.Close()
	want := map[string]string{
		"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000",
		"CapBnd": "0000000000000000", "CapAmb": "0000000000000000",
		"NoNewPrivs": "1", "Seccomp": "2", "Groups": "",
	}
	var errs []error
	seen := 0
	for s := bufio.NewScanner(f); s.Scan(); {
		k, v, _ := strings.Cut(s.Text(), ":")
		w, ok := want[k]
		if !ok {
			continue
		}
		seen++
		if v = strings.TrimSpace(v); v != w {
			errs = append(errs, fmt.Errorf("%s is %q, not %q", k, v, w))
		}
	}
	if seen != len(want) {
		errs = append(errs, fmt.Errorf("/proc/thread-self/status has %d of %d fields", seen, len(want)))
	}
	if unix.Getuid() == 0 || unix.Geteuid() == 0 {
		errs = append(errs, errors.New("uid is 0"))
	}
	if h, ok := os.LookupEnv("HOME"); ok {
		errs = append(errs, fmt.Errorf("HOME is %q, not unset", h))
	}
	return errs
}

type refusal struct {
	what string
	try  func() error
	or   error // accepted besides EPERM
}

func raw(trap, a, b, c uintptr) error {
	if _, _, e := unix.RawSyscall(trap, a, b, c); e != 0 {
		return e
	}
	return nil
}

func refusals(scratch string) []refusal {
	return []refusal{
		{"unshare(NEWUSER)", func() error { return raw(unix.SYS_UNSHARE, unix.CLONE_NEWUSER, 0, 0) }, nil},
		{"unshare(NEWNS)", func() error { return raw(unix.SYS_UNSHARE, unix.CLONE_NEWNS, 0, 0) }, nil},
		{"unshare(NEWNET)", func() error { return raw(unix.SYS_UNSHARE, unix.CLONE_NEWNET, 0, 0) }, nil},
		// An argument the kernel would refuse anyway, so that no process is made if the filter lets it through.
		{"clone(NEWUSER)", func() error { return raw(unix.SYS_CLONE, unix.CLONE_NEWUSER|unix.CLONE_FS, 0, 0) }, nil},
		{"clone3", func() error { return raw(unix.SYS_CLONE3, 0, 0, 0) }, unix.ENOSYS},
		{"mount", func() error { return unix.Mount("none", scratch, "tmpfs", 0, "") }, nil},
		{"umount", func() error { return unix.Unmount("/proc", unix.MNT_DETACH) }, nil},
		{"chroot", func() error { return unix.Chroot(scratch) }, nil},
		{"setuid(0)", func() error { return raw(unix.SYS_SETUID, 0, 0, 0) }, nil},
		{"setgid(0)", func() error { return raw(unix.SYS_SETGID, 0, 0, 0) }, nil},
		{"chown to another user", func() error { return unix.Chown(scratch, 0, 0) }, nil},
		{"mknod of a device", func() error {
			return unix.Mknod(filepath.Join(scratch, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3)))
		}, nil},
		{"setns", func() error { return raw(unix.SYS_SETNS, 0, unix.CLONE_NEWNS, 0) }, nil},
		{"ptrace of process 1", func() error { return unix.PtraceAttach(1) }, nil},
		{"bpf", func() error { return raw(unix.SYS_BPF, 0, 0, 0) }, nil},
		{"io_uring_setup", func() error { return raw(unix.SYS_IO_URING_SETUP, 1, 0, 0) }, nil},
		{"userfaultfd", func() error { return raw(unix.SYS_USERFAULTFD, 0, 0, 0) }, nil},
		{"personality(ADDR_NO_RANDOMIZE)", func() error { return raw(unix.SYS_PERSONALITY, 0x40000, 0, 0) }, nil},
		{"socket(AF_VSOCK)", func() error { return raw(unix.SYS_SOCKET, unix.AF_VSOCK, unix.SOCK_STREAM, 0) }, nil},
	}
}

func traceOwnChild() error {
	cmd := exec.Command("/proc/self/exe", "-help")
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	cmd.Env = []string{}
	if err := cmd.Start(); err != nil {
		return err
	}
	var ws unix.WaitStatus
	if _, err := unix.Wait4(cmd.Process.Pid, &ws, 0, nil); err != nil {
		return err
	}
	if !ws.Stopped() || ws.StopSignal() != unix.SIGTRAP {
		return fmt.Errorf("child is in state %#x, not stopped by its tracer", ws)
	}
	var regs unix.PtraceRegs
	if err := unix.PtraceGetRegs(cmd.Process.Pid, &regs); err != nil {
		return err
	}
	if err := cmd.Process.Kill(); err != nil {
		return err
	}
	_, err := unix.Wait4(cmd.Process.Pid, &ws, 0, nil)
	return err
}

func ownFilter() error {
	code := []unix.SockFilter{{Code: ret, K: unix.SECCOMP_RET_ALLOW}}
	prog := unix.SockFprog{Len: 1, Filter: &code[0]}
	return raw(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog)))
}

func memfd() error {
	fd, err := unix.MemfdCreate("check", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, 4096); err != nil {
		return err
	}
	b, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	return unix.Munmap(b)
}
