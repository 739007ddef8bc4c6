package engine

import (
	"context"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/source/filter"
	"github.com/kiln-build/kiln/internal/tree"
)

func (r *run) resolve(ctx context.Context, op *Op) (img *image.Image, err error) {
	switch do := op.Do.(type) {
	case *Image:
		img, err = r.Images.Resolve(ctx, do.Ref, do.Platform)
	case *Layout:
		img, err = r.Images.ResolveLayout(ctx, do.Store, do.Digest, do.Platform)
	default:
		err = fmt.Errorf("%T is not an image", op.Do)
	}
	if err == nil {
		r.know(img.Layers)
	}
	return img, err
}

// image computes an image operation: it is wanted because something is to be
// done with its files, so it is pulled.
func (r *run) image(ctx context.Context, s *state) (snapshot, error) {
	img, err := r.resolve(ctx, s.op)
	if err != nil {
		return snapshot{}, err
	}
	if r.present(img.Layers) || s.merged() {
		s.step.Cached()
		return snapshot{layers: img.Layers}, nil
	}
	s.step.Start()
	ls, err := image.UnpackAll(ctx, r.Store, img.Layers, r.Images, func(n int, current int64) {
		b := img.Layers[n].Blob
		s.step.Transfer(short(b.Digest), current, b.Size)
	})
	if err != nil {
		return snapshot{}, err
	}
	s.step.Done(nil)
	return snapshot{layers: ls}, nil
}

// merged reports whether nobody looks at the operation's files: they are laid
// over or under others.
func (s *state) merged() bool {
	for c := range s.consumers {
		if _, ok := c.Do.(*Merge); !ok {
			return false
		}
	}
	return len(s.consumers) > 0
}

func (r *run) present(ls []image.Layer) bool {
	for _, l := range ls {
		if !r.Store.HasLayer(l.DiffID) {
			return false
		}
	}
	return true
}

// short is a digest as people read it.
func short(d digest.Digest) string {
	if s := d.Encoded(); len(s) > 12 {
		return d.Algorithm().String() + ":" + s[:12]
	}
	return d.String()
}

// local is a build context without what its ignore file excludes. It is the
// same tree each time: it remembers which directories are left out.
func (r *run) local(l *Local) (tree.Tree, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if t := r.contexts[l]; t != nil {
		return t, nil
	}
	t, ok := r.Trees[l.Name]
	if !ok {
		return nil, fmt.Errorf("there is no build context %q", l.Name)
	}
	if len(l.Include) > 0 || len(l.Exclude) > 0 {
		t = filter.Filter(t, l.Include, l.Exclude, nil)
	}
	r.contexts[l] = t
	return t, nil
}

// treeOf is a snapshot as a tree; layers that are not in the store are fetched.
func (r *run) treeOf(ctx context.Context, s snapshot) (tree.Tree, error) {
	if s.context != nil {
		return s.context, nil
	}
	if !r.present(s.layers) { // several at a time
		if _, err := image.UnpackAll(ctx, r.Store, s.layers, r.Images, nil); err != nil {
			return nil, err
		}
	}
	ts := make([]tree.Tree, len(s.layers))
	for i, l := range s.layers {
		rd, err := r.reader(ctx, l)
		if err != nil {
			return nil, err
		}
		ts[i] = rd
	}
	return rootfs.New(ts...), nil
}

// reader opens a layer file, once for the whole run. One that is damaged is
// made anew, which may take a while: without the lock.
func (r *run) reader(ctx context.Context, l image.Layer) (*layer.Reader, error) {
	r.mu.Lock()
	rd := r.readers[l.DiffID]
	r.mu.Unlock()
	if rd != nil {
		return rd, nil
	}
	rd, err := image.OpenLayer(ctx, r.Store, l, r.Images)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if first := r.readers[l.DiffID]; first != nil {
		rd.Close()
		return first, nil
	}
	r.readers[l.DiffID] = rd
	return rd, nil
}

// at adds the operation's place in the Dockerfile to an error, unless it has one.
func (r *run) at(ctx context.Context, op *Op, err error) error {
	cause := context.Cause(ctx)
	if timeout := diag.ExitCode(cause) == diag.ExitTimeout && r.states[op].ran; cause != nil && errors.Is(err, cause) && !timeout {
		return err // it is not this operation's
	}
	e := &diag.Error{Err: err, At: op.At}
	var have *diag.Error
	if errors.As(err, &have) {
		if have.At != nil {
			return err
		}
		e.Hint = have.Hint
		e.Code = have.Code
	}
	if _, ok := op.Do.(*File); ok && e.Code == 0 {
		e.Code = diag.ExitDockerfile
	}
	return e
}
