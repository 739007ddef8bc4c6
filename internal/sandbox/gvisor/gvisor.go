// Package gvisor is the sandbox that needs no privilege: gVisor's user-space
// kernel in a child process of this very executable.
//
// The executable runs itself again for it, so its main function must begin with
//
//	if code, ok := gvisor.Main(os.Args); ok {
//		os.Exit(code)
//	}
//
// A session is three kinds of processes: a shim, which reaps; the sentry, which
// is the guest's kernel; and the stubs in which the guest's code runs. They
// have an empty environment, / as their directory and no descriptor but those of
// the session, and are gone when the session's control socket is closed, by
// Close or by the end of the builder. docs/design/sandbox.md tells the rest.
package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/sandbox"
)

// Platforms, i.e. ways to run the guest's code and to catch its system calls.
const (
	Systrap = "systrap" // seccomp traps and shared memory; the fast one
	Ptrace  = "ptrace"
)

// bootTime bounds the boot of a sentry, which takes some 50 ms.
const bootTime = 30 * time.Second

// Options of the sandbox. The zero value is right.
type Options struct {
	// Executable is what is run as the sandbox; it must call Main first. Empty: /proc/self/exe.
	Executable string
	// Platform: Systrap, Ptrace, or empty to use Systrap, and Ptrace only if
	// Systrap cannot boot on this machine. The choice is made once, before
	// the first process runs.
	Platform string
	// DebugLog gets gVisor's own log in full; nil: its warnings are kept for
	// the message about a crash, and dropped otherwise. Must be safe for
	// concurrent use if sessions run in parallel.
	DebugLog io.Writer
}

// Sandbox implements sandbox.Sandbox. Safe for concurrent use.
type Sandbox struct {
	opts Options

	mu   sync.Mutex
	info *Info // set once a platform has proved to work
}

// Info says how the sandbox runs on this machine.
type Info struct {
	Platform string
	Detail   string // one sentence; empty if there is nothing to say
}

// New returns the sandbox. It starts nothing.
func New(o Options) *Sandbox {
	if o.Executable == "" {
		o.Executable = "/proc/self/exe"
	}
	return &Sandbox{opts: o}
}

// Name implements sandbox.Sandbox.
func (*Sandbox) Name() string { return "gvisor" }

// Start implements sandbox.Sandbox.
func (s *Sandbox) Start(ctx context.Context, c sandbox.Config) (sandbox.Session, error) {
	sess, err := s.startChosen(ctx, c)
	if err != nil {
		return nil, err // not a nil *session in an interface
	}
	return sess, nil
}

// Probe boots a sentry and runs a trivial program in it, and so finds out in
// less than 0.1 s whether this machine lets the sandbox run, and how. Its
// error is for the user.
func (s *Sandbox) Probe(ctx context.Context) (Info, error) {
	s.mu.Lock()
	s.info = nil
	s.mu.Unlock()
	sess, err := s.startChosen(ctx, sandbox.Config{})
	if err != nil {
		return Info{}, err
	}
	if err := sess.Close(); err != nil {
		return Info{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.info == nil {
		return Info{}, errClosed
	}
	return *s.info, nil
}

// startChosen starts a session on the platform that works here. The first
// session finds out which, by a self-test as the last part of its boot; the
// others wait for it.
func (s *Sandbox) startChosen(ctx context.Context, c sandbox.Config) (*session, error) {
	if withCgo {
		return nil, diag.New(diag.ExitSandbox, "this program was built with cgo, with which gVisor cannot run").
			WithHint("Build it with CGO_ENABLED=0.")
	}
	s.mu.Lock()
	if info := s.info; info != nil {
		s.mu.Unlock()
		return s.start(ctx, info.Platform, c, false)
	}
	defer s.mu.Unlock()
	platform := s.opts.Platform
	switch platform {
	case Systrap, Ptrace:
	case "":
		platform = Systrap
	default:
		return nil, diag.New(diag.ExitUsage, "unknown gVisor platform %q", platform).WithHint("Platforms are %s and %s.", Systrap, Ptrace)
	}
	sess, err := s.start(ctx, platform, c, true)
	if err == nil {
		s.info = &Info{Platform: platform}
		return sess, nil
	}
	var boot *bootError
	if !errors.As(err, &boot) || ctx.Err() != nil {
		return nil, err
	}
	if s.opts.Platform != "" {
		return nil, cannotRun(err)
	}
	sess, second := s.start(ctx, Ptrace, c, true)
	if second != nil {
		return nil, cannotRun(fmt.Errorf("%w; on %s: %w", err, Ptrace, second))
	}
	s.info = &Info{Platform: Ptrace, Detail: fmt.Sprintf("slow, for %s does not work here: %v", Systrap, err)}
	return sess, nil
}

// bootError is a failure that may have to do with the platform.
type bootError struct{ err error }

func (e *bootError) Error() string { return e.err.Error() }
func (e *bootError) Unwrap() error { return e.err }

func cannotRun(err error) error {
	d := diag.New(diag.ExitSandbox, "cannot run the gVisor sandbox on this machine: %w", err)
	return d.WithHint("It needs ptrace(2) of its own children, seccomp(2) filters and memfd_create(2), which Kubernetes' and docker's default seccomp profiles allow.")
}
