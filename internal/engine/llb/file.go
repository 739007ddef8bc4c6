package llb

import (
	"errors"
	"fmt"
	"time"

	"github.com/moby/buildkit/solver/pb"

	"github.com/kiln-build/kiln/internal/engine"
	"github.com/kiln-build/kiln/internal/fileop"
	"github.com/kiln-build/kiln/internal/tree"
)

func file(f *pb.FileOp, inputs int, op *engine.Op) (engine.Operation, error) {
	out := &engine.File{Result: -1}
	if n := len(f.GetActions()); n > maxActions {
		return nil, fmt.Errorf("a file operation of %d actions: more than %d are refused", n, maxActions)
	}
	for i, a := range f.GetActions() {
		if a == nil {
			return nil, errors.New("a file operation with an action that is not there")
		}
		act, err := action(a, inputs, i)
		if err != nil {
			return nil, err
		}
		out.Actions = append(out.Actions, act)
		switch {
		case a.Output == 0 && out.Result < 0:
			out.Result = i
		case a.Output != int64(pb.SkipOutput):
			return nil, errors.New("file operations with several results are not supported")
		}
	}
	if out.Result < 0 {
		return nil, errors.New("a file operation without a result")
	}
	name(op, "file operation")
	return out, nil
}

// ref decodes an input number: below inputs it is an input of the operation,
// above that the result of an earlier action, -1 is the empty file system.
func ref(n int64, inputs, actions int) (engine.Ref, error) {
	switch {
	case n == int64(pb.Empty):
		return engine.Ref{Kind: engine.RefScratch}, nil
	case n >= 0 && n < int64(inputs):
		return engine.Ref{Kind: engine.RefInput, N: int(n)}, nil
	case n >= int64(inputs) && n < int64(inputs+actions):
		return engine.Ref{Kind: engine.RefAction, N: int(n) - inputs}, nil
	}
	return engine.Ref{}, fmt.Errorf("file operation: input %d is not there", n)
}

func action(a *pb.FileAction, inputs, index int) (act engine.Action, err error) {
	if act.Base, err = ref(a.Input, inputs, index); err != nil {
		return act, err
	}
	d := &owners{inputs: inputs, index: index, act: &act}
	switch do := a.Action.(type) {
	case *pb.FileAction_Copy:
		if act.Source, err = ref(a.SecondaryInput, inputs, index); err != nil {
			return act, err
		}
		act.Copy, err = copyAction(do.Copy, d)
	case *pb.FileAction_Mkfile:
		m := do.Mkfile
		act.Mkfile = &fileop.MkfileAction{Path: m.Path, Mode: uint32(m.Mode) & 0o777, Data: m.Data, Timestamp: timestamp(m.Timestamp)}
		act.Mkfile.Owner, err = d.owner(m.Owner)
	case *pb.FileAction_Mkdir:
		m := do.Mkdir
		act.Mkdir = &fileop.MkdirAction{Path: m.Path, Mode: uint32(m.Mode) & 0o777, MakeParents: m.MakeParents, Timestamp: timestamp(m.Timestamp)}
		act.Mkdir.Owner, err = d.owner(m.Owner)
	case *pb.FileAction_Rm:
		act.Remove = &fileop.RemoveAction{Path: do.Rm.Path, AllowNotFound: do.Rm.AllowNotFound, AllowWildcard: do.Rm.AllowWildcard}
	case *pb.FileAction_Symlink:
		s := do.Symlink
		act.Link = &fileop.SymlinkAction{Oldpath: s.Oldpath, Newpath: s.Newpath, Timestamp: timestamp(s.Timestamp)}
		act.Link.Owner, err = d.owner(s.Owner)
	default:
		err = fmt.Errorf("file action %T is not supported", do)
	}
	return act, err
}

func copyAction(c *pb.FileActionCopy, d *owners) (*fileop.CopyAction, error) {
	out := &fileop.CopyAction{
		Src: c.Src, Dest: c.Dest, ModeStr: c.ModeStr, FollowSymlink: c.FollowSymlink, DirCopyContents: c.DirCopyContents,
		AttemptUnpackDockerCompatibility: c.AttemptUnpackDockerCompatibility, CreateDestPath: c.CreateDestPath,
		AllowWildcard: c.AllowWildcard, AllowEmptyWildcard: c.AllowEmptyWildcard, Timestamp: timestamp(c.Timestamp),
		IncludePatterns: c.IncludePatterns, ExcludePatterns: c.ExcludePatterns,
		AlwaysReplaceExistingDestPaths: c.AlwaysReplaceExistingDestPaths, RequiredPaths: c.RequiredPaths,
	}
	if c.Mode >= 0 {
		m := uint32(c.Mode) & tree.ModePerm
		out.Mode = &m
	}
	var err error
	out.Owner, err = d.owner(c.Owner)
	return out, err
}

// timestamp: -1 is none.
func timestamp(ns int64) *time.Time {
	if ns == -1 {
		return nil
	}
	t := time.Unix(0, ns)
	return &t
}

// owners decodes owners; where names are looked up goes into the action.
type owners struct {
	inputs, index int
	act           *engine.Action
}

func (d *owners) owner(o *pb.ChownOpt) (*fileop.Owner, error) {
	if o == nil || o.User == nil && o.Group == nil {
		return nil, nil
	}
	out := &fileop.Owner{}
	var err error
	if out.User, err = d.id(o.User, &d.act.UserIn); err != nil {
		return nil, err
	}
	out.Group, err = d.id(o.Group, &d.act.GroupIn)
	return out, err
}

func (d *owners) id(u *pb.UserOpt, in *engine.Ref) (*fileop.ID, error) {
	if u == nil {
		return nil, nil
	}
	switch id := u.User.(type) {
	case *pb.UserOpt_ByID:
		return &fileop.ID{Num: id.ByID}, nil
	case *pb.UserOpt_ByName:
		if id.ByName == nil {
			return nil, errors.New("file operation: an owner without a name")
		}
		var err error
		*in, err = ref(id.ByName.Input, d.inputs, d.index)
		return &fileop.ID{Name: id.ByName.Name}, err
	}
	return nil, nil
}
