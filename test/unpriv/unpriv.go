// Package unpriv runs a program with as little privilege as a Kubernetes pod
// of the "restricted" Pod Security Standard has: an ordinary uid and gid
// without other groups, every capability set empty, no_new_privs, docker's
// default seccomp profile as a real BPF filter, no HOME and next to no
// environment; on request everything is read-only but for a few directories.
// Check asserts that a process really is in that state.
package unpriv

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Options is the state that Exec goes to before it starts the program.
type Options struct {
	UID, GID int
	// ReadOnly makes every mount read-only for the program, but for Writable
	// and /proc. It takes root.
	ReadOnly bool
	Writable []string
	// Etc is a directory whose files are seen over those of /etc. It takes root.
	Etc string
	// Deadly kills a process (SIGSYS) that as much as tries to make a namespace,
	// to mount or to chroot, where the profile alone would refuse.
	Deadly bool
	Dir    string
	Env    []string // the whole environment
}

// Exec gives up every privilege and becomes argv; it returns only if it fails,
// and then the process must end. A caller who is not root keeps its uid and gid.
func Exec(o Options, argv []string) error {
	// Credentials, capabilities and filters are a thread's own: all happens on
	// this thread, and execve ends the others.
	runtime.LockOSThread()
	path, err := lookPath(argv[0], o.Env)
	if err != nil {
		return err
	}
	root := unix.Geteuid() == 0
	if o.ReadOnly || o.Etc != "" {
		if !root {
			return fmt.Errorf("change mounts: needs root")
		}
		if err := o.view(); err != nil {
			return err
		}
	}
	if o.Dir != "" {
		if err := unix.Chdir(o.Dir); err != nil {
			return fmt.Errorf("enter %q: %w", o.Dir, err)
		}
	}
	if root {
		if err := dropIDs(o.UID, o.GID); err != nil {
			return err
		}
	}
	if err := dropCaps(); err != nil {
		return err
	}
	filter, err := Filter(nil)
	if err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	if o.Deadly {
		deadly, err := deadlyFilter()
		if err != nil {
			return err
		}
		if err := load(deadly); err != nil {
			return err
		}
	}
	if err := load(filter); err != nil {
		return err
	}
	return fmt.Errorf("run %q: %w", path, unix.Exec(path, argv, o.Env))
}

func load(filter []unix.SockFilter) error {
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if _, _, e := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog))); e != 0 {
		return fmt.Errorf("load seccomp filter: %w", e)
	}
	return nil
}

// lookPath finds a program by the PATH that it will have.
func lookPath(name string, env []string) (string, error) {
	if filepath.Base(name) != name {
		return name, nil
	}
	for _, kv := range env {
		if len(kv) < 5 || kv[:5] != "PATH=" {
			continue
		}
		for _, d := range filepath.SplitList(kv[5:]) {
			p := filepath.Join(d, name)
			if fi, err := os.Stat(p); err == nil && !fi.IsDir() && fi.Mode()&0o111 != 0 {
				return p, nil
			}
		}
	}
	return "", fmt.Errorf("run %q: not in PATH", name)
}

// view moves to a mount namespace of its own with what the options want to be seen.
func (o *Options) view() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if o.Etc != "" {
		if err := unix.Mount("overlay", "/etc", "overlay", 0, "lowerdir="+o.Etc+":/etc"); err != nil {
			return fmt.Errorf("put %q over /etc: %w", o.Etc, err)
		}
	}
	if o.ReadOnly {
		return readOnlyView(o.Writable)
	}
	return nil
}

// readOnlyView makes all mounts read-only but the writable directories and /proc.
func readOnlyView(writable []string) error {
	writable = append([]string{"/proc"}, writable...)
	for _, d := range writable[1:] {
		if err := unix.Mount(d, d, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("bind %q: %w", d, err)
		}
	}
	set := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &set); err != nil {
		return fmt.Errorf("make mounts read-only: %w", err)
	}
	clear := unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}
	for _, d := range writable {
		if err := unix.MountSetattr(unix.AT_FDCWD, d, unix.AT_RECURSIVE, &clear); err != nil {
			return fmt.Errorf("make %q writable: %w", d, err)
		}
	}
	return nil
}

func dropIDs(uid, gid int) error {
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); e != 0 {
		return fmt.Errorf("drop groups: %w", e)
	}
	for c := uintptr(0); ; c++ {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err == unix.EINVAL {
			break // past the last one
		} else if err != nil {
			return fmt.Errorf("drop bounding capability %d: %w", c, err)
		}
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(gid), uintptr(gid), uintptr(gid)); e != 0 {
		return fmt.Errorf("set gid: %w", e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); e != 0 {
		return fmt.Errorf("set uid: %w", e)
	}
	return nil
}

func dropCaps() error {
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("drop ambient capabilities: %w", err)
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	return nil
}
