package buildkitd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"

	controlapi "github.com/moby/buildkit/api/services/control"

	"github.com/kiln-build/kiln/internal/progress"
)

// heard is what one client that follows a build has been told.
type heard struct {
	messages int
	logs     bytes.Buffer
	steps    map[string]*controlapi.Vertex
	moved    map[string]int64 // by item: bytes
	states   int              // of transfers
	warnings []string
}

func (h *heard) take(r *controlapi.StatusResponse) error {
	h.messages++
	for _, l := range r.Logs {
		h.logs.Write(l.Msg)
	}
	if h.steps == nil {
		h.steps, h.moved = map[string]*controlapi.Vertex{}, map[string]int64{}
	}
	for _, v := range r.Vertexes {
		h.steps[v.Name] = v
	}
	for _, s := range r.Statuses {
		h.moved[s.ID] = s.Current
		h.states++
	}
	for _, w := range r.Warnings {
		h.warnings = append(h.warnings, string(w.Short))
	}
	return nil
}

// TestFollow has one client that follows a build from its beginning, and one that comes when it has ended.
func TestFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newStatusLog()
		rec := progress.NewRecorder(log)
		var early, late heard
		done := make(chan error)
		go func() { done <- log.follow(t.Context(), early.take) }()
		step := rec.Step("RUN make", "")
		cached := rec.Step("RUN true", "")
		step.Start()
		for i := range 100 {
			fmt.Fprintf(step, "line %d\n", i)
			step.Transfer("layer", int64(i+1), 100)
		}
		synctest.Wait()
		step.Done(errors.New("exit status 1"))
		cached.Cached()
		rec.Warn("careful")
		log.end()
		log.end() // however often
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := log.follow(t.Context(), late.take); err != nil {
			t.Error(err)
		}
		for name, h := range map[string]*heard{"early": &early, "late": &late} {
			if n := bytes.Count(h.logs.Bytes(), []byte("\n")); n != 100 {
				t.Errorf("%s: %d lines", name, n)
			}
			if v := h.steps["RUN make"]; v == nil || v.Error != "exit status 1" || v.Completed == nil || v.Cached {
				t.Errorf("%s: the step that failed: %v", name, v)
			}
			if v := h.steps["RUN true"]; v == nil || !v.Cached {
				t.Errorf("%s: the cached step: %v", name, v)
			}
			if h.moved["layer"] != 100 {
				t.Errorf("%s: %d bytes of the layer", name, h.moved["layer"])
			}
			if len(h.warnings) != 1 || h.warnings[0] != "careful" {
				t.Errorf("%s: warnings %q", name, h.warnings)
			}
		}
		if late.messages != 1 || late.states > 2 {
			t.Errorf("who comes late gets %d messages with %d states of one transfer", late.messages, late.states)
		}
		if c := log.summary(); c != (counts{total: 2, completed: 2, cached: 1, warnings: 1}) {
			t.Errorf("%+v", c)
		}
	})
}

// TestKeptLogs bounds what is kept of output: the last of it stays, and all else.
func TestKeptLogs(t *testing.T) {
	log := newStatusLog()
	rec := progress.NewRecorder(log)
	step := rec.Step("RUN yes", "")
	step.Start()
	block := bytes.Repeat([]byte("y"), 1000)
	for range 2 * maxKeptLogs / len(block) {
		if _, err := step.Write(block); err != nil {
			t.Fatal(err)
		}
	}
	fmt.Fprint(step, "the last line")
	step.Done(nil)
	log.end()
	for _, limit := range []int{maxKeptLogs, 2000} {
		log.shrink(limit)
		var h heard
		if err := log.follow(t.Context(), h.take); err != nil {
			t.Fatal(err)
		}
		if n := h.logs.Len(); n > limit || n < limit-len(block) {
			t.Errorf("%d bytes of output are kept, of %d", n, limit)
		}
		if !bytes.HasSuffix(h.logs.Bytes(), []byte("the last line")) || h.steps["RUN yes"].GetCompleted() == nil {
			t.Errorf("with %d bytes the end is lost", limit)
		}
	}
}

// TestFollowerLeaves ends with the client, or with the error of sending to it.
func TestFollowerLeaves(t *testing.T) {
	log := newStatusLog()
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("gone")
	cancel(gone)
	if err := log.follow(ctx, func(*controlapi.StatusResponse) error { return nil }); !errors.Is(err, gone) {
		t.Error(err)
	}
	progress.NewRecorder(log).Warn("x")
	if err := log.follow(t.Context(), func(*controlapi.StatusResponse) error { return gone }); !errors.Is(err, gone) {
		t.Error(err)
	}
}
