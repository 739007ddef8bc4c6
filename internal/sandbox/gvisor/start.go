package gvisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/internal/sandbox"
	"github.com/kiln-build/kiln/internal/sandbox/gvisor/wire"
)

// start boots a session on a platform.
// selfTest has it prove first that it can run a process. c.Dir may be empty:
// the session then can run, but not take changes to speak of.
func (s *Sandbox) start(ctx context.Context, platform string, c sandbox.Config, selfTest bool) (sess *session, err error) {
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	var files []*os.File // what the child inherits from wire.FDControl on
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	control, theirs, err := socketPair()
	if err != nil {
		return nil, fmt.Errorf("start sandbox: %w", err)
	}
	files = append(files, theirs)
	upper, err := openUpper(c.Dir)
	if err != nil {
		control.Close()
		return nil, fmt.Errorf("start sandbox: %w", err)
	}
	files = append(files, upper)
	config := wireConfig(platform, c)
	others, volumes := addMounts(&config, c)
	for _, l := range slices.Concat(c.Layers, others) {
		f, err := os.Open(l)
		if err != nil {
			control.Close()
			return nil, fmt.Errorf("open layer: %w", err)
		}
		files = append(files, f)
	}
	sess = &session{
		control: control, conn: wire.NewConn(control), upper: dup(upper),
		log: &sentryLog{also: s.opts.DebugLog}, done: make(chan struct{}), volumes: volumes, mounts: c.Mounts,
	}
	err = sess.spawn(s.opts.Executable, files)
	theirs.Close() // or the end of the child would not be the end of the stream
	if err != nil {
		control.Close()
		return nil, fmt.Errorf("start sandbox: %w", err)
	}
	config.SelfTest = selfTest
	config.Debug = s.opts.DebugLog != nil
	if err := sess.boot(ctx, config); err != nil {
		_ = sess.Close()
		return nil, err
	}
	return sess, nil
}

func wireConfig(platform string, c sandbox.Config) wire.Config {
	w := wire.Config{Platform: platform, Layers: len(c.Layers), Network: c.Network, Hostname: c.Hostname, ReadOnlyRoot: c.ReadOnlyRoot}
	if w.Hostname == "" {
		w.Hostname = sandbox.DefaultHostname
	}
	for path, content := range c.Files {
		w.Files = append(w.Files, wire.File{Path: wire.Text(path), Content: content})
	}
	slices.SortFunc(w.Files, func(a, b wire.File) int { return slices.Compare(a.Path, b.Path) })
	return w
}

// addMounts adds c's mounts and their volumes to w. It returns the layer files that are
// needed for them besides those of the root, none twice, and the volumes' numbers.
func addMounts(w *wire.Config, c sandbox.Config) (others []string, volumes map[*sandbox.Volume]int) {
	numbers := map[string]int{}
	for i, l := range c.Layers {
		numbers[l] = i
	}
	number := func(l string) int {
		if _, ok := numbers[l]; !ok {
			numbers[l] = len(c.Layers) + len(others)
			others = append(others, l)
		}
		return numbers[l]
	}
	volumes = map[*sandbox.Volume]int{}
	for _, m := range c.Mounts {
		x := wireMount(m)
		if v := m.Volume; v != nil {
			if _, ok := volumes[v]; !ok {
				volumes[v] = len(w.Volumes)
				layers := []int{}
				for _, l := range v.Layers {
					layers = append(layers, number(l))
				}
				w.Volumes = append(w.Volumes, layers)
			}
			x.Volume = volumes[v]
		}
		w.Mounts = append(w.Mounts, x)
	}
	w.Others = len(others)
	return others, volumes
}

func wireMount(m sandbox.Mount) wire.Mount {
	w := wire.Mount{Dest: wire.Text(m.Dest), Source: wire.Text(m.Source), Writable: m.Writable}
	switch {
	case m.Volume != nil:
		w.Kind = wire.KindVolume
	case m.Tmpfs != nil:
		w.Kind, w.Size = wire.KindTmpfs, m.Tmpfs.Size
	case m.File != nil:
		w.Kind, w.Content, w.Mode, w.UID, w.GID = wire.KindFile, m.File.Content, m.File.Mode, m.File.UID, m.File.GID
	case m.Socket != nil:
		w.Kind, w.Mode, w.UID, w.GID = wire.KindSocket, m.Socket.Mode, m.Socket.UID, m.Socket.GID
	}
	return w
}

// socketPair makes the control socket. Our end is for Go's poller, so that
// closing it ends a read; the other blocks.
func socketPair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return nil, nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fds[0]), "control"), os.NewFile(uintptr(fds[1]), "control"), nil
}

// openUpper makes the file behind the upper layer. It has no name for longer
// than necessary, so that nothing is left behind, however the builder ends.
func openUpper(dir string) (*os.File, error) {
	if dir == "" {
		fd, err := unix.MemfdCreate("upper", unix.MFD_CLOEXEC)
		if err != nil {
			return nil, os.NewSyscallError("memfd_create", err)
		}
		return os.NewFile(uintptr(fd), "upper"), nil
	}
	if f, err := os.OpenFile(dir, unix.O_TMPFILE|os.O_RDWR, 0o600); err == nil {
		return f, nil
	}
	f, err := os.CreateTemp(dir, "upper-*") // a file system that has no O_TMPFILE
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// freeBytes is what is free on the disk that f is on.
func freeBytes(f *os.File) (uint64, bool) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return 0, false
	}
	return st.Bavail * uint64(st.Bsize), true
}

// dup keeps a descriptor for the session itself; nil if there are no more.
func dup(f *os.File) *os.File {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	return os.NewFile(uintptr(fd), f.Name())
}

// spawn starts the shim.
func (s *session) spawn(executable string, files []*os.File) error {
	layers := len(files) - (wire.FDLayers - wire.FDControl)
	cmd := exec.Command(executable)
	cmd.Args = []string{argv0, roleShim, strconv.Itoa(layers)}
	cmd.Env, cmd.Dir = []string{}, "/"
	cmd.Stderr, cmd.ExtraFiles = s.log, files
	// A session of its own: a terminal's ^C is for the builder to act on.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// Whatever holds stderr open for longer than the shim lives is not waited for.
	cmd.WaitDelay = 2 * time.Second
	if err := cmd.Start(); err != nil {
		return err
	}
	s.shim = cmd.Process
	go func() {
		err := cmd.Wait()
		var exit *exec.ExitError
		if errors.As(err, &exit) || err == nil || errors.Is(err, exec.ErrWaitDelay) {
			s.status = shellStatus(cmd.ProcessState)
		}
		close(s.done)
	}()
	return nil
}

func shellStatus(p *os.ProcessState) int {
	if ws, ok := p.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return p.ExitCode()
}
