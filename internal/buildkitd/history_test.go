package buildkitd

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// built lets a build begin and end.
func built(t *testing.T, h *history, owner, ref string, err error) {
	t.Helper()
	h.begin(&job{ref: ref, owner: owner, status: newStatusLog()}, &controlapi.SolveRequest{Ref: ref})
	h.end(t.Context(), ref, outcome{}, err)
}

// refs are the builds that an owner sees, as TYPE:REF.
func refs(t *testing.T, h *history, owner string, req *controlapi.BuildHistoryRequest) string {
	t.Helper()
	req.EarlyExit = true
	l, known, err := h.listen(owner, req)
	if err != nil {
		t.Fatal(err)
	}
	defer h.leave(l)
	var out []string
	for _, e := range known {
		out = append(out, strings.ToLower(e.Type.String()[:1])+":"+e.Record.Ref)
	}
	return strings.Join(out, " ")
}

func TestHistory(t *testing.T) {
	all := func() *controlapi.BuildHistoryRequest { return &controlapi.BuildHistoryRequest{} }
	two := 2
	h := newHistory(&two)
	built(t, h, "", "a", nil)
	built(t, h, "", "b", errors.New("no"))
	h.begin(&job{ref: "c", status: newStatusLog()}, &controlapi.SolveRequest{Ref: "c"})
	built(t, h, "CN=other", "theirs", nil)
	if got := refs(t, h, "", all()); got != "s:c c:b" && got != "s:c c:a c:b" {
		t.Errorf("there is %q", got)
	}
	if got := refs(t, h, "CN=other", all()); got != "c:theirs" {
		t.Errorf("the other one sees %q", got)
	}
	if got := refs(t, h, "", &controlapi.BuildHistoryRequest{ActiveOnly: true}); got != "s:c" {
		t.Errorf("what runs is %q", got)
	}
	if err := h.update("CN=other", &controlapi.UpdateBuildHistoryRequest{Ref: "b", Delete: true}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("another's build: %v", err)
	}
	if err := h.update("", &controlapi.UpdateBuildHistoryRequest{Ref: "c", Delete: true}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a build that runs: %v", err)
	}
	if err := h.update("", &controlapi.UpdateBuildHistoryRequest{Ref: "b", Pinned: true}); err != nil {
		t.Error(err)
	}
	for i := range 5 {
		built(t, h, "", fmt.Sprint("d", i), nil)
	}
	if got := refs(t, h, "", all()); got != "s:c c:b c:d3 c:d4" {
		t.Errorf("of many there is %q", got)
	}
	if err := h.update("", &controlapi.UpdateBuildHistoryRequest{Ref: "b", Delete: true}); err != nil {
		t.Error(err)
	}
	if got := refs(t, h, "", &controlapi.BuildHistoryRequest{Ref: "b"}); got != "" {
		t.Errorf("what was deleted is %q", got)
	}
	if h.status("c", "") == nil || h.status("c", "CN=other") != nil || h.status("b", "") != nil {
		t.Error("what happened in a build is known to others than its owner, or not to it")
	}
}

// TestListen hears of builds as they begin and end, and is let go when it does not listen.
func TestListen(t *testing.T) {
	h := newHistory(nil)
	one, _, err := h.listen("", &controlapi.BuildHistoryRequest{Ref: "a"})
	if err != nil {
		t.Fatal(err)
	}
	slow, _, err := h.listen("", &controlapi.BuildHistoryRequest{})
	if err != nil {
		t.Fatal(err)
	}
	built(t, h, "", "b", nil)
	built(t, h, "", "a", nil)
	for _, want := range []controlapi.BuildHistoryEventType{controlapi.BuildHistoryEventType_STARTED, controlapi.BuildHistoryEventType_COMPLETE} {
		if e := <-one.events; e.Record.Ref != "a" || e.Type != want {
			t.Errorf("heard %s of %s, not %s of a", e.Type, e.Record.Ref, want)
		}
	}
	for range maxListened {
		built(t, h, "", "c", nil)
	}
	n := 0
	for range slow.events { // it is closed
		n++
	}
	if n != maxListened {
		t.Errorf("%d events waited", n)
	}
	h.close()
	if _, ok := <-one.events; ok {
		t.Error("there are events of a closed history")
	}
	h.leave(one)
	h.leave(slow)
}

// TestNoHistory remembers nothing.
func TestNoHistory(t *testing.T) {
	none := 0
	h := newHistory(&none)
	built(t, h, "", "a", nil)
	if got := refs(t, h, "", &controlapi.BuildHistoryRequest{}); got != "" {
		t.Errorf("there is %q", got)
	}
}

func TestFilterHistory(t *testing.T) {
	now := time.Now()
	event := func(ref string, age, took time.Duration, err string, attrs map[string]string) *controlapi.BuildHistoryEvent {
		r := &controlapi.BuildHistoryRecord{Ref: ref, CreatedAt: timestamppb.New(now.Add(-age)), FrontendAttrs: attrs}
		if took > 0 {
			r.CompletedAt = timestamppb.New(now.Add(-age + took))
		}
		if err != "" {
			r.Error = &spb.Status{Message: err}
		}
		return &controlapi.BuildHistoryEvent{Record: r}
	}
	for expressions, want := range map[string]string{
		"":                                  "old long bad off runs",
		"status==error":                     "bad",
		"status==canceled|status==error":    "bad off",
		"status==running":                   "runs",
		"ref~=^o":                           "old off",
		"repository==https://example.com/r": "old long",
		"duration>1m":                       "long",
		"startedAt<24h,status==completed":   "old",
		"startedAt>=24h":                    "long bad off runs",
		"completedAt>2026-01-01T00:00:00Z":  "old long bad off",
	} {
		events := []*controlapi.BuildHistoryEvent{
			event("old", 48*time.Hour, time.Second, "", map[string]string{"vcs:source": "https://example.com/r"}),
			event("long", time.Hour, 2*time.Minute, "", map[string]string{"context": "https://example.com/r"}),
			event("bad", time.Hour, time.Second, "exit code: 1", nil),
			event("off", time.Hour, time.Second, "rpc: context canceled", nil),
			event("runs", time.Minute, 0, "", nil),
		}
		var exprs []string
		if expressions != "" {
			exprs = strings.Split(expressions, "|")
		}
		got, err := filterHistory(events, exprs, 0)
		var names []string
		for _, e := range got {
			names = append(names, e.Record.Ref)
		}
		if err != nil || strings.Join(names, " ") != want {
			t.Errorf("%s: %q, %v, not %q", expressions, names, err, want)
		}
	}
	events := []*controlapi.BuildHistoryEvent{event("old", time.Hour, 1, "", nil), event("new", time.Minute, 1, "", nil)}
	if got, err := filterHistory(events, nil, 1); err != nil || len(got) != 1 || got[0].Record.Ref != "new" {
		t.Errorf("the newest: %v, %v", got, err)
	}
	for _, bad := range []string{`"`, "duration>long", "startedAt<yesterday", "status=="} {
		if _, err := filterHistory(events, []string{bad}, 0); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if _, err := filterHistory(events, nil, -1); status.Code(err) != codes.InvalidArgument {
		t.Errorf("limit -1: %v", err)
	}
}
