package buildkitd

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
)

// TestFindEnded: who asks for a build that has ended, or ends while he waits for it, is told at once, and how. Nobody
// is told of another's.
func TestFindEnded(t *testing.T) {
	js := newJobs()
	ctx, cancel := context.WithTimeout(context.Background(), waitForJob/2)
	defer cancel()
	end := func(ref string, err error) {
		t.Helper()
		done, aerr := js.add(&job{ref: ref, owner: "me", status: newStatusLog()})
		if aerr != nil {
			t.Fatal(aerr)
		}
		done(err)
	}
	refused := errors.New("refused")
	found := make(chan *job, 1)
	go func() {
		j, err := js.find(ctx, "early", "me")
		if err != nil {
			t.Error(err)
		}
		found <- j
	}()
	time.Sleep(10 * time.Millisecond) // either order must do
	end("early", refused)
	if j := <-found; j == nil || j.ref != "early" {
		t.Errorf("found %+v", j)
	}
	late, err := js.find(ctx, "early", "me")
	if err != nil || !late.ended || !errors.Is(late.err, refused) {
		t.Fatalf("found %+v: %v", late, err)
	}
	if err := late.status.follow(ctx, func(m *controlapi.StatusResponse) error { return fmt.Errorf("sent %v", m) }); err != nil {
		t.Errorf("the status of a build that has ended: %v", err)
	}
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if j, err := js.find(short, "early", "you"); err == nil {
		t.Errorf("another finds %+v", j)
	}
	end("early", nil)
	if j, err := js.find(ctx, "early", "me"); err != nil || j.err != nil {
		t.Errorf("of two builds with a ref the first is found: %+v, %v", j, err)
	}
	for i := range maxEnded {
		end(fmt.Sprint(i), nil)
	}
	if len(js.ended) != maxEnded || len(js.byRef) != 0 {
		t.Errorf("%d builds are remembered, %d run", len(js.ended), len(js.byRef))
	}
}
