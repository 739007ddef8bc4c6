package engine

import (
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

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

// Input is the result of another operation. Op nil: the empty file system.
type Input struct{ Op *Op }

// Operation is one of *Image, *Layout, *Local, *Exec, *File, *Merge, *Diff, *Remote.
type Operation interface{ operation() }

// Image is the root file system of an image in a registry or the local store.
type Image struct {
	Ref      string // normalised, with the digest that the front end resolved
	Platform ocispec.Platform
}

// Layout is the root file system of an image in an OCI layout.
type Layout struct {
	Store    string // name of a named context
	Digest   digest.Digest
	Platform ocispec.Platform
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
	// NoNetwork: the step has a loopback interface alone.
	NoNetwork bool
	Platform  ocispec.Platform
	Mounts    []Mount
}

// Mount is what a RUN step sees besides its root file system. It is never part
// of the result, and changes to it are thrown away.
type Mount struct {
	Dest string // absolute
	// Input is what is mounted: the number of an input.
	Input    int
	Source   string // what of it, as tree.Tree has paths; "." is all
	Writable bool
	Tmpfs    bool  // instead of an input: an empty directory in memory
	Size     int64 // of a Tmpfs, in bytes; 0: no bound
}

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
