package llb

import (
	"errors"
	"fmt"
	"path"
	"strings"

	"github.com/moby/buildkit/solver/pb"

	"github.com/kiln-build/kiln/internal/cachemount"
	"github.com/kiln-build/kiln/internal/engine"
	"github.com/kiln-build/kiln/internal/tree"
)

// defaultAgent is the id of the SSH agent that a step means if it names none.
const defaultAgent = "default"

// mounts decodes what a step sees and what of it is a result, and puts its inputs into the
// engine's order: the root file system first.
func mounts(e *pb.ExecOp, op *engine.Op, x *engine.Exec) error {
	if len(e.Mounts) > maxInputs {
		return fmt.Errorf("decode build graph: a RUN step has %d mounts: more than %d are refused", len(e.Mounts), maxInputs)
	}
	d := mountDecoder{raw: op.Inputs, number: map[int64]int{}, cwd: e.Meta.GetCwd()}
	if err := d.root(e, x); err != nil {
		return err
	}
	x.Results = []int{}
	for _, m := range e.Mounts {
		n := engine.Root
		if !isRoot(m) {
			if err := d.mount(m); err != nil {
				return err
			}
			n = len(d.mounts) - 1
		}
		// In this order, whatever numbers the mounts give them, as BuildKit has it.
		if d.isResult(m) {
			x.Results = append(x.Results, n)
		}
	}
	for i := range op.Inputs {
		if _, ok := d.number[int64(i)]; !ok {
			return fmt.Errorf("a RUN step with input %d, which it mounts nowhere, is not supported", i)
		}
	}
	op.Inputs, x.Mounts = d.inputs, d.mounts
	return nil
}

func isRoot(m *pb.Mount) bool { return m.GetDest() == "/" }

type mountDecoder struct {
	raw    []engine.Input
	cwd    string
	inputs []engine.Input
	number map[int64]int // the engine's number of an input, by LLB's
	mounts []engine.Mount
}

// isResult reports whether what becomes of a mount is a result of the operation. A cache is
// none: its result is what it began with.
func (d *mountDecoder) isResult(m *pb.Mount) bool {
	if m.GetOutput() == int64(pb.SkipOutput) {
		return false
	}
	return m.GetMountType() == pb.MountType_BIND || m.GetMountType() == pb.MountType_CACHE && m.GetInput() != int64(pb.Empty)
}

// root finds the root file system. That it be a part of an input cannot be asked for:
// BuildKit takes no notice of a selector here.
func (d *mountDecoder) root(e *pb.ExecOp, x *engine.Exec) error {
	var root *pb.Mount
	for _, m := range e.Mounts {
		if isRoot(m) && root != nil {
			return errors.New("a RUN step with several root file systems")
		}
		if isRoot(m) {
			root = m
		}
	}
	switch {
	case root == nil:
		return errors.New("a RUN step without a root file system")
	case root.GetMountType() != pb.MountType_BIND:
		return fmt.Errorf("a root file system of type %s", strings.ToLower(root.GetMountType().String()))
	}
	x.ReadOnlyRoot = root.GetReadonly() || !d.isResult(root)
	_, err := d.input(root)
	return err
}

// input numbers an input of the step's.
func (d *mountDecoder) input(m *pb.Mount) (int, error) {
	if n, ok := d.number[m.Input]; ok {
		return n, nil
	}
	var in engine.Input // nothing
	switch {
	case m.Input >= 0 && m.Input < int64(len(d.raw)):
		in = d.raw[m.Input]
	case m.Input != int64(pb.Empty):
		return 0, fmt.Errorf("a RUN step that mounts input %d, which there is not", m.Input)
	}
	n := len(d.inputs)
	d.number[m.Input] = n
	d.inputs = append(d.inputs, in)
	return n, nil
}

func (d *mountDecoder) mount(m *pb.Mount) (err error) {
	dest := m.GetDest()
	if !path.IsAbs(dest) {
		dest = path.Join("/", d.cwd, dest)
	}
	out := engine.Mount{Dest: path.Clean(dest), Writable: !m.GetReadonly()}
	if out.Dest == "/" {
		return fmt.Errorf("RUN --mount: invalid mount target %q", m.GetDest())
	}
	switch m.GetMountType() {
	case pb.MountType_TMPFS:
		out.Tmpfs = &engine.TmpfsMount{Size: max(m.TmpfsOpt.GetSize(), 0)}
	case pb.MountType_SECRET:
		o := m.GetSecretOpt()
		if o.GetID() == "" {
			return fmt.Errorf("RUN --mount=type=secret (at %s) without an id", dest)
		}
		out.Secret = &engine.SecretMount{ID: o.ID, Owner: owner(o.Uid, o.Gid, o.Mode), Optional: o.Optional}
	case pb.MountType_SSH:
		o := m.GetSSHOpt()
		if o == nil {
			return fmt.Errorf("RUN --mount=type=ssh (at %s) without its options", dest)
		}
		out.SSH = &engine.SSHMount{ID: o.ID, Owner: owner(o.Uid, o.Gid, o.Mode), Optional: o.Optional}
		if out.SSH.ID == "" {
			out.SSH.ID = defaultAgent
		}
	case pb.MountType_CACHE:
		if out.Cache, err = cache(m); err != nil {
			return err
		}
		fallthrough
	case pb.MountType_BIND:
		out.Source = tree.Clean(m.GetSelector())
		if out.Input, err = d.input(m); err != nil {
			return err
		}
	default:
		return fmt.Errorf("RUN --mount=type=%s (at %s) is not supported", strings.ToLower(m.GetMountType().String()), dest)
	}
	d.mounts = append(d.mounts, out)
	return nil
}

func owner(uid, gid, mode uint32) engine.Owner {
	return engine.Owner{UID: uid, GID: gid, Mode: mode & 0o777}
}

func cache(m *pb.Mount) (*engine.CacheMount, error) {
	if m.GetCacheOpt() == nil {
		return nil, fmt.Errorf("RUN --mount=type=cache (at %s) without its options", m.GetDest())
	}
	c := &engine.CacheMount{ID: m.CacheOpt.ID}
	switch m.CacheOpt.Sharing {
	case pb.CacheSharingOpt_SHARED:
		c.Sharing = cachemount.Shared
	case pb.CacheSharingOpt_PRIVATE:
		c.Sharing = cachemount.Private
	case pb.CacheSharingOpt_LOCKED:
		c.Sharing = cachemount.Locked
	default:
		return nil, fmt.Errorf("RUN --mount=type=cache (at %s): sharing %s is not known", m.GetDest(), m.CacheOpt.Sharing)
	}
	return c, nil
}
