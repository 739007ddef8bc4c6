package buildkitd

import (
	"context"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/util/grpcerrors"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// defaultHistory is how many finished builds are remembered, and as many that are pinned. They are
	// kept in memory: a server that is started anew has none.
	defaultHistory = 50
	maxHistory     = 10_000
	// maxFinishedLogs bounds what is kept of the output of each, in bytes.
	maxFinishedLogs = 256 << 10
	// maxListened bounds the events that wait for a client that listens. One that is slower is let go.
	maxListened = 1000
)

// history remembers builds, those that run and the last that have ended.
type history struct {
	mu        sync.Mutex
	builds    []*past // the oldest first
	listeners map[*listener]bool
	closed    bool
	most      int // finished builds, and as many that are pinned; 0: none is remembered, not even while it runs
}

// past is one build.
type past struct {
	owner  string
	record *controlapi.BuildHistoryRecord // replaced, never changed
	status *statusLog
}

// listener is a client that wants to know about builds as they begin and end.
type listener struct {
	owner  string
	ref    string // of the only build that it wants to know about; empty: all
	events chan *controlapi.BuildHistoryEvent
}

// newHistory returns a history of so many builds that have ended; nil: as many as is usual.
func newHistory(most *int) *history {
	h := &history{listeners: map[*listener]bool{}, most: defaultHistory}
	if most != nil {
		h.most = min(max(*most, 0), maxHistory)
	}
	h.closed = h.most == 0 // there is nothing to listen to
	return h
}

// begin remembers a build that begins.
func (h *history) begin(j *job, req *controlapi.SolveRequest) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.most == 0 {
		return
	}
	p := &past{owner: j.owner, status: j.status, record: &controlapi.BuildHistoryRecord{
		Ref: req.Ref, Frontend: req.Frontend, FrontendAttrs: req.FrontendAttrs, Exporters: req.Exporters, CreatedAt: timestamppb.Now(),
	}}
	h.builds = append(h.builds, p)
	h.tell(p, controlapi.BuildHistoryEventType_STARTED)
}

// end remembers what a build came to.
func (h *history) end(ctx context.Context, ref string, out outcome, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.find(ref)
	if p == nil {
		return
	}
	p.status.shrink(maxFinishedLogs)
	n := p.status.summary()
	r := clone(p.record)
	r.CompletedAt, r.ExporterResponse = timestamppb.Now(), out.meta
	r.NumTotalSteps, r.NumCompletedSteps, r.NumCachedSteps, r.NumWarnings = n.total, n.completed, n.cached, n.warnings
	if len(out.images) > 0 {
		r.Result = &controlapi.BuildResultInfo{Results: map[int64]*controlapi.Descriptor{}}
		for n, d := range out.images {
			r.Result.Results[n] = &controlapi.Descriptor{MediaType: d.MediaType, Digest: d.Digest.String(), Size: d.Size, Annotations: d.Annotations}
		}
		r.Result.ResultDeprecated = r.Result.Results[slices.Min(slices.Collect(maps.Keys(out.images)))]
	}
	r.Generation++
	if st, ok := status.FromError(grpcerrors.ToGRPC(ctx, explain(err))); err != nil && ok {
		r.Error = &spb.Status{Code: st.Proto().Code, Message: st.Proto().Message, Details: st.Proto().Details}
	}
	p.record = r
	h.forget()
	h.tell(p, controlapi.BuildHistoryEventType_COMPLETE)
}

func clone(r *controlapi.BuildHistoryRecord) *controlapi.BuildHistoryRecord {
	return proto.Clone(r).(*controlapi.BuildHistoryRecord)
}

// find is the last build with a ref. h.mu is held.
func (h *history) find(ref string) *past {
	for _, p := range slices.Backward(h.builds) {
		if p.record.Ref == ref {
			return p
		}
	}
	return nil
}

// forget drops the oldest of the builds that are too many. h.mu is held.
func (h *history) forget() {
	n := map[bool]int{} // by being pinned
	for i := len(h.builds) - 1; i >= 0; i-- {
		r := h.builds[i].record
		if r.CompletedAt == nil {
			continue
		}
		if n[r.Pinned]++; n[r.Pinned] > h.most {
			h.builds = slices.Delete(h.builds, i, i+1)
		}
	}
}

// tell hands an event to those who listen. h.mu is held.
func (h *history) tell(p *past, kind controlapi.BuildHistoryEventType) {
	for l := range h.listeners {
		if l.owner != p.owner || l.ref != "" && l.ref != p.record.Ref {
			continue
		}
		select {
		case l.events <- &controlapi.BuildHistoryEvent{Type: kind, Record: p.record}:
		default:
			h.drop(l)
		}
	}
}

// drop ends a listener. h.mu is held.
func (h *history) drop(l *listener) {
	if h.listeners[l] {
		delete(h.listeners, l)
		close(l.events)
	}
}

// listen begins to listen, and returns what is known already.
func (h *history) listen(owner string, req *controlapi.BuildHistoryRequest) (l *listener, known []*controlapi.BuildHistoryEvent, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var done []*controlapi.BuildHistoryEvent
	for _, p := range h.builds {
		if p.owner != owner || req.Ref != "" && req.Ref != p.record.Ref {
			continue
		}
		if p.record.CompletedAt == nil {
			known = append(known, &controlapi.BuildHistoryEvent{Type: controlapi.BuildHistoryEventType_STARTED, Record: p.record})
			continue
		}
		done = append(done, &controlapi.BuildHistoryEvent{Type: controlapi.BuildHistoryEventType_COMPLETE, Record: p.record})
	}
	if !req.ActiveOnly {
		if done, err = filterHistory(done, req.Filter, int(req.Limit)); err != nil {
			return nil, nil, err
		}
		known = append(known, done...)
	}
	l = &listener{owner: owner, ref: req.Ref, events: make(chan *controlapi.BuildHistoryEvent, maxListened)}
	h.listeners[l] = true
	if h.closed || req.EarlyExit {
		h.drop(l)
	}
	return l, known, nil
}

// leave ends a listener.
func (h *history) leave(l *listener) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.drop(l)
}

// close ends all listeners.
func (h *history) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for l := range h.listeners {
		h.drop(l)
	}
}

// update pins or forgets a build that has ended.
func (h *history) update(owner string, req *controlapi.UpdateBuildHistoryRequest) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.find(req.Ref)
	if p == nil || p.owner != owner || p.record.CompletedAt == nil {
		if req.Finalize {
			return nil
		}
		return fmt.Errorf("build %.100q is not in the history: %w", req.Ref, fs.ErrNotExist)
	}
	switch {
	case req.Delete:
		h.builds = slices.DeleteFunc(h.builds, func(q *past) bool { return p == q })
		h.tell(p, controlapi.BuildHistoryEventType_DELETED)
	case req.Finalize, req.Pinned == p.record.Pinned:
	default:
		p.record = clone(p.record)
		p.record.Pinned = req.Pinned
		p.record.Generation++
		h.forget()
		h.tell(p, controlapi.BuildHistoryEventType_COMPLETE)
	}
	return nil
}

// status is what happened in a build, nil if it is not known.
func (h *history) status(ref, owner string) *statusLog {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.find(ref)
	if p == nil || p.owner != owner {
		return nil
	}
	return p.status
}

// ListenBuildHistory implements controlapi.ControlServer.
func (s *Server) ListenBuildHistory(req *controlapi.BuildHistoryRequest, stream controlapi.Control_ListenBuildHistoryServer) error {
	if err := sendTime(stream); err != nil {
		return err
	}
	ctx := stream.Context()
	l, known, err := s.history.listen(caller(ctx), req)
	if err != nil {
		return err
	}
	defer s.history.leave(l)
	for _, e := range known {
		if err := stream.Send(e); err != nil {
			return err
		}
	}
	for {
		select {
		case e, ok := <-l.events:
			if !ok {
				return nil
			}
			if err := stream.Send(e); err != nil {
				return err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// UpdateBuildHistory implements controlapi.ControlServer.
func (s *Server) UpdateBuildHistory(ctx context.Context, req *controlapi.UpdateBuildHistoryRequest) (*controlapi.UpdateBuildHistoryResponse, error) {
	return &controlapi.UpdateBuildHistoryResponse{}, s.history.update(caller(ctx), req)
}

// lasted is how long a build took, or takes.
func lasted(r *controlapi.BuildHistoryRecord) time.Duration {
	if r.CompletedAt == nil {
		return 0
	}
	return r.CompletedAt.AsTime().Sub(r.CreatedAt.AsTime())
}
