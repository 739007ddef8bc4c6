package engine

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"path"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/fileop"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/sandbox"
	"github.com/kiln-build/kiln/internal/tree"
)

// selection is what m shows of its input, as a copy would take it.
func (m *Mount) selection() fileop.CopyAction {
	return fileop.CopyAction{Src: path.Join("/", m.Source), Dest: "/" + mountedName, FollowSymlink: true}
}

// hash adds a mount's fields.
func (m *Mount) hash(h *cache.Hasher) {
	h.String(m.Dest)
	h.Int(int64(m.Input))
	h.String(m.Source)
	h.Bool(m.Writable)
	h.Bool(m.Tmpfs)
	h.Int(m.Size)
}

// mountsByContent is byContent for a RUN step: all but its root file system
// counts by what is mounted of it.
func (r *run) mountsByContent(op *Op, x *Exec, computed bool) []bool {
	out := make([]bool, len(op.Inputs))
	for _, m := range x.Mounts {
		if m.Tmpfs || m.Input == 0 || op.Inputs[m.Input].Op == nil {
			continue
		}
		_, local := op.Inputs[m.Input].Op.Do.(*Local)
		out[m.Input] = local || computed
	}
	return out
}

// mounts makes the step's mounts ready to be shown.
func (r *run) mounts(ctx context.Context, op *Op, x *Exec, ins []Result) ([]sandbox.Mount, error) {
	var out []sandbox.Mount
	for _, m := range x.Mounts {
		s := sandbox.Mount{Dest: m.Dest, Source: m.Source, Writable: m.Writable}
		switch {
		case m.Tmpfs:
			s.Tmpfs = &sandbox.Tmpfs{Size: m.Size}
		case ins[m.Input].context != nil:
			l, err := r.contextLayer(ctx, ins[m.Input], m.selection())
			if err != nil {
				return nil, err
			}
			s.Volume, s.Source = &sandbox.Volume{Layers: []string{r.Store.LayerPath(l.DiffID)}}, mountedName
		default:
			t, err := r.Tree(ctx, ins[m.Input])
			if err == nil {
				err = m.exists(t)
			}
			if err != nil {
				return nil, err
			}
			s.Volume = &sandbox.Volume{}
			for _, l := range ins[m.Input].Layers {
				s.Volume.Layers = append(s.Volume.Layers, r.Store.LayerPath(l.DiffID))
			}
		}
		out = append(out, s)
	}
	return out, nil
}

// exists checks that there is what m shows: of an input that counts as a
// whole, nobody has asked before.
func (m *Mount) exists(t tree.Tree) error {
	_, err := rootfs.Resolve(t, path.Join("/", m.Source), true)
	if errors.Is(err, fs.ErrNotExist) {
		return diag.New(diag.ExitDockerfile, "%q: not found", path.Join("/", m.Source))
	}
	return err
}

// mountedName is what a part of a build context is called in its layer.
const mountedName = "mounted"

// contextRoot selects all of a build context, as a root file system.
func contextRoot() fileop.CopyAction {
	return fileop.CopyAction{Src: "/", Dest: "/", DirCopyContents: true}
}

// bound names a part of a build context: what Copy takes of it.
type bound struct{ context, source, dest string }

// contextLayer makes a layer of a part of a build context, once for all who want
// the same: the sandbox, and whoever builds on it, know no other files than layers'.
func (s *Solver) contextLayer(ctx context.Context, res Result, part fileop.CopyAction) (image.Layer, error) {
	key := bound{res.local.key(), part.Src, part.Dest}
	s.mu.Lock()
	l, ok := s.bound[key]
	s.mu.Unlock()
	if ok {
		return l, nil
	}
	c := fileop.New(nil, fileop.Options{})
	defer c.Close()
	if err := c.Copy(ctx, res.context, part); err != nil {
		return image.Layer{}, err
	}
	l, err := image.Commit(ctx, s.Store, image.CommitOptions{}, func(w io.Writer) error { return c.WriteTar(ctx, w) })
	if err != nil {
		return image.Layer{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bound[key] = l
	return l, nil
}
