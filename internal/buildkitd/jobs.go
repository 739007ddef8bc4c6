package buildkitd

import (
	"context"
	"sync"
	"time"

	"github.com/moby/buildkit/solver/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// waitForJob is how long a client may be early: it asks for the status of a build, and for parts of
// it, at the same time as for the build itself.
const waitForJob = 10 * time.Second

// job is one build that runs.
type job struct {
	ref    string
	owner  string // see caller
	status *statusLog
	bridge *bridge // nil unless the client builds through the gateway
}

// jobs are the builds that run.
type jobs struct {
	running sync.WaitGroup

	mu      sync.Mutex
	byRef   map[string]*job
	changed chan struct{} // closed, and made anew, when a job was added
	closed  bool
}

func newJobs() *jobs { return &jobs{byRef: map[string]*job{}, changed: make(chan struct{})} }

// add makes a job known by its ref. done must be called when it has ended.
func (js *jobs) add(j *job) (done func(), err error) {
	js.mu.Lock()
	defer js.mu.Unlock()
	if js.closed {
		return nil, status.Error(codes.Unavailable, "the server is stopping")
	}
	if js.byRef[j.ref] != nil {
		return nil, status.Errorf(codes.AlreadyExists, "a build with the ref %s is running", j.ref)
	}
	js.byRef[j.ref] = j
	close(js.changed)
	js.changed = make(chan struct{})
	js.running.Add(1)
	return func() {
		js.mu.Lock()
		delete(js.byRef, j.ref)
		js.mu.Unlock()
		js.running.Done()
	}, nil
}

// find returns the job of an owner with a ref, and waits a little for it to begin.
func (js *jobs) find(ctx context.Context, ref, owner string) (*job, error) {
	late := time.NewTimer(waitForJob)
	defer late.Stop()
	for {
		js.mu.Lock()
		j, changed := js.byRef[ref], js.changed
		js.mu.Unlock()
		if j != nil && j.owner == owner {
			return j, nil
		}
		select {
		case <-changed:
		case <-late.C:
			return nil, errdefs.NewUnknownJobError(ref)
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// close lets no new jobs begin.
func (js *jobs) close() {
	js.mu.Lock()
	defer js.mu.Unlock()
	js.closed = true
}

// wait waits until no job runs.
func (js *jobs) wait() { js.running.Wait() }
