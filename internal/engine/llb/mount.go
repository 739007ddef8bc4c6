package llb

import (
	"errors"
	"fmt"
	"path"
	"strings"

	"github.com/moby/buildkit/solver/pb"

	"github.com/kiln-build/kiln/internal/engine"
	"github.com/kiln-build/kiln/internal/tree"
)

// mounts decodes what a step sees, and puts its inputs into the engine's order:
// the root file system first.
func mounts(e *pb.ExecOp, op *engine.Op) ([]engine.Mount, error) {
	if len(e.Mounts) > maxInputs {
		return nil, fmt.Errorf("decode build graph: a RUN step has %d mounts: more than %d are refused", len(e.Mounts), maxInputs)
	}
	d := mountDecoder{raw: op.Inputs, number: map[int64]int{}, cwd: e.Meta.GetCwd()}
	if err := d.root(e); err != nil {
		return nil, err
	}
	for _, m := range e.Mounts {
		if isRoot(m) {
			continue
		}
		if err := d.mount(m); err != nil {
			return nil, err
		}
	}
	for i := range op.Inputs {
		if _, ok := d.number[int64(i)]; !ok {
			return nil, fmt.Errorf("a RUN step with input %d, which it mounts nowhere, is not supported", i)
		}
	}
	op.Inputs = d.inputs
	return d.mounts, nil
}

func isRoot(m *pb.Mount) bool { return m.GetDest() == "/" }

type mountDecoder struct {
	raw    []engine.Input
	cwd    string
	inputs []engine.Input
	number map[int64]int // the engine's number of an input, by LLB's
	mounts []engine.Mount
}

func (d *mountDecoder) root(e *pb.ExecOp) error {
	var root *pb.Mount
	for _, m := range e.Mounts {
		if isRoot(m) && root != nil {
			return errors.New("a RUN step with several root file systems")
		}
		if isRoot(m) {
			root = m
		}
	}
	if root == nil {
		return errors.New("a RUN step without a root file system")
	}
	if root.MountType != pb.MountType_BIND || root.Selector != "" || root.Readonly || root.Output != 0 {
		return errors.New("a root file system that is read-only or a part of another is not supported")
	}
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
	out := engine.Mount{Dest: path.Clean(dest), Source: tree.Clean(m.GetSelector()), Writable: !m.GetReadonly()}
	switch {
	case out.Dest == "/":
		return fmt.Errorf("RUN --mount: invalid mount target %q", m.GetDest())
	case m.GetMountType() == pb.MountType_TMPFS:
		out.Source, out.Tmpfs, out.Size = ".", true, max(m.TmpfsOpt.GetSize(), 0)
	case m.GetMountType() != pb.MountType_BIND:
		return fmt.Errorf("RUN --mount=type=%s (at %s) is not supported yet", strings.ToLower(m.GetMountType().String()), dest)
	case m.Output == 0:
		return fmt.Errorf("a RUN step whose result is what it wrote to a mount (at %s) is not supported", dest)
	default:
		if out.Input, err = d.input(m); err != nil {
			return err
		}
	}
	d.mounts = append(d.mounts, out)
	return nil
}
