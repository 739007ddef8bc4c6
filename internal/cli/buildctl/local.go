package buildctl

import (
	"context"

	"github.com/kiln-build/kiln/internal/buildkitd/ctl"
	"github.com/kiln-build/kiln/internal/gc"
	"github.com/kiln-build/kiln/internal/store"
)

// keeper has what builds have left: a server or, if there is none, the store that builds in this process use.
type keeper interface {
	DiskUsage(ctx context.Context, filters []string) ([]*ctl.Usage, error)
	Prune(ctx context.Context, o ctl.PruneOptions, f func(*ctl.Usage) error) error
	Close() error
}

func (s *server) keeper(ctx context.Context) (keeper, error) {
	c, _, err := s.connect(ctx)
	if err != nil {
		return nil, err
	}
	if c != nil {
		return c, nil
	}
	_, root, err := s.config()
	if err != nil {
		return nil, err
	}
	st, err := s.OpenStore(root)
	return local{st}, err
}

// local is a keeper without a server.
type local struct{ st *store.Store }

func usage(i gc.Item) *ctl.Usage {
	return &ctl.Usage{
		ID: i.ID, Mutable: i.Mutable, InUse: i.InUse, Size: i.Size, CreatedAt: i.Created, LastUsedAt: &i.Used,
		Parents: i.Parents, Description: i.Description, RecordType: i.Type, Shared: i.Shared,
	}
}

// DiskUsage implements keeper.
func (l local) DiskUsage(ctx context.Context, filters []string) ([]*ctl.Usage, error) {
	items, err := gc.List(ctx, l.st, filters...)
	if err != nil {
		return nil, err
	}
	var all []*ctl.Usage
	for _, i := range items {
		all = append(all, usage(i))
	}
	return all, nil
}

// Prune implements keeper.
func (l local) Prune(ctx context.Context, o ctl.PruneOptions, f func(*ctl.Usage) error) error {
	limit, err := gc.LimitOf(o.MaxUsedSpace, o.ReservedSpace, o.MinFreeSpace)
	if err != nil {
		return err
	}
	removed, err := gc.Prune(ctx, l.st, gc.Options{Filter: o.Filter, KeepFor: o.KeepDuration, Limit: limit})
	if err != nil {
		return err
	}
	for _, i := range removed.Items {
		if err := f(usage(i)); err != nil {
			return err
		}
	}
	return nil
}

// Close implements keeper.
func (l local) Close() error { return nil }
