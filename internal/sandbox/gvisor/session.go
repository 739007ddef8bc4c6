package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/kiln-build/kiln/internal/sandbox"
	"github.com/kiln-build/kiln/internal/sandbox/gvisor/wire"
)

// patience is how long a shim may take to reap everything once the control
// socket is closed. It takes milliseconds.
const patience = 3 * time.Second

var errClosed = errors.New("sandbox session is closed")

// session implements sandbox.Session.
type session struct {
	control    *os.File
	conn       *wire.Conn
	upper      *os.File // for the free space of its file system; may be nil
	log        *sentryLog
	volumes    map[*sandbox.Volume]int // their numbers
	mounts     []sandbox.Mount
	shim       *os.Process
	oomBefore  uint64 // kills of the control group when the last process began
	oomCounted bool

	done   chan struct{} // closed when the shim, and so everything else, is gone
	status int           // of the shim, valid then

	mu       sync.Mutex
	cause    error       // why it was ended, nil while it goes on
	detach   func() bool // ends the watch of Start's context
	ran      bool        // a process ran, and its volumes are there
	finished bool        // a process failed: there is nothing more to run
}

// boot configures the sentry and waits for it to come up.
func (s *session) boot(ctx context.Context, c wire.Config) error {
	boot, cancel := context.WithTimeoutCause(ctx, bootTime, fmt.Errorf("boot sandbox: no answer within %s", bootTime))
	defer cancel()
	stop := context.AfterFunc(boot, func() { s.end(context.Cause(boot)) })
	defer stop()
	var b wire.Booted
	err := s.conn.WriteJSON(wire.TypeConfig, c)
	if err == nil {
		err = s.conn.ReadJSON(wire.TypeBooted, &b)
	}
	if err != nil {
		return &bootError{s.failure("boot sandbox", err)}
	}
	switch {
	case b.Platform:
		return &bootError{fmt.Errorf("boot sandbox: %s", b.Error)}
	case b.Error != "":
		return fmt.Errorf("boot sandbox: %s", b.Error)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.detach = context.AfterFunc(ctx, func() { s.end(context.Cause(ctx)) })
	return nil
}

// Run implements sandbox.Session.
func (s *session) Run(ctx context.Context, p sandbox.Process, output, changes io.Writer) error {
	if err := s.usable(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	finished := s.finished
	s.mu.Unlock()
	if finished {
		return errors.New("run in sandbox: an earlier process of the session failed")
	}
	s.oomBefore, s.oomCounted = oomKills()
	r, err := s.order(ctx, wire.TypeProcess, wireProcess(p), output, changes)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.ran, s.finished = true, r.Failed
	s.mu.Unlock()
	if !r.Failed {
		return nil
	}
	e := &sandbox.ExitError{
		Code: r.Code, Signal: syscall.Signal(r.Signal), NotFound: r.NotFound,
		DiskFull: r.DiskFull || s.diskFull(), Detail: r.Detail,
	}
	if r.Code == 128+int(syscall.SIGKILL) && s.oomCounted {
		// The kernel may kill a single process of the guest's, by its stub.
		if after, ok := oomKills(); ok && after > s.oomBefore {
			e.OutOfMemory, e.Detail = true, oomDetail(s.oomBefore, true)
		}
	}
	return e
}

// Changes implements sandbox.Session.
func (s *session) Changes(ctx context.Context, v *sandbox.Volume, w io.Writer) error {
	if err := s.usable(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	ran := s.ran
	s.mu.Unlock()
	n, ok := s.volumes[v]
	switch {
	case !ok:
		return errors.New("changes of a volume: the session does not have it")
	case !ran:
		return errors.New("changes of a volume: no process has run")
	}
	_, err := s.order(ctx, wire.TypeVolume, wire.Volume{Number: n}, io.Discard, w)
	return err
}

func wireProcess(p sandbox.Process) wire.Process {
	w := wire.Process{
		Args: wire.Texts(p.Args), Env: wire.Texts(p.Env), Cwd: wire.Text(p.Cwd),
		UID: p.User.UID, GID: p.User.GID, Groups: p.User.Groups, Success: p.Success,
	}
	if p.Cwd == "" {
		w.Cwd = wire.Text("/")
	}
	for _, l := range p.Limits {
		w.Limits = append(w.Limits, wire.Limit(l))
	}
	return w
}

func (s *session) usable(ctx context.Context) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cause
}

// order carries out one order. An error ends the session.
func (s *session) order(ctx context.Context, t wire.Type, order any, output, changes io.Writer) (wire.Result, error) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { s.end(context.Cause(ctx)) })
	relay := wire.NewRelay(s.conn)
	r, err := s.exchange(ctx, t, order, output, changes, relay)
	if !stop() && err == nil {
		err = context.Cause(ctx) // too late: the session is ending already
	}
	if err != nil {
		s.end(err)
		s.wait()
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
	}
	cancel() // whoever is still being dialled
	relay.Close()
	return r, err
}

// exchange sends an order and takes in what comes back.
func (s *session) exchange(ctx context.Context, t wire.Type, order any, output, changes io.Writer, relay *wire.Relay) (wire.Result, error) {
	var r wire.Result
	if err := s.conn.WriteJSON(t, order); err != nil {
		return r, s.failure("run in sandbox", err)
	}
	for {
		t, b, err := s.conn.Read()
		if err != nil {
			return r, s.failure("run in sandbox", err)
		}
		switch t {
		case wire.TypeOutput:
			if _, err := output.Write(b); err != nil {
				return r, fmt.Errorf("write output: %w", err)
			}
		case wire.TypeChanges:
			if _, err := changes.Write(b); err != nil {
				return r, fmt.Errorf("write changes: %w", err)
			}
		case wire.TypeOpen:
			err = s.connect(ctx, relay, b)
		case wire.TypeData, wire.TypeClose:
			err = relay.Frame(t, b)
		case wire.TypeResult:
			return parseResult(b)
		default:
			err = fmt.Errorf("unexpected frame %q", t)
		}
		if err != nil {
			return r, fmt.Errorf("run in sandbox: %w", err)
		}
	}
}

func parseResult(b []byte) (r wire.Result, err error) {
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("run in sandbox: %w", err)
	}
	switch {
	case r.Error != "" && len(r.Dest) > 0:
		return r, &sandbox.MountError{Dest: string(r.Dest), Reason: r.Error}
	case r.Error != "":
		return r, fmt.Errorf("run in sandbox: %s", r.Error)
	}
	return r, nil
}

// connect relays a connection that a process has made to one of the session's sockets.
func (s *session) connect(ctx context.Context, relay *wire.Relay, b []byte) error {
	n, mount, err := wire.ParseOpen(b)
	if err != nil {
		return err
	}
	if mount >= len(s.mounts) || s.mounts[mount].Socket == nil {
		return fmt.Errorf("a connection to mount %d, which is no socket", mount)
	}
	dial := s.mounts[mount].Socket.Dial
	return relay.Add(n, func() (wire.Stream, error) {
		c, err := dial(ctx)
		if err != nil {
			return nil, err // not a nil net.Conn in an interface
		}
		return c, nil
	})
}

// failure explains why the control socket gave err: because the session was
// ended, or because the sentry died.
func (s *session) failure(doing string, err error) error {
	s.mu.Lock()
	cause := s.cause
	s.mu.Unlock()
	if cause != nil {
		return cause
	}
	s.control.Close()
	s.wait()
	switch s.status {
	case 128 + int(syscall.SIGKILL):
		return &sandbox.ExitError{
			Code: s.status, Signal: syscall.SIGKILL, OutOfMemory: true,
			Detail: oomDetail(s.oomBefore, s.oomCounted),
		}
	case 128 + int(syscall.SIGSYS):
		return fmt.Errorf("%s: the sandbox's kernel made a system call that its own seccomp filter forbids\n%s", doing, s.log.crash())
	}
	if text := s.log.crash(); text != "" {
		return fmt.Errorf("%s: the sandbox's kernel ended with status %d: %w\n%s", doing, s.status, err, text)
	}
	return fmt.Errorf("%s: the sandbox's kernel ended with status %d: %w", doing, s.status, err)
}

// end begins the end: with the control socket closed, the shim kills the
// sentry and reaps everything.
func (s *session) end(cause error) {
	s.mu.Lock()
	if s.cause == nil {
		s.cause = cause
	}
	s.mu.Unlock()
	s.control.Close()
}

// wait waits until all processes are gone.
func (s *session) wait() {
	select {
	case <-s.done:
		return
	case <-time.After(patience):
	}
	// A shim that hangs: its death is the sentry's.
	_ = s.shim.Kill()
	<-s.done
}

// Close implements sandbox.Session.
func (s *session) Close() error {
	s.mu.Lock()
	detach := s.detach
	s.detach = nil
	s.mu.Unlock()
	if detach != nil {
		detach()
	}
	s.end(errClosed)
	s.wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.upper != nil {
		s.upper.Close()
		s.upper = nil
	}
	return nil
}

// diskFull reports whether the disk behind the upper layer is full.
func (s *session) diskFull() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.upper == nil {
		return false
	}
	free, ok := freeBytes(s.upper)
	return ok && free < 1<<20
}
