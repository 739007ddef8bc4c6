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
func (r *run) mounts(ctx context.Context, op *Op, x *Exec, ins []snapshot) ([]sandbox.Mount, error) {
	var out []sandbox.Mount
	for _, m := range x.Mounts {
		s := sandbox.Mount{Dest: m.Dest, Source: m.Source, Writable: m.Writable}
		switch {
		case m.Tmpfs:
			s.Tmpfs = &sandbox.Tmpfs{Size: m.Size}
		case ins[m.Input].context != nil:
			l, err := r.contextLayer(ctx, op.Inputs[m.Input].Op, ins[m.Input].context, &m)
			if err != nil {
				return nil, err
			}
			s.Volume, s.Source = &sandbox.Volume{Layers: []string{r.Store.LayerPath(l.DiffID)}}, mountedName
		default:
			t, err := r.treeOf(ctx, ins[m.Input])
			if err == nil {
				err = m.exists(t)
			}
			if err != nil {
				return nil, err
			}
			s.Volume = &sandbox.Volume{}
			for _, l := range ins[m.Input].layers {
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

// bound names a part of a build context.
type bound struct {
	context *Op
	source  string
}

// contextLayer makes a layer of what m shows of a build context, once for all
// mounts that show the same: the sandbox knows no other files than layers'.
func (r *run) contextLayer(ctx context.Context, op *Op, t tree.Tree, m *Mount) (image.Layer, error) {
	key := bound{op, m.Source}
	r.mu.Lock()
	l, ok := r.bound[key]
	r.mu.Unlock()
	if ok {
		return l, nil
	}
	c := fileop.New(nil, fileop.Options{})
	defer c.Close()
	if err := c.Copy(ctx, t, m.selection()); err != nil {
		return image.Layer{}, err
	}
	l, err := image.Commit(ctx, r.Store, image.CommitOptions{}, func(w io.Writer) error { return c.WriteTar(ctx, w) })
	if err != nil {
		return image.Layer{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.bound == nil {
		r.bound = map[bound]image.Layer{}
	}
	r.bound[key] = l
	return l, nil
}
