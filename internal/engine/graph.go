package engine

import (
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/cachemount"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/fileop"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/source"
	"github.com/kiln-build/kiln/internal/source/remote"
)

// Graph is what is to be computed: operations and which of them is wanted.
// It has no cycles, and Target needs every operation in Ops.
type Graph struct {
	Ops    []*Op // inputs before their users
	Target Input // Op nil: nothing, the empty file system
}

// Op is one operation with its place in the graph.
type Op struct {
	Name  string // for people: "[build 2/5] RUN make"
	Stage string // Dockerfile stage, from Name; may be empty
	// Digest is of the operation as it was given. Progress is told by it; no key has it.
	Digest digest.Digest
	Group  *progress.Group // what it is shown as with others; nil: by itself
	At     *diag.Location  // nil if it has no line of its own
	// Inputs are what Do's input numbers mean.
	Inputs []Input
	// IgnoreCache: run it even if its result is known.
	IgnoreCache bool
	Do          Operation
}

// Input is a result of another operation. Op nil: the empty file system.
type Input struct {
	Op *Op
	// Index of the result; only an Exec has more than one.
	Index int
}

// results is the number of results that op has.
func (op *Op) results() int {
	if x, ok := op.Do.(*Exec); ok {
		return x.NumResults()
	}
	return 1
}

// Operation is one of *Image, *Layout, *Local, *Exec, *File, *Merge, *Diff, *Remote.
type Operation interface{ operation() }

// Image is the root file system of an image in a registry or the local store.
type Image struct {
	Ref      string // normalised, with the digest that the front end resolved
	Platform ocispec.Platform
	Checksum digest.Digest // the digest that Ref must lead to; empty: any
	Limit    int           // only so many layers, from the bottom; 0: all
}

// Layout is the root file system of an image in an OCI layout.
type Layout struct {
	Store    string // name of a named context
	Digest   digest.Digest
	Platform ocispec.Platform
	Limit    int // as an Image's
}

// Local is a build context.
type Local struct{ source.Selection }

// Remote is a file of an http server, or a commit of a git repository.
type Remote struct{ Source remote.Source }

// Exec is a RUN step on Inputs[0]'s file system.
type Exec struct {
	Args     []string
	Env      []string
	Cwd      string
	User     string
	Hostname string
	Hosts    []Host // for /etc/hosts
	// Proxy is added to Env and is no part of the key.
	Proxy []string
	// SecretEnv is added to Env; of the values nothing is in the key.
	SecretEnv []SecretEnv
	// NoNetwork: the step has a loopback interface alone.
	NoNetwork bool
	Platform  ocispec.Platform
	// ReadOnlyRoot: the command cannot write to the root file system.
	ReadOnlyRoot bool
	Mounts       []Mount
	// Results are what the operation's results are, in order: Root, or the number of a
	// mount. Nil: the root alone.
	Results []int
	// Success are exit codes that count as success. Nil: 0 alone.
	Success []int
	// Ulimits replace the sandbox's default limits.
	Ulimits []Ulimit
}

// Root stands for the root file system among an Exec's Results.
const Root = -1

// NumResults is the number of results.
func (x *Exec) NumResults() int {
	if x.Results == nil {
		return 1
	}
	return len(x.Results)
}

// result is what result i is: Root, or the number of a mount.
func (x *Exec) result(i int) int {
	if x.Results == nil {
		return Root
	}
	return x.Results[i]
}

// isResult reports whether a mount, or Root, is one of the results.
func (x *Exec) isResult(mount int) bool {
	return mount == Root && x.Results == nil || slices.Contains(x.Results, mount)
}

// Mount is what a RUN step sees besides its root file system: a part of an input,
// unless one of Tmpfs, Cache, Secret and SSH is set. It is never part of the
// root's result; what is changed in an input is thrown away, unless the mount is a result itself.
type Mount struct {
	Dest string // absolute
	// Input is what is mounted, or what a cache begins with: the number of an input.
	Input    int
	Source   string // what of it, as tree.Tree has paths; "." is all
	Writable bool

	Tmpfs  *TmpfsMount
	Cache  *CacheMount
	Secret *SecretMount
	SSH    *SSHMount
}

// TmpfsMount is an empty directory in memory.
type TmpfsMount struct {
	Size int64 // bound in bytes; 0: none
}

// CacheMount is a directory that is kept from build to build.
type CacheMount struct {
	ID      string
	Sharing cachemount.Sharing
}

// SecretMount is a file with a secret's value. Without the secret there is no file if it is
// Optional, else the step fails.
type SecretMount struct {
	ID       string
	Owner    Owner
	Optional bool
}

// SecretEnv is an environment variable with a secret's value. Without the secret it is
// empty if it is Optional, else the step fails.
type SecretEnv struct {
	Name, ID string
	Optional bool
}

// SSHMount is a socket behind which is an SSH agent. Without the agent there is no socket if
// it is Optional, else the step fails.
type SSHMount struct {
	ID       string
	Owner    Owner
	Optional bool
}

// Owner is whose a file or socket is, and its permissions.
type Owner struct{ UID, GID, Mode uint32 }

// Ulimit bounds a resource of a step.
type Ulimit struct {
	Resource   int // RLIMIT_*, as Linux numbers them
	Soft, Hard uint64
}

// takesInput reports whether an input is mounted, or is what the mount begins with.
func (m *Mount) takesInput() bool { return m.Tmpfs == nil && m.Secret == nil && m.SSH == nil }

// Host is a line of /etc/hosts.
type Host struct{ Name, IP string }

// File is a list of actions on file systems, done without a sandbox.
type File struct {
	Actions []Action
	Result  int // the action whose result is the operation's
}

// Action is one step of a File. Exactly one of the pointers is set.
type Action struct {
	Base   Ref // what it changes
	Source Ref // what Copy copies from
	Copy   *fileop.CopyAction
	Mkfile *fileop.MkfileAction
	Mkdir  *fileop.MkdirAction
	Remove *fileop.RemoveAction
	Link   *fileop.SymlinkAction
	// UserIn and GroupIn are whose /etc/passwd and /etc/group know the
	// owner, where the action's owner is a name.
	UserIn, GroupIn Ref
}

func (a *Action) owner() *fileop.Owner {
	switch {
	case a.Copy != nil:
		return a.Copy.Owner
	case a.Mkfile != nil:
		return a.Mkfile.Owner
	case a.Mkdir != nil:
		return a.Mkdir.Owner
	case a.Link != nil:
		return a.Link.Owner
	}
	return nil
}

// Ref is a file system that an action works on: the empty one, an input of the
// operation, or the result of an earlier action.
type Ref struct {
	Kind RefKind
	N    int // input number, or action number
}

// RefKind says what a Ref refers to.
type RefKind int

// The kinds of Ref.
const (
	RefScratch RefKind = iota
	RefInput
	RefAction
)

// Merge lays its Inputs over each other, the first at the bottom.
type Merge struct{}

// Diff is what has to be laid over Inputs[0] to see Inputs[1].
type Diff struct{}

func (*Image) operation()  {}
func (*Layout) operation() {}
func (*Local) operation()  {}
func (*Remote) operation() {}
func (*Exec) operation()   {}
func (*File) operation()   {}
func (*Merge) operation()  {}
func (*Diff) operation()   {}
