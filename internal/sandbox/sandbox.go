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
	"net"
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
	// they were written, goes to output as it comes. If the process succeeds,
	// what it changed against the session's present file system is written to
	// changes as a canonical layer tar (see layer.TarWriter), and becomes part of the
	// session's file system: the next Run starts from there. Otherwise nothing is
	// written to changes, and the session can only be asked for Changes and closed.
	//
	// A process that ran and failed is an *ExitError, a mount that cannot be
	// shown is a *MountError. A cancelled ctx kills the process and returns ctx's cause.
	Run(ctx context.Context, p Process, output, changes io.Writer) error
	// Changes writes what the last process changed in one of the volumes that the session's
	// mounts show, as a canonical layer tar on top of the volume's layers. It works also
	// after a process that failed, but not after any other error of Run.
	Changes(ctx context.Context, v *Volume, w io.Writer) error
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
	// ReadOnlyRoot: processes cannot write to the root file system. Its changes
	// are what the session itself made, such as a working directory.
	ReadOnlyRoot bool
	// Files are shown read-only over the image's and are never part of a
	// layer: absolute path → content. The engine gives /etc/resolv.conf,
	// /etc/hosts and /etc/hostname.
	Files map[string][]byte
	// Mounts are shown over the image's files to every process of the session.
	// Neither what is written there nor a mount point that the image lacks is
	// ever part of the root's changes. Of two at one place the last is seen; one
	// above another may be given in any order.
	Mounts []Mount
}

// Mount is something that is shown over the image's files: exactly one of Volume,
// Tmpfs, File and Socket.
type Mount struct {
	// Dest is an absolute path; symbolic links in it are followed within the image.
	Dest   string
	Volume *Volume
	// Source is what is shown of Volume: a path, as tree.Tree has them; it may be
	// a file's. Symbolic links are followed within the volume.
	Source string
	Tmpfs  *Tmpfs
	File   *File
	Socket *Socket
	// Writable: processes may change what they see of a Volume or Tmpfs.
	Writable bool
}

// Volume is a file system beside the root. Two mounts of the same *Volume show
// the same: what is written to one is seen in the other. Every process begins
// with Layers alone; what it changes ends with it, unless Session.Changes is asked for it.
type Volume struct {
	// Layers are paths of layer files, the bottom first. None: an empty directory.
	Layers []string
}

// Tmpfs is an empty directory in memory.
type Tmpfs struct {
	Size int64 // bounds it, in bytes; 0: half of the memory
}

// File is a read-only file that is nowhere but in memory: the builder's and the
// sandbox's own.
type File struct {
	Content  []byte
	Mode     uint32 // permissions
	UID, GID uint32
}

// Socket is a Unix stream socket. The builder relays each connection that a process
// makes to one from Dial; the sandbox has no path to what is behind it.
type Socket struct {
	Mode     uint32 // permissions
	UID, GID uint32
	// Dial is called with the context of Run. Safe for concurrent use.
	Dial func(ctx context.Context) (net.Conn, error)
}

// Process is one command.
type Process struct {
	Args []string // Args[0] is looked up in Env's PATH unless it has a slash
	Env  []string // K=V; all of the environment
	Cwd  string   // made, as WORKDIR does, if missing; .. in it is the kernel's
	User User
	// Success are the exit statuses that count as success; empty: 0 alone.
	Success []int
	// Limits replace the sandbox's default limits of resources.
	Limits []Limit
}

// Limit bounds one resource of a process and its children, as setrlimit(2) does.
type Limit struct {
	Resource   int    // unix.RLIMIT_*
	Soft, Hard uint64 // unix.RLIM_INFINITY: unbounded
}

// User is who a process is, all numbers resolved already.
type User struct {
	UID, GID uint32
	Groups   []uint32 // supplementary
}

// MountError says that something cannot be mounted in this image.
type MountError struct {
	Dest   string
	Reason string // a sentence without a full stop
}

func (e *MountError) Error() string { return fmt.Sprintf("cannot mount on %q: %s", e.Dest, e.Reason) }

// ExitError says that a process ran and did not succeed.
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
