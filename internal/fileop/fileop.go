// Package fileop evaluates a Dockerfile's COPY, ADD and what else is no RUN on
// trees, without a sandbox and without touching a file system: the actions of
// BuildKit's FileOp, with its semantics to the letter (solver/llbsolver/file and
// tonistiigi/fsutil/copy are the reference; the tests compare with the latter).
//
// Changes holds what the actions did to a base tree: metadata, and references
// to where content is. Content itself is read when the layer is written
// (WriteTar); that of unpacked archives waits in a scratch file.
//
// Sources, bases and archives are hostile input. Paths never leave their tree,
// devices are never opened, memory grows with the number of entries alone.
package fileop

import (
	"fmt"
	"time"

	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/tree"
)

// CopyAction is BuildKit's pb.FileActionCopy.
type CopyAction struct {
	Src  string // path in the source tree
	Dest string // path in the tree that is changed
	// Owner of everything copied and created; nil keeps the source's owner,
	// and gives created parent directories to root.
	Owner *Owner
	// Mode, permission bits with setuid, setgid and sticky, of everything copied and
	// created; nil (pb: -1) keeps the source's, and makes parents with 0755.
	Mode *uint32
	// ModeStr is a symbolic mode ("u=rwX,go-w") and goes before Mode.
	ModeStr string
	// FollowSymlink: a link as the last component of Src is followed.
	FollowSymlink bool
	// DirCopyContents: of a directory, what is in it is copied.
	DirCopyContents bool
	// AttemptUnpackDockerCompatibility: an archive is unpacked instead.
	AttemptUnpackDockerCompatibility bool
	// CreateDestPath: missing parents of Dest are created.
	CreateDestPath bool
	// AllowWildcard: Src may have wildcards, as path.Match knows them.
	AllowWildcard bool
	// AllowEmptyWildcard: a wildcard that matches nothing is no error.
	AllowEmptyWildcard bool
	// Timestamp (pb: -1 is nil) is the modification time of everything copied
	// and created; nil keeps the source's.
	Timestamp *time.Time
	// IncludePatterns and ExcludePatterns are .dockerignore-like patterns, relative to
	// the source. With any of the former, only what one matches is copied.
	IncludePatterns []string
	ExcludePatterns []string
	// AlwaysReplaceExistingDestPaths: what is in the way and of another
	// type is replaced, rather than an error.
	AlwaysReplaceExistingDestPaths bool
	// RequiredPaths must be among what is copied, if there are include
	// patterns: absolute paths in the source tree.
	RequiredPaths []string
}

// MkfileAction is BuildKit's pb.FileActionMkFile.
type MkfileAction struct {
	Path      string
	Mode      uint32 // permission bits; others are ignored
	Data      []byte // not to be modified afterwards
	Owner     *Owner
	Timestamp *time.Time // nil: now
}

// MkdirAction is BuildKit's pb.FileActionMkDir.
type MkdirAction struct {
	Path        string
	Mode        uint32 // permission bits; others are ignored
	MakeParents bool   // parents are made as well, with the same mode
	Owner       *Owner
	Timestamp   *time.Time // nil: now
}

// RemoveAction is BuildKit's pb.FileActionRm.
type RemoveAction struct {
	Path          string
	AllowNotFound bool
	AllowWildcard bool
}

// SymlinkAction is BuildKit's pb.FileActionSymlink.
type SymlinkAction struct {
	Oldpath   string // what the link says
	Newpath   string // where it is made
	Owner     *Owner
	Timestamp *time.Time // nil: now
}

// Owner is BuildKit's pb.ChownOpt.
type Owner struct {
	User, Group *ID
}

// ID is a user or group: by number, or by name if Tree is not nil.
type ID struct {
	Num  uint32
	Name string
	Tree tree.Tree // whose /etc/passwd or /etc/group knows Name
}

// Resolve turns names into numbers. A user given by number has the group of the
// same number unless there is a Group. A name that the tree does not know is 0,
// as with BuildKit; unknown has those, for a warning.
func (o *Owner) Resolve() (uid, gid uint32, unknown []string, err error) {
	if u := o.User; u != nil && u.Tree == nil {
		uid, gid = u.Num, u.Num
	} else if u != nil {
		var ok bool
		if uid, gid, ok, err = rootfs.UserByName(u.Tree, u.Name); err != nil {
			return 0, 0, nil, fmt.Errorf("look up user %q: %w", u.Name, err)
		}
		if !ok {
			unknown = append(unknown, u.Name)
		}
	}
	if g := o.Group; g != nil && g.Tree == nil {
		gid = g.Num
	} else if g != nil {
		n, ok, err := rootfs.GroupByName(g.Tree, g.Name)
		if err != nil {
			return 0, 0, nil, fmt.Errorf("look up group %q: %w", g.Name, err)
		}
		if ok {
			gid = n
		} else {
			unknown = append(unknown, g.Name)
		}
	}
	return uid, gid, unknown, nil
}

// owner is an Owner resolved; nil: none was given.
type owner struct{ uid, gid uint32 }

func resolveOwner(o *Owner) (*owner, error) {
	if o == nil {
		return nil, nil
	}
	uid, gid, _, err := o.Resolve()
	if err != nil {
		return nil, err
	}
	return &owner{uid, gid}, nil
}
