package buildkitd

import (
	"context"
	"fmt"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/internal/store"
)

// IDs of the records that clients see of the store. BuildKit has one for each snapshot; layers and blobs
// are shared between results here, so that no part of them alone could be removed.
const (
	reclaimable = "reclaimable"
	inUse       = "in-use"
)

// DiskUsage implements controlapi.ControlServer: what a prune would remove, and what it would not.
func (s *Server) DiskUsage(ctx context.Context, req *controlapi.DiskUsageRequest) (*controlapi.DiskUsageResponse, error) {
	if len(req.Filter) > 0 || req.AgeLimit != 0 {
		return nil, status.Error(codes.Unimplemented, "filters of the disk usage are not supported")
	}
	free, err := s.opt.Store.Prune(ctx, store.PruneOptions{DryRun: true})
	if err != nil {
		return nil, err
	}
	all, err := s.opt.Store.Usage(ctx)
	if err != nil {
		return nil, err
	}
	held := store.PruneReport{
		Blobs: all.Blobs.Count - free.Blobs, Layers: all.Layers.Count - free.Layers, Records: all.Records.Count - free.Records,
		Bytes: max(0, all.Blobs.Bytes+all.Layers.Bytes+all.Records.Bytes-free.Bytes),
	}
	res := &controlapi.DiskUsageResponse{}
	for _, r := range []*controlapi.UsageRecord{usage(reclaimable, free), usage(inUse, held)} {
		if r != nil {
			res.Record = append(res.Record, r)
		}
	}
	return res, nil
}

// usage puts a part of the store into the API's type; nil if there is nothing.
func usage(id string, r store.PruneReport) *controlapi.UsageRecord {
	if r.Blobs <= 0 && r.Layers <= 0 && r.Records <= 0 {
		return nil
	}
	return &controlapi.UsageRecord{
		ID: id, InUse: id == inUse, Size: r.Bytes, RecordType: "regular",
		Description: fmt.Sprintf("blobs: %d, layers: %d, records of steps: %d", r.Blobs, r.Layers, r.Records),
	}
}

// Prune implements controlapi.ControlServer. What running builds and named images need stays.
func (s *Server) Prune(req *controlapi.PruneRequest, stream controlapi.Control_PruneServer) error {
	ctx := stream.Context()
	opt, keepsAll, err := s.pruneOptions(ctx, req)
	if err != nil || keepsAll {
		return err
	}
	removed, err := s.opt.Store.Prune(ctx, opt)
	if err != nil {
		return err
	}
	if r := usage(reclaimable, removed); r != nil {
		return stream.Send(r)
	}
	return nil
}

// pruneOptions puts a request into the store's terms. There is no difference between all and less than all: Kiln
// has no results that are its own. keepsAll: nothing is to be removed.
func (s *Server) pruneOptions(ctx context.Context, req *controlapi.PruneRequest) (_ store.PruneOptions, keepsAll bool, _ error) {
	none := store.PruneOptions{}
	sized := req.ReservedSpace != 0 || req.MaxUsedSpace != 0 || req.MinFreeSpace != 0
	switch {
	case len(req.Filter) > 0:
		return none, false, status.Error(codes.Unimplemented, "filters of what is pruned are not supported")
	case min(req.KeepDuration, req.ReservedSpace, req.MaxUsedSpace, req.MinFreeSpace) < 0:
		return none, false, status.Error(codes.InvalidArgument, "what is kept cannot be negative")
	case sized && req.KeepDuration > 0:
		return none, false, status.Error(codes.Unimplemented, "an age and a size cannot be given together for what is pruned")
	case !sized:
		return store.PruneOptions{KeepFor: time.Duration(req.KeepDuration)}, false, nil
	}
	all, err := s.opt.Store.Usage(ctx)
	if err != nil {
		return none, false, err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(s.opt.Store.Root(), &fs); err != nil {
		return none, false, fmt.Errorf("measure free space of the store: %w", err)
	}
	keep := keepBytes(all.Total(), int64(fs.Bavail)*fs.Bsize, req)
	return store.PruneOptions{KeepSize: max(1, keep)}, keep >= all.Total(), nil
}

// keepBytes is how large the store may stay, in bytes, as BuildKit has it: no more than MaxUsedSpace, so much less
// that MinFreeSpace is free, but in any case ReservedSpace.
func keepBytes(total, free int64, req *controlapi.PruneRequest) int64 {
	keep := req.MaxUsedSpace
	if keep == 0 {
		keep = total
		if req.MinFreeSpace == 0 {
			keep = req.ReservedSpace
		}
	}
	if missing := req.MinFreeSpace - free; req.MinFreeSpace > 0 && missing > 0 {
		keep = min(keep, total-missing)
	}
	return max(keep, req.ReservedSpace)
}
