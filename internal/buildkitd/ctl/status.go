package ctl

import (
	"context"
	"errors"
	"io"
	"strings"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/progress"
)

// follow shows what the server tells of a build, until it has ended.
func (c *Client) follow(ctx context.Context, ref string, rec *progress.Recorder) error {
	stream, err := c.control.Status(ctx, &controlapi.StatusRequest{Ref: ref})
	if err != nil {
		return err
	}
	n := &news{rec: rec, steps: map[string]*progress.Step{}, said: map[transfer]bool{}}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		n.take(r)
	}
}

// news reports to a Recorder what comes in BuildKit's words.
type news struct {
	rec   *progress.Recorder
	steps map[string]*progress.Step // by the digest of the vertex
	said  map[transfer]bool
}

// transfer tells the things that a vertex does apart.
type transfer struct{ vertex, id string }

func (n *news) take(r *controlapi.StatusResponse) {
	for _, v := range r.Vertexes {
		n.vertex(v)
	}
	for _, s := range r.Statuses {
		n.status(s)
	}
	for _, l := range r.Logs {
		if st := n.steps[l.Vertex]; st != nil {
			_, _ = st.Write(l.Msg) // never fails
		}
	}
	for _, w := range r.Warnings {
		n.warning(w)
	}
	// What ends does so after all that is said of it.
	for _, v := range r.Vertexes {
		st := n.steps[v.Digest]
		switch {
		case v.Completed == nil:
		case v.Error != "":
			st.Done(errors.New(v.Error))
		case v.Cached:
			st.Cached()
		default:
			st.Done(nil)
		}
	}
}

func (n *news) vertex(v *controlapi.Vertex) {
	st := n.steps[v.Digest]
	if st == nil {
		info := progress.StepInfo{Name: v.Name, Digest: digest.Digest(v.Digest)}
		for _, i := range v.Inputs {
			info.Inputs = append(info.Inputs, digest.Digest(i))
		}
		if g := v.ProgressGroup; g != nil {
			info.Group = &progress.Group{ID: g.Id, Name: g.Name, Weak: g.Weak}
		}
		st = n.rec.Plan(info)
		n.steps[v.Digest] = st
	}
	if v.Started != nil {
		st.Start()
	}
}

// status is of bytes that move, or of something that is done and has no size.
func (n *news) status(s *controlapi.VertexStatus) {
	st := n.steps[s.Vertex]
	switch t := (transfer{s.Vertex, s.ID}); {
	case st == nil:
	case s.Total > 0 || s.Current > 0:
		st.Transfer(s.ID, s.Current, s.Total)
	case s.Completed != nil && !n.said[t]:
		n.said[t] = true
		_, _ = st.Write([]byte(s.ID + "\n")) // never fails
	}
}

func (n *news) warning(w *controlapi.VertexWarning) {
	f := progress.Finding{Text: string(w.Short), URL: w.Url}
	for _, d := range w.Detail {
		f.Detail = append(f.Detail, string(d))
	}
	f.At = location(w.Info, w.Ranges)
	if st := n.steps[w.Vertex]; st != nil {
		st.Warn(f)
		return
	}
	n.rec.Find(f)
}

// location is a place in a file that the server knows; nil if it is unknown.
func location(info *pb.SourceInfo, ranges []*pb.Range) *diag.Location {
	if info == nil {
		return nil
	}
	at := &diag.Location{File: info.Filename, Source: strings.Split(string(info.Data), "\n")}
	for i, r := range ranges {
		if i == 0 {
			at.Line = int(r.GetStart().GetLine())
		}
		at.EndLine = max(at.EndLine, int(r.GetEnd().GetLine()))
	}
	return at
}
