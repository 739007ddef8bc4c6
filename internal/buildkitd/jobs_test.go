package buildkitd

import (
	"context"
	"testing"
	"time"
)

// TestFindEnded: who follows a build that ends at once, or has ended, does not wait for it to begin.
func TestFindEnded(t *testing.T) {
	js := newJobs()
	ctx, cancel := context.WithTimeout(t.Context(), waitForJob/2)
	defer cancel()
	var ended *job
	past := make(chan *job, 1)
	look := func() *job {
		select {
		case ended = <-past:
		default:
		}
		return ended
	}
	found := make(chan error, 1)
	go func() {
		j, err := js.find(ctx, "a", "me", look)
		if err == nil && j.ref != "a" {
			t.Errorf("found %q", j.ref)
		}
		found <- err
	}()
	time.Sleep(10 * time.Millisecond)
	j := &job{ref: "a", owner: "me"}
	done, err := js.add(j)
	if err != nil {
		t.Fatal(err)
	}
	past <- j
	done()
	if err := <-found; err != nil {
		t.Error(err)
	}
	if _, err := js.find(ctx, "a", "me", look); err != nil {
		t.Error(err)
	}
	// Somebody else's is not found, neither running nor ended.
	if done, err = js.add(&job{ref: "b", owner: "me"}); err != nil {
		t.Fatal(err)
	}
	defer done()
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if j, err := js.find(short, "b", "you", nil); err == nil {
		t.Errorf("found %+v", j)
	}
}
