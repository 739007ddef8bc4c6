package local

import (
	"errors"
	"strings"

	"golang.org/x/sys/unix"
)

// openPath opens p below the root, following no symbolic link in any
// component: a link at the end can be opened with O_PATH only.
func (t *Tree) openPath(p string, flags int) (int, error) {
	if !valid(p) {
		return -1, unix.EINVAL
	}
	if len(p) >= unix.PathMax {
		return -1, unix.ENAMETOOLONG
	}
	flags |= unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY
	if flags&unix.O_PATH != 0 {
		flags &= unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	}
	root := int(t.root.Fd())
	if t.openat2 {
		return openBeneath(root, p, flags)
	}
	return openEach(root, p, flags)
}

// openBeneath has the kernel do it, in one call.
func openBeneath(root int, p string, flags int) (int, error) {
	how := unix.OpenHow{
		Flags:   uint64(flags),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	return retry(func() (int, error) { return unix.Openat2(root, p, &how) })
}

// openEach opens one component after the other, for kernels and sandboxes that
// have no openat2(2).
func openEach(root int, p string, flags int) (int, error) {
	dir := root
	for {
		name, rest, more := strings.Cut(p, "/")
		fl := flags
		if more {
			fl = unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
		}
		fd, err := retry(func() (int, error) { return unix.Openat(dir, name, fl, 0) })
		if dir != root {
			unix.Close(dir)
		}
		if err != nil || !more {
			return fd, err
		}
		dir, p = fd, rest
	}
}

// hasOpenat2 reports whether openat2(2) works here: it is missing from old
// kernels and from gVisor, and some seccomp profiles forbid it.
func hasOpenat2(root int) bool {
	fd, err := openBeneath(root, ".", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

// retry repeats a call that a signal interrupted.
func retry(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
