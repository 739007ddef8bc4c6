package buildkitd

import (
	"context"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/internal/store"
)

func TestKeepBytes(t *testing.T) {
	for name, c := range map[string]struct {
		total, free, want int64
		req               *controlapi.PruneRequest
	}{
		"most":                      {100, 0, 40, &controlapi.PruneRequest{MaxUsedSpace: 40}},
		"most, but reserved":        {100, 0, 60, &controlapi.PruneRequest{MaxUsedSpace: 40, ReservedSpace: 60}},
		"reserved alone":            {100, 0, 60, &controlapi.PruneRequest{ReservedSpace: 60}},
		"enough is free":            {100, 50, 100, &controlapi.PruneRequest{MinFreeSpace: 50}},
		"more must be free":         {100, 20, 70, &controlapi.PruneRequest{MinFreeSpace: 50}},
		"more free, most":           {100, 20, 40, &controlapi.PruneRequest{MinFreeSpace: 50, MaxUsedSpace: 40}},
		"more free, but reserved":   {100, 20, 90, &controlapi.PruneRequest{MinFreeSpace: 50, ReservedSpace: 90}},
		"more free than can become": {100, 0, -100, &controlapi.PruneRequest{MinFreeSpace: 200}},
	} {
		if got := keepBytes(c.total, c.free, c.req); max(got, 0) != max(c.want, 0) {
			t.Errorf("%s: keeps %d, want %d", name, got, c.want)
		}
	}
}

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

// TestPrune puts a record into a store: a client sees it, and that a prune removes it.
func TestPrune(t *testing.T) {
	st, err := store.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := st.PutRecord("test", "a", []byte("result")); err != nil {
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
	used := func() int {
		t.Helper()
		res, err := s.DiskUsage(t.Context(), &controlapi.DiskUsageRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range res.Record {
			if r.InUse || r.Size == 0 {
				t.Errorf("not reclaimable: %v", r)
			}
		}
		return len(res.Record)
	}
	if n := used(); n != 1 {
		t.Errorf("%d records of usage, want 1", n)
	}
	for name, req := range map[string]*controlapi.PruneRequest{
		"young": {KeepDuration: 3_600_000_000_000}, "small": {MaxUsedSpace: 1 << 30}, "space is free": {MinFreeSpace: 1},
	} {
		if r := prune(req); len(r) != 0 {
			t.Errorf("%s: removed %v", name, r)
		}
	}
	if r := prune(&controlapi.PruneRequest{All: true}); len(r) != 1 || r[0].Size == 0 {
		t.Errorf("removed %v", r)
	}
	if n := used(); n != 0 {
		t.Errorf("%d records of usage after a prune", n)
	}
	for name, req := range map[string]*controlapi.PruneRequest{
		"filter": {Filter: []string{"type==regular"}}, "age and size": {KeepDuration: 1, MaxUsedSpace: 1},
	} {
		if err := s.Prune(req, &pruned{ctx: t.Context()}); status.Code(err) != codes.Unimplemented {
			t.Errorf("%s: %v", name, err)
		}
	}
}
