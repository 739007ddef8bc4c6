package buildkitd

import (
	"context"
	"io"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/store"
)

// pruned gathers what a prune says.
type pruned struct {
	grpc.ServerStream
	ctx     context.Context //nolint:containedctx // a stream's
	records []*controlapi.UsageRecord
}

func (p *pruned) Context() context.Context { return p.ctx }

func (p *pruned) Send(r *controlapi.UsageRecord) error {
	p.records = append(p.records, r)
	return nil
}

// TestPrune puts a step's result into a store: a client sees it, and that a prune removes it.
func TestPrune(t *testing.T) {
	st, err := store.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	l, err := image.Commit(t.Context(), st, image.CommitOptions{}, func(w io.Writer) error { return layer.NewTarWriter(w).Close() })
	if err != nil {
		t.Fatal(err)
	}
	if err := cache.NewLocal(st).Save(t.Context(), digest.FromString("step"), cache.Record{Layers: []image.Layer{l}}); err != nil {
		t.Fatal(err)
	}
	s := &Server{opt: Options{Store: st}}
	prune := func(req *controlapi.PruneRequest) []*controlapi.UsageRecord {
		t.Helper()
		p := &pruned{ctx: t.Context()}
		if err := s.Prune(req, p); err != nil {
			t.Fatal(err)
		}
		return p.records
	}
	used := func(req *controlapi.DiskUsageRequest) int {
		t.Helper()
		res, err := s.DiskUsage(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range res.Record {
			if r.InUse || r.Size == 0 || r.RecordType != "regular" || !r.LastUsedAt.IsValid() {
				t.Errorf("%v", r)
			}
		}
		return len(res.Record)
	}
	for want, req := range map[int]*controlapi.DiskUsageRequest{
		1: {Filter: []string{"type==regular"}}, 0: {AgeLimit: 3_600_000_000_000},
	} {
		if n := used(req); n != want {
			t.Errorf("%v: %d records of usage, want %d", req, n, want)
		}
	}
	for name, req := range map[string]*controlapi.PruneRequest{
		"young": {KeepDuration: 3_600_000_000_000}, "small": {MaxUsedSpace: 1 << 30}, "space is free": {MinFreeSpace: 1},
		"reserved": {ReservedSpace: 1 << 30}, "of another type": {Filter: []string{"type==exec.cachemount"}},
	} {
		if r := prune(req); len(r) != 0 {
			t.Errorf("%s: removed %v", name, r)
		}
	}
	if r := prune(&controlapi.PruneRequest{All: true}); len(r) != 1 || r[0].Size == 0 {
		t.Errorf("removed %v", r)
	}
	if n := used(&controlapi.DiskUsageRequest{}); n != 0 {
		t.Errorf("%d records of usage after a prune", n)
	}
	for name, req := range map[string]*controlapi.PruneRequest{"negative": {KeepDuration: -1}} {
		if err := s.Prune(req, &pruned{ctx: t.Context()}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
}
