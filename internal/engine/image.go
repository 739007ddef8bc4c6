package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/tree"
)

// resolve gives an image's layers, those that are wanted of it.
func (r *run) resolve(ctx context.Context, op *Op) ([]image.Layer, error) {
	var (
		img   *image.Image
		err   error
		limit int
	)
	switch do := op.Do.(type) {
	case *Image:
		limit = do.Limit
		if img, err = r.Images.Resolve(ctx, do.Ref, do.Platform); err == nil && do.Checksum != "" && img.Digest != do.Checksum {
			err = fmt.Errorf("image digest %s for %s does not match expected checksum %s", img.Digest, do.Ref, do.Checksum)
		}
	case *Layout:
		limit = do.Limit
		img, err = r.Images.ResolveLayout(ctx, do.Store, do.Digest, do.Platform)
	default:
		err = fmt.Errorf("%T is not an image", op.Do)
	}
	if err != nil {
		return nil, err
	}
	ls := img.Layers
	if limit > len(ls) {
		return nil, fmt.Errorf("layer limit %d is greater than the number of layers in the image %d", limit, len(ls))
	}
	if limit > 0 {
		ls = ls[:limit:limit]
	}
	r.know(ls)
	return ls, nil
}

// image computes an image operation: it is wanted because something is to be
// done with its files, so it is pulled.
func (r *run) image(ctx context.Context, s *state) (Result, error) {
	ls, err := r.resolve(ctx, s.op)
	if err != nil {
		return Result{}, err
	}
	if r.present(ls) || s.stacked() {
		s.step.Cached()
		return Result{Layers: ls}, nil
	}
	s.step.Start()
	unpacked, err := image.UnpackAll(ctx, r.Store, ls, r.Images, func(n int, current int64) {
		b := ls[n].Blob
		s.step.Transfer(short(b.Digest), current, b.Size)
	})
	if err != nil {
		return Result{}, err
	}
	s.step.Done(nil)
	return Result{Layers: unpacked}, nil
}

// stacked reports whether nobody looks at the operation's files: they are laid over or
// under others.
func (s *state) stacked() bool {
	for c := range s.consumers {
		if _, ok := c.Do.(*Merge); !ok {
			return false
		}
	}
	return len(s.consumers) > 0
}

func (s *Solver) present(ls []image.Layer) bool {
	for _, l := range ls {
		if !s.Store.HasLayer(l.DiffID) {
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

// Tree is a result as a tree, good until the Solver is closed; layers that are not in the store are fetched.
func (s *Solver) Tree(ctx context.Context, res Result) (tree.Tree, error) {
	if res.context != nil {
		return res.context, nil
	}
	if !s.present(res.Layers) { // several at a time
		if _, err := image.UnpackAll(ctx, s.Store, res.Layers, s.Images, nil); err != nil {
			return nil, err
		}
	}
	ts := make([]tree.Tree, len(res.Layers))
	for i, l := range res.Layers {
		rd, err := s.reader(ctx, l)
		if err != nil {
			return nil, err
		}
		ts[i] = rd
	}
	return rootfs.New(ts...), nil
}

// reader opens a layer file, once. One that is damaged is
// made anew, which may take a while: without the lock.
func (s *Solver) reader(ctx context.Context, l image.Layer) (*layer.Reader, error) {
	s.mu.Lock()
	rd := s.readers[l.DiffID]
	s.mu.Unlock()
	if rd != nil {
		return rd, nil
	}
	rd, err := image.OpenLayer(ctx, s.Store, l, s.Images)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if first := s.readers[l.DiffID]; first != nil {
		rd.Close()
		return first, nil
	}
	s.readers[l.DiffID] = rd
	return rd, nil
}

// OpError says which operation of a graph failed. Its message is the error's.
type OpError struct {
	Op  digest.Digest // as the graph has it
	Err error
}

func (e *OpError) Error() string { return e.Err.Error() }

// Unwrap gives the error itself.
func (e *OpError) Unwrap() error { return e.Err }

// at adds the operation's place in the Dockerfile to an error, unless it has one.
func at(op *Op, err error) error {
	e := &diag.Error{Err: err, At: op.At}
	var have *diag.Error
	if errors.As(err, &have) {
		if have.At != nil {
			return err
		}
		e.Hint = have.Hint
		e.Code = have.Code
	}
	switch op.Do.(type) {
	case *File, *Remote:
		e.Code = cmp.Or(e.Code, diag.ExitDockerfile)
	}
	return e
}
