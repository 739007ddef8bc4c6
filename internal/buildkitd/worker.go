package buildkitd

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/platforms"
	controlapi "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	"github.com/moby/buildkit/solver/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// buildkitVersion is of BuildKit whose API this is, and whose Dockerfile front end is linked in.
// A test compares it with go.mod.
const buildkitVersion = "v0.33.1"

// worker is what the server tells of itself: it is its only worker.
type worker struct {
	id        string
	labels    map[string]string
	platforms []ocispec.Platform
	version   *apitypes.BuildkitVersion
	gc        []*apitypes.GCPolicy
}

func newWorker(o Options) worker {
	host, _ := os.Hostname() // unknown is no trouble
	sum := sha256.Sum256([]byte(host + "\x00" + o.Store.Root()))
	w := worker{
		id: hex.EncodeToString(sum[:])[:25], // the same whenever this store is served
		labels: map[string]string{
			"org.mobyproject.buildkit.worker.executor":    "kiln-" + o.Sandbox.Name(),
			"org.mobyproject.buildkit.worker.hostname":    host,
			"org.mobyproject.buildkit.worker.network":     "host",
			"org.mobyproject.buildkit.worker.snapshotter": "kiln",
		},
		platforms: []ocispec.Platform{platforms.Normalize(platforms.DefaultSpec())},
		version: &apitypes.BuildkitVersion{
			Package: "github.com/kiln-build/kiln", Version: buildkitVersion, Revision: o.Version, DockerfileVersion: buildkitVersion,
		},
	}
	maps.Copy(w.labels, o.Labels)
	if l := o.Limit; !l.IsZero() {
		w.gc = []*apitypes.GCPolicy{{All: true, ReservedSpace: l.Reserved, MaxUsedSpace: l.MaxUsed, MinFreeSpace: l.MinFree}}
	}
	return w
}

func (w *worker) record() *apitypes.WorkerRecord {
	return &apitypes.WorkerRecord{ID: w.id, Labels: w.labels, Platforms: pb.PlatformsFromSpec(w.platforms), BuildkitVersion: w.version, GCPolicy: w.gc}
}

// Info implements controlapi.ControlServer.
func (s *Server) Info(context.Context, *controlapi.InfoRequest) (*controlapi.InfoResponse, error) {
	return &controlapi.InfoResponse{BuildkitVersion: s.worker.version}, nil
}

// ListWorkers implements controlapi.ControlServer.
func (s *Server) ListWorkers(_ context.Context, req *controlapi.ListWorkersRequest) (*controlapi.ListWorkersResponse, error) {
	ok, err := s.worker.matches(req.Filter)
	if err != nil || !ok {
		return &controlapi.ListWorkersResponse{}, err
	}
	return &controlapi.ListWorkersResponse{Record: []*apitypes.WorkerRecord{s.worker.record()}}, nil
}

// matches reports whether the worker is one of those that filters, in containerd's language, select.
func (w *worker) matches(expressions []string) (bool, error) {
	f, err := filters.ParseAll(expressions...)
	if err != nil {
		return false, status.Errorf(codes.InvalidArgument, "filter: %v", err)
	}
	return f.Match(filters.AdapterFunc(func(path []string) (string, bool) {
		switch {
		case len(path) == 1 && path[0] == "id":
			return w.id, true
		case len(path) > 1 && path[0] == "labels":
			v, ok := w.labels[strings.Join(path[1:], ".")]
			return v, ok
		}
		return "", false
	})), nil
}
