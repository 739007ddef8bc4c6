package ctl

import (
	"context"
	"errors"
	"io"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	"github.com/moby/buildkit/solver/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Usage is something that a server keeps. Its JSON is what BuildKit's clients write.
type Usage struct {
	ID          string     `json:"id"`
	Mutable     bool       `json:"mutable"`
	InUse       bool       `json:"inUse"`
	Size        int64      `json:"size"` // bytes
	CreatedAt   time.Time  `json:"createdAt"`
	LastUsedAt  *time.Time `json:"lastUsedAt"`
	UsageCount  int        `json:"usageCount"`
	Parents     []string   `json:"parents"`
	Description string     `json:"description"`
	RecordType  string     `json:"recordType"`
	Shared      bool       `json:"shared"`
}

func newUsage(r *controlapi.UsageRecord) *Usage {
	u := &Usage{
		ID: r.ID, Mutable: r.Mutable, InUse: r.InUse, Size: r.Size, CreatedAt: r.CreatedAt.AsTime(), UsageCount: int(r.UsageCount),
		Parents: r.Parents, Description: r.Description, RecordType: r.RecordType, Shared: r.Shared,
	}
	if r.LastUsedAt != nil {
		t := r.LastUsedAt.AsTime()
		u.LastUsedAt = &t
	}
	return u
}

// DiskUsage lists what the server keeps and filters select.
func (c *Client) DiskUsage(ctx context.Context, filters []string) ([]*Usage, error) {
	res, err := c.control.DiskUsage(ctx, &controlapi.DiskUsageRequest{Filter: filters})
	if err != nil {
		return nil, explain(err)
	}
	var all []*Usage
	for _, r := range res.Record {
		all = append(all, newUsage(r))
	}
	return all, nil
}

// PruneOptions say what is to go. Sizes are in bytes.
type PruneOptions struct {
	All          bool          `json:"all"`
	Filter       []string      `json:"filter"`
	KeepDuration time.Duration `json:"keepDuration"`

	ReservedSpace int64 `json:"reservedSpace"`
	MaxUsedSpace  int64 `json:"maxUsedSpace"`
	MinFreeSpace  int64 `json:"minFreeSpace"`
}

// Prune has the server remove what it need not keep, and calls f for each thing that is gone.
func (c *Client) Prune(ctx context.Context, o PruneOptions, f func(*Usage) error) error {
	stream, err := c.control.Prune(ctx, &controlapi.PruneRequest{
		All: o.All, Filter: o.Filter, KeepDuration: int64(o.KeepDuration),
		ReservedSpace: o.ReservedSpace, MaxUsedSpace: o.MaxUsedSpace, MinFreeSpace: o.MinFreeSpace,
	})
	return each(stream, err, func(r *controlapi.UsageRecord) error { return f(newUsage(r)) })
}

// each calls f for all that comes of a stream, which may have failed to open.
func each[T any](stream interface{ Recv() (*T, error) }, err error, f func(*T) error) error {
	for err == nil {
		var v *T
		if v, err = stream.Recv(); err == nil {
			if err := f(v); err != nil {
				return err
			}
		}
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return explain(err)
}

// Version is what a server says it is.
type Version struct {
	Package           string `json:"package"`
	Version           string `json:"version"`
	Revision          string `json:"revision"`
	DockerfileVersion string `json:"dockerfileVersion,omitempty"`
}

func newVersion(v *apitypes.BuildkitVersion) Version {
	return Version{v.GetPackage(), v.GetVersion(), v.GetRevision(), v.GetDockerfileVersion()}
}

// Info is what a server tells of itself.
type Info struct {
	BuildkitVersion Version `json:"buildkitVersion"`
}

// Info asks the server what it is.
func (c *Client) Info(ctx context.Context) (*Info, error) {
	res, err := c.control.Info(ctx, &controlapi.InfoRequest{})
	if err != nil {
		return nil, explain(err)
	}
	return &Info{newVersion(res.BuildkitVersion)}, nil
}

// Worker is what builds in a server.
type Worker struct {
	ID              string             `json:"id"`
	Labels          map[string]string  `json:"labels"`
	Platforms       []ocispec.Platform `json:"platforms"`
	GCPolicy        []PruneOptions     `json:"gcPolicy"`
	BuildkitVersion Version            `json:"buildkitVersion"`
	CDIDevices      []Device           `json:"cdiDevices"`
}

// Device is one that a worker can give to steps.
type Device struct {
	Name        string            `json:"name"`
	AutoAllow   bool              `json:"autoAllow"`
	Annotations map[string]string `json:"annotations"`
	OnDemand    bool              `json:"onDemand"`
}

// Workers lists those that filters select.
func (c *Client) Workers(ctx context.Context, filters []string) ([]*Worker, error) {
	res, err := c.control.ListWorkers(ctx, &controlapi.ListWorkersRequest{Filter: filters})
	if err != nil {
		return nil, explain(err)
	}
	var all []*Worker
	for _, r := range res.Record {
		w := &Worker{ID: r.ID, Labels: r.Labels, Platforms: pb.ToSpecPlatforms(r.Platforms), GCPolicy: []PruneOptions{}, BuildkitVersion: newVersion(r.BuildkitVersion)}
		for _, p := range r.GCPolicy {
			w.GCPolicy = append(w.GCPolicy, PruneOptions{
				All: p.All, Filter: p.Filters, KeepDuration: time.Duration(p.KeepDuration),
				ReservedSpace: p.ReservedSpace, MaxUsedSpace: p.MaxUsedSpace, MinFreeSpace: p.MinFreeSpace,
			})
		}
		for _, d := range r.CDIDevices {
			w.CDIDevices = append(w.CDIDevices, Device{d.Name, d.AutoAllow, d.Annotations, d.OnDemand})
		}
		all = append(all, w)
	}
	return all, nil
}
