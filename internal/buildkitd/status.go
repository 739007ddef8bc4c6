package buildkitd

import (
	"context"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kiln-build/kiln/internal/progress"
)

const (
	// maxKeptLogs bounds what is kept of the output of one build's steps for those who begin to
	// follow it later, in bytes. The oldest goes first.
	maxKeptLogs = 4 << 20
	// flushInterval is how long things that happen are gathered into one message.
	flushInterval = 50 * time.Millisecond
	// maxFlush bounds the output in one message, in bytes.
	maxFlush = 1 << 20
)

// statusLog is what has happened in one build, in the clients' terms: a progress.Sink that any number of
// clients follow, each from the beginning. A slow one misses what is superseded, and nobody waits for it.
type statusLog struct {
	mu      sync.Mutex
	trans   *progress.Translator
	entries []*controlapi.StatusResponse // one for each event; never changed, but replaced by nothing
	logs    int                          // bytes of output in entries
	oldest  int                          // entries before have no output any more
	limit   int                          // of logs
	latest  map[transfer]int             // the entry with the last state of each
	steps   map[string]*controlapi.Vertex
	warned  int32
	changed chan struct{} // closed, and made anew, when an entry was added
	ended   bool
}

// transfer tells the things that a step moves apart.
type transfer struct{ vertex, id string }

func newStatusLog() *statusLog {
	return &statusLog{
		trans: progress.NewTranslator(), limit: maxKeptLogs, latest: map[transfer]int{}, changed: make(chan struct{}),
		steps: map[string]*controlapi.Vertex{},
	}
}

// counts are of steps and warnings.
type counts struct{ total, completed, cached, warnings int32 }

// summary counts the steps so far.
func (l *statusLog) summary() counts {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := counts{total: int32(len(l.steps)), warnings: l.warned}
	for _, v := range l.steps {
		if v.Completed != nil {
			c.completed++
		}
		if v.Cached {
			c.cached++
		}
	}
	return c
}

// shrink bounds what is kept of the steps' output from now on, in bytes.
func (l *statusLog) shrink(limit int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.limit = limit
	l.cut()
}

// Send implements progress.Sink.
func (l *statusLog) Send(e progress.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.add(statusMessage(l.trans.Translate(e)))
}

// warn reports what the client's own front end has to say.
func (l *statusLog) warn(w *controlapi.VertexWarning) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.add(&controlapi.StatusResponse{Warnings: []*controlapi.VertexWarning{w}})
}

// add appends an entry, and takes away what it supersedes and what is too much. l.mu is held.
func (l *statusLog) add(r *controlapi.StatusResponse) {
	for _, s := range r.Statuses {
		t := transfer{s.Vertex, s.ID}
		if i, ok := l.latest[t]; ok && len(l.entries[i].GetVertexes()) == 0 {
			l.entries[i] = nil // it was about this alone
		}
		l.latest[t] = len(l.entries)
	}
	for _, m := range r.Logs {
		l.logs += len(m.Msg)
	}
	for _, v := range r.Vertexes {
		l.steps[v.Digest] = v
	}
	l.warned += int32(len(r.Warnings))
	l.entries = append(l.entries, r)
	l.cut()
	close(l.changed)
	l.changed = make(chan struct{})
}

// cut drops the oldest output that is too much. l.mu is held.
func (l *statusLog) cut() {
	for ; l.logs > l.limit; l.oldest++ {
		for _, m := range l.entries[l.oldest].GetLogs() {
			l.logs -= len(m.Msg)
			l.entries[l.oldest] = nil // it was output alone
		}
	}
}

// end says that nothing more will happen.
func (l *statusLog) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.ended {
		l.ended = true
		close(l.changed)
		l.changed = make(chan struct{})
	}
}

// next gathers entries from number n on into one message, and returns the number of the entry after it;
// ended: there will be no more. changed is closed if there are more already.
func (l *statusLog) next(n int) (r *controlapi.StatusResponse, after int, ended bool, changed <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r = &controlapi.StatusResponse{}
	size := 0
	for ; n < len(l.entries) && size < maxFlush; n++ {
		e := l.entries[n]
		if e == nil {
			continue
		}
		r.Vertexes = append(r.Vertexes, e.Vertexes...)
		r.Statuses = append(r.Statuses, e.Statuses...)
		r.Logs = append(r.Logs, e.Logs...)
		r.Warnings = append(r.Warnings, e.Warnings...)
		for _, m := range e.Logs {
			size += len(m.Msg)
		}
	}
	if n < len(l.entries) { // one message was not enough
		more := make(chan struct{})
		close(more)
		return r, n, false, more
	}
	return r, n, l.ended, l.changed
}

// follow sends everything that has happened and will happen, until the build has ended.
func (l *statusLog) follow(ctx context.Context, send func(*controlapi.StatusResponse) error) error {
	for n := 0; ; {
		r, after, ended, changed := l.next(n)
		if n != after {
			if err := send(r); err != nil {
				return err
			}
		}
		n = after
		if ended {
			return nil
		}
		wait := time.NewTimer(flushInterval)
		select {
		case <-changed:
			select {
			case <-wait.C:
			case <-ctx.Done():
			}
		case <-ctx.Done():
		}
		wait.Stop()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

// statusMessage puts news into the API's types.
func statusMessage(st *progress.Status) *controlapi.StatusResponse {
	r := &controlapi.StatusResponse{}
	for _, v := range st.Vertexes {
		out := &controlapi.Vertex{
			Digest: v.Digest.String(), Name: v.Name, Cached: v.Cached, Error: v.Error, Started: timestamp(v.Started), Completed: timestamp(v.Completed),
		}
		for _, d := range v.Inputs {
			out.Inputs = append(out.Inputs, d.String())
		}
		if g := v.ProgressGroup; g != nil {
			out.ProgressGroup = &pb.ProgressGroup{Id: g.ID, Name: g.Name, Weak: g.Weak}
		}
		r.Vertexes = append(r.Vertexes, out)
	}
	for _, v := range st.Statuses {
		r.Statuses = append(r.Statuses, &controlapi.VertexStatus{
			ID: v.ID, Vertex: v.Vertex.String(), Name: v.Name, Current: v.Current, Total: v.Total,
			Timestamp: timestamppb.New(v.Timestamp), Started: timestamp(v.Started), Completed: timestamp(v.Completed),
		})
	}
	for _, v := range st.Logs {
		r.Logs = append(r.Logs, &controlapi.VertexLog{
			Vertex: v.Vertex.String(), Stream: int64(v.Stream), Msg: v.Data, Timestamp: timestamppb.New(v.Timestamp),
		})
	}
	for _, v := range st.Warnings {
		w := &controlapi.VertexWarning{Vertex: v.Vertex.String(), Level: int64(v.Level), Short: v.Short, Detail: v.Detail, Url: v.URL}
		if i := v.SourceInfo; i != nil {
			w.Info = &pb.SourceInfo{Filename: i.Filename, Data: i.Data, Language: i.Language}
		}
		for _, g := range v.Range {
			w.Ranges = append(w.Ranges, &pb.Range{Start: position(g.Start), End: position(g.End)})
		}
		r.Warnings = append(r.Warnings, w)
	}
	return r
}

func timestamp(t *time.Time) *timestamppb.Timestamp {
	if t == nil {
		return nil
	}
	return timestamppb.New(*t)
}

func position(p progress.Position) *pb.Position {
	return &pb.Position{Line: int32(p.Line), Character: int32(p.Character)}
}

// Status implements controlapi.ControlServer.
func (s *Server) Status(req *controlapi.StatusRequest, stream controlapi.Control_StatusServer) error {
	if err := sendTime(stream); err != nil {
		return err
	}
	ctx := stream.Context()
	if log := s.history.status(req.Ref, caller(ctx)); log != nil {
		return log.follow(ctx, stream.Send)
	}
	j, err := s.jobs.find(ctx, req.Ref, caller(ctx)) // one that has not begun yet, or is in no history
	if err != nil {
		return err
	}
	return j.status.follow(ctx, stream.Send)
}

// sendTime tells the client what time it is here, for clocks that disagree.
func sendTime(stream grpc.ServerStream) error {
	return stream.SendHeader(metadata.Pairs("buildkit-current-timestamp", time.Now().Format(time.RFC3339Nano)))
}
