package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/kiln-build/kiln/internal/fileop"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/tree"
)

// file computes a File: every action changes what the one before it made, and
// the changes against the first base become one layer.
func (r *run) file(ctx context.Context, f *File, ins []Result) ([]image.Layer, error) {
	dir, cleanup, err := r.Store.TempDir("file")
	if err != nil {
		return nil, err
	}
	defer cleanup()
	w := &fileRun{r: r, f: f, ins: ins, opt: fileop.Options{Dir: dir}, made: make([]made, len(f.Actions)), uses: f.uses()}
	defer w.close()
	for i := range f.Actions {
		if err := w.action(ctx, i); err != nil {
			return nil, err
		}
	}
	res := w.made[f.Result]
	l, err := image.Commit(ctx, r.Store, image.CommitOptions{}, func(out io.Writer) error {
		return res.changes.WriteTar(ctx, out)
	})
	if err != nil {
		return nil, err
	}
	l.Created = time.Now().UTC()
	return append(slices.Clip(res.base.Layers), l), nil
}

// fileRun is one File on its way.
type fileRun struct {
	r    *run
	f    *File
	ins  []Result
	opt  fileop.Options
	made []made
	uses map[Ref]int
	open []*fileop.Changes // all that were begun
}

// made is the result of an action: changes on top of an input.
type made struct {
	base    Result
	changes *fileop.Changes
}

func (w *fileRun) close() {
	for _, c := range w.open {
		c.Close()
	}
}

// at is the file system that ref names, as the result of an action or as an input.
func (w *fileRun) at(ref Ref) (made, error) {
	switch {
	case ref.Kind == RefScratch:
		return made{}, nil
	case ref.Kind == RefInput && ref.N >= 0 && ref.N < len(w.ins):
		return made{base: w.ins[ref.N]}, nil
	case ref.Kind == RefAction && ref.N >= 0 && ref.N < len(w.made) && w.made[ref.N].changes != nil:
		return w.made[ref.N], nil
	}
	return made{}, fmt.Errorf("a file operation refers to input %d, which there is not", ref.N)
}

func (w *fileRun) tree(ctx context.Context, ref Ref) (tree.Tree, error) {
	m, err := w.at(ref)
	if err != nil {
		return nil, err
	}
	if m.changes != nil {
		return m.changes, nil
	}
	return w.r.Tree(ctx, m.base)
}

func (w *fileRun) action(ctx context.Context, i int) error {
	a := w.f.Actions[i]
	m, err := w.at(a.Base)
	if err != nil {
		return err
	}
	switch {
	case m.changes == nil:
		if m.base.Layers, err = w.r.Layers(ctx, m.base); err != nil { // a build context that is changed is one no more
			return err
		}
		m.base.context = nil
		t, err := w.r.Tree(ctx, m.base)
		if err != nil {
			return err
		}
		m.changes = fileop.New(t, w.opt)
		w.open = append(w.open, m.changes)
	case w.uses[a.Base] > 1:
		m.changes = m.changes.Clone()
		w.open = append(w.open, m.changes)
	}
	if err := w.apply(ctx, m.changes, a); err != nil {
		return err
	}
	w.made[i] = m
	return nil
}

// uses counts who wants what. An action may change the result of an earlier one
// in place only if nobody else does, before or after: content that was
// copied from it is read at the very end.
func (f *File) uses() map[Ref]int {
	n := map[Ref]int{{RefAction, f.Result}: 1}
	for i := range f.Actions {
		a := &f.Actions[i]
		for _, ref := range []Ref{a.Base, a.Source, a.UserIn, a.GroupIn} {
			n[ref]++
		}
	}
	return n
}

func (w *fileRun) apply(ctx context.Context, c *fileop.Changes, a Action) error {
	owner, err := w.owner(ctx, a)
	if err != nil {
		return err
	}
	switch {
	case a.Copy != nil:
		src, err := w.tree(ctx, a.Source)
		if err != nil {
			return err
		}
		do := *a.Copy
		do.Owner = owner
		return c.Copy(ctx, src, do)
	case a.Mkfile != nil:
		do := *a.Mkfile
		do.Owner = owner
		return c.Mkfile(ctx, do)
	case a.Mkdir != nil:
		do := *a.Mkdir
		do.Owner = owner
		return c.Mkdir(ctx, do)
	case a.Remove != nil:
		return c.Remove(ctx, *a.Remove)
	case a.Link != nil:
		do := *a.Link
		do.Owner = owner
		return c.Symlink(ctx, do)
	}
	return errors.New("a file action that does nothing")
}

// owner is the action's owner with the trees that know its names.
func (w *fileRun) owner(ctx context.Context, a Action) (*fileop.Owner, error) {
	o := a.owner()
	if o == nil {
		return nil, nil
	}
	named := func(id *fileop.ID, in Ref) (*fileop.ID, error) {
		if id == nil || id.Name == "" {
			return id, nil
		}
		t, err := w.tree(ctx, in)
		return &fileop.ID{Name: id.Name, Tree: t}, err
	}
	u, err := named(o.User, a.UserIn)
	if err != nil {
		return nil, err
	}
	g, err := named(o.Group, a.GroupIn)
	return &fileop.Owner{User: u, Group: g}, err
}
