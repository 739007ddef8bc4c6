package ctl

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kiln-build/kiln/internal/progress"
)

// events takes note of what is said of each step.
type events []string

func (es *events) Send(e progress.Event) {
	s := fmt.Sprint(e.Step, " ", e.Kind)
	for _, more := range []string{e.Name, string(e.Data), e.Item, e.Text, e.Error} {
		if more != "" {
			s += " " + strings.TrimSuffix(more, "\n")
		}
	}
	if e.Cached {
		s += " cached"
	}
	if e.Total > 0 {
		s += fmt.Sprintf(" %d/%d", e.Current, e.Total)
	}
	if e.At != nil {
		s += fmt.Sprintf(" %s:%d-%d", e.At.File, e.At.Line, e.At.EndLine)
	}
	*es = append(*es, s)
}

// TestNews: what servers say, in our words. A step ends after all that comes with its end, and things
// that are said twice happen once.
func TestNews(t *testing.T) {
	var got events
	n := &news{rec: progress.NewRecorder(&got), steps: map[string]*progress.Step{}, said: map[transfer]bool{}}
	now := timestamppb.Now()
	done := &controlapi.VertexStatus{ID: "exporting layers", Vertex: "a", Completed: now}
	n.take(&controlapi.StatusResponse{Vertexes: []*controlapi.Vertex{{Digest: "a", Name: "A"}, {Digest: "b", Name: "B"}}})
	n.take(&controlapi.StatusResponse{
		Vertexes: []*controlapi.Vertex{{Digest: "a", Name: "A", Started: now, Completed: now, Error: "no"}, {Digest: "b", Name: "B", Started: now, Completed: now, Cached: true}},
		Logs:     []*controlapi.VertexLog{{Vertex: "a", Msg: []byte("out\n")}, {Vertex: "unknown", Msg: []byte("lost")}},
		Statuses: []*controlapi.VertexStatus{{ID: "sha256:1", Vertex: "a", Current: 1, Total: 2}, done, done},
		Warnings: []*controlapi.VertexWarning{
			{Vertex: "a", Short: []byte("w"), Info: &pb.SourceInfo{Filename: "f"}, Ranges: []*pb.Range{{Start: &pb.Position{Line: 2}, End: &pb.Position{Line: 3}}}},
			{Short: []byte("all")},
		},
	})
	want := []string{
		"1 planned A", "2 planned B", "1 started", "2 started", "1 transfer sha256:1 1/2", "1 output exporting layers", "1 output out",
		"1 warning w f:2-3", "0 warning all", "1 done no", "2 done cached",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
