// Package sandbox is the seam between the engine and what runs a RUN step: a
// session on a stack of layers, in which processes run one after another and
// whose changes come back as layer tars.
//
// Its invariants, which the conformance suite (sandboxtest) checks for every
// implementation: a process sees the layers merged and is root there; nothing
// of the builder's files, environment and descriptors is visible; when Run
// returns, everything that the process started is gone; two implementations
// give the same tar for the same changes, up to times.
package sandbox

import (
	"context"
	"fmt"
	"io"
	"syscall"
)

// Sandbox makes sessions.
type Sandbox interface {
	// Name is what --sandbox calls it: "gvisor", "native".
	Name() string
	// Start boots a session. The session outlives ctx's cancellation only
	// until Close: a cancelled ctx ends what runs in it.
	Start(ctx context.Context, c Config) (Session, error)
}

// Session is a booted root file system. Not safe for concurrent use.
type Session interface {
	// Run runs p to its end. Output, stdout and stderr in the order in which
	// they were written, goes to output as it comes. If the process exits with 0,
	// what it changed against the session's present file system is written to
	// changes as a canonical layer tar (see layer.TarWriter), and becomes part of the
	// session's file system: the next Run starts from there. Otherwise nothing is
	// written to changes and the session can only be closed.
	//
	// A process that ran and failed is an *ExitError. A cancelled ctx kills
	// the process and returns ctx's cause.
	Run(ctx context.Context, p Process, output, changes io.Writer) error
	// Close ends the session and everything in it, and frees its disk space.
	// It returns when all its processes are gone.
	Close() error
}

// DefaultHostname is BuildKit's.
const DefaultHostname = "buildkitsandbox"

// Config describes a session.
type Config struct {
	// Layers are paths of layer files, the bottom first. May be empty (scratch).
	Layers []string
	// Dir is a directory on disk, owned by the caller, for the session's
	// scratch files. They are unlinked at once where possible.
	Dir string
	// Network: whether processes share the builder's network; if not they
	// have a loopback interface alone.
	Network bool
	// Hostname of the session; empty: DefaultHostname.
	Hostname string
	// Files are shown read-only over the image's and are never part of a
	// layer: absolute path → content. The engine gives /etc/resolv.conf,
	// /etc/hosts and /etc/hostname.
	Files map[string][]byte
	// Mounts are shown over the image's files to every process of the session.
	// Neither what is written there nor a mount point that the image lacks is
	// ever part of a layer. Of two at one place the last is seen; one above
	// another may be given in any order.
	Mounts []Mount
}

// Mount is a file or directory of other layers than the session's, or an empty
// directory.
type Mount struct {
	// Dest is an absolute path; symbolic links in it are followed within the image.
	Dest string
	// Layers are paths of layer files, the bottom first. None: an empty directory in memory.
	Layers []string
	// Source is a path, as tree.Tree has them, in the merged Layers; it may be
	// a file's. Symbolic links are followed within them.
	Source string
	// Writable: each process may change what it sees; its changes end with it.
	Writable bool
	// Size bounds an empty directory, in bytes; 0: half of the memory.
	Size int64
}

// Process is one command.
type Process struct {
	Args []string // Args[0] is looked up in Env's PATH unless it has a slash
	Env  []string // K=V; all of the environment
	Cwd  string   // made, as WORKDIR does, if missing; .. in it is the kernel's
	User User
}

// User is who a process is, all numbers resolved already.
type User struct {
	UID, GID uint32
	Groups   []uint32 // supplementary
}

// ExitError says that a process ran and did not exit with 0.
type ExitError struct {
	Code   int            // exit status; 128+Signal if killed by a signal
	Signal syscall.Signal // 0 unless killed by a signal
	// OutOfMemory: the kernel, or the sandbox, killed it for memory.
	OutOfMemory bool
	// DiskFull: a write failed for lack of space in Config.Dir's file system.
	DiskFull bool
	// NotFound: Args[0] is not in the image, or cannot be executed.
	NotFound bool
	// Detail is one more sentence for the user, if there is something to say.
	Detail string
}

func (e *ExitError) Error() string {
	s := fmt.Sprintf("exit code: %d", e.Code)
	if e.Signal != 0 {
		s = fmt.Sprintf("killed by signal %d (%s)", int(e.Signal), e.Signal)
	}
	switch {
	case e.OutOfMemory:
		s += ": out of memory"
	case e.DiskFull:
		s += ": no space left on the builder's disk"
	}
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	return s
}
