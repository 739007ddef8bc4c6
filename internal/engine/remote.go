package engine

import (
	"context"
	"io"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/fileop"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/source/remote"
)

// version is what a remote source is today, found out once for the whole Solve.
func (r *run) version(ctx context.Context, s *state) (remote.Version, error) {
	s.versionOnce.Do(func() {
		s.step.Start()
		s.version, s.versionErr = s.op.Do.(*Remote).Source.Resolve(ctx, &r.Remotes, s.transfer)
	})
	return s.version, s.versionErr
}

func (s *state) transfer(current, total int64) {
	s.step.Transfer(s.op.Do.(*Remote).Source.String(), current, total)
}

// remoteKey is the key of a remote source: of what it is today.
func (r *run) remoteKey(ctx context.Context, s *state) (digest.Digest, error) {
	v, err := r.version(ctx, s)
	if err != nil {
		return "", err
	}
	h := cache.NewHasher("remote", remoteVersion)
	h.Strings(v.Key())
	return h.Key(), nil
}

// remote makes a layer of a remote source's files.
func (r *run) remote(ctx context.Context, s *state) ([]image.Layer, error) {
	v, err := r.version(ctx, s)
	if err != nil {
		return nil, err
	}
	t, err := v.Open(ctx, s.transfer)
	if err != nil {
		return nil, err
	}
	c := fileop.New(nil, fileop.Options{})
	defer c.Close()
	if err := c.Copy(ctx, t, everything()); err != nil {
		return nil, err
	}
	l, err := image.Commit(ctx, r.Store, image.CommitOptions{}, func(w io.Writer) error { return c.WriteTar(ctx, w) })
	if err != nil {
		return nil, err
	}
	l.Created = time.Now().UTC()
	return []image.Layer{l}, nil
}
