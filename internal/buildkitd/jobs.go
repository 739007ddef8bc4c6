package buildkitd

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/moby/buildkit/solver/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// waitForJob is how long a client may be early: it asks for the status of a build, and for parts of
// it, at the same time as for the build itself.
const waitForJob = 10 * time.Second

// maxEnded bounds the builds that have ended and are remembered for clients that are late, for
// instance since they were refused at once.
const maxEnded = 100

// job is one build that runs.
type job struct {
	ref    string
	owner  string // see caller
	status *statusLog
	bridge *bridge // nil unless the client builds through the gateway
	ended  bool
	err    error // that it ended with
}

// jobs are the builds that run.
type jobs struct {
	running sync.WaitGroup

	mu      sync.Mutex
	byRef   map[string]*job
	ended   []*job        // the last that have, the oldest first
	changed chan struct{} // closed, and made anew, when a job was added or has ended
	closed  bool
}

func newJobs() *jobs { return &jobs{byRef: map[string]*job{}, changed: make(chan struct{})} }

// add makes a job known by its ref. done must be called when it has ended, with the error that the client gets.
func (js *jobs) add(j *job) (done func(error), err error) {
	js.mu.Lock()
	defer js.mu.Unlock()
	if js.closed {
		return nil, status.Error(codes.Unavailable, "the server is stopping")
	}
	if js.byRef[j.ref] != nil {
		return nil, status.Errorf(codes.AlreadyExists, "a build with the ref %s is running", j.ref)
	}
	js.byRef[j.ref] = j
	js.tell()
	js.running.Add(1)
	nothing := newStatusLog() // what happened is in the history
	nothing.end()
	return func(err error) {
		js.mu.Lock()
		defer js.mu.Unlock()
		delete(js.byRef, j.ref)
		js.ended = append(js.ended, &job{ref: j.ref, owner: j.owner, status: nothing, ended: true, err: err})
		if len(js.ended) > maxEnded {
			js.ended = slices.Delete(js.ended, 0, 1)
		}
		js.tell()
		js.running.Done()
	}, nil
}

// tell wakes those who wait for a job. js.mu is held.
func (js *jobs) tell() {
	close(js.changed)
	js.changed = make(chan struct{})
}

// known is the job of an owner with a ref, or the last that has ended; nil if there is none. js.mu is held.
func (js *jobs) known(ref, owner string) *job {
	if j := js.byRef[ref]; j != nil && j.owner == owner {
		return j
	}
	for _, j := range slices.Backward(js.ended) {
		if j.ref == ref && j.owner == owner {
			return j
		}
	}
	return nil
}

// find returns the job of an owner with a ref, one that has ended maybe, and waits a little for it to begin.
func (js *jobs) find(ctx context.Context, ref, owner string) (*job, error) {
	late := time.NewTimer(waitForJob)
	defer late.Stop()
	for {
		js.mu.Lock()
		j, changed := js.known(ref, owner), js.changed
		js.mu.Unlock()
		if j != nil {
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
