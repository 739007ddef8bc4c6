package buildkitd

import (
	"context"
	"errors"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kiln-build/kiln/internal/gc"
)

// DiskUsage implements controlapi.ControlServer: what takes room in the store.
func (s *Server) DiskUsage(ctx context.Context, req *controlapi.DiskUsageRequest) (*controlapi.DiskUsageResponse, error) {
	items, err := gc.List(ctx, s.opt.Store, req.Filter...)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	res := &controlapi.DiskUsageResponse{}
	for _, i := range items {
		if limit := time.Duration(req.AgeLimit); limit <= 0 || time.Since(i.Used) >= limit {
			res.Record = append(res.Record, record(i))
		}
	}
	return res, nil
}

// record puts an item into the API's type.
func record(i gc.Item) *controlapi.UsageRecord {
	return &controlapi.UsageRecord{
		ID: i.ID, Mutable: i.Mutable, InUse: i.InUse, Size: i.Size, Parents: i.Parents, Description: i.Description,
		CreatedAt: timestamppb.New(i.Created), LastUsedAt: timestamppb.New(i.Used), RecordType: i.Type, Shared: i.Shared,
	}
}

// Prune implements controlapi.ControlServer. What running builds and named images need stays.
func (s *Server) Prune(req *controlapi.PruneRequest, stream controlapi.Control_PruneServer) error {
	limit, err := gc.LimitOf(req.MaxUsedSpace, req.ReservedSpace, req.MinFreeSpace)
	if err == nil && req.KeepDuration < 0 {
		err = errors.New("what is kept cannot have been used in the future")
	}
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	removed, err := gc.Prune(stream.Context(), s.opt.Store, gc.Options{
		Filter: req.Filter, KeepFor: time.Duration(req.KeepDuration), Limit: limit,
	})
	if err != nil {
		return err
	}
	for _, i := range removed.Items {
		if err := stream.Send(record(i)); err != nil {
			return err
		}
	}
	return nil
}
