package progress

import (
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// Status is what BuildKit's API calls a SolveStatus: news about a build, as
// its clients understand them. As JSON it is what `docker buildx build
// --progress=rawjson` writes, one a line.
type Status struct {
	Vertexes []*Vertex        `json:"vertexes,omitempty"`
	Statuses []*VertexStatus  `json:"statuses,omitempty"`
	Logs     []*VertexLog     `json:"logs,omitempty"`
	Warnings []*VertexWarning `json:"warnings,omitempty"`
}

// Vertex is a step, as far as it has come.
type Vertex struct {
	Digest        digest.Digest   `json:"digest,omitempty"`
	Inputs        []digest.Digest `json:"inputs,omitempty"`
	Name          string          `json:"name,omitempty"`
	Started       *time.Time      `json:"started,omitempty"`
	Completed     *time.Time      `json:"completed,omitempty"`
	Cached        bool            `json:"cached,omitempty"`
	Error         string          `json:"error,omitempty"`
	ProgressGroup *Group          `json:"progressGroup,omitempty"`
}

// VertexStatus is how far one thing has come that a step moves.
type VertexStatus struct {
	ID        string        `json:"id"`
	Vertex    digest.Digest `json:"vertex,omitempty"`
	Name      string        `json:"name,omitempty"`
	Total     int64         `json:"total,omitempty"`
	Current   int64         `json:"current"`
	Timestamp time.Time     `json:"timestamp"`
	Started   *time.Time    `json:"started,omitempty"`
	Completed *time.Time    `json:"completed,omitempty"`
}

// VertexLog is output of a step.
type VertexLog struct {
	Vertex    digest.Digest `json:"vertex,omitempty"`
	Stream    int           `json:"stream,omitempty"` // 1: standard output, with which standard error comes
	Data      []byte        `json:"data"`
	Timestamp time.Time     `json:"timestamp"`
}

// VertexWarning is a Finding. Vertex is empty if it is about the whole build.
type VertexWarning struct {
	Vertex     digest.Digest `json:"vertex,omitempty"`
	Level      int           `json:"level,omitempty"`
	Short      []byte        `json:"short,omitempty"`
	Detail     [][]byte      `json:"detail,omitempty"`
	URL        string        `json:"url,omitempty"`
	SourceInfo *SourceInfo   `json:"sourceInfo,omitempty"`
	Range      []*Range      `json:"range,omitempty"`
}

// SourceInfo is the file that a warning is about.
type SourceInfo struct {
	Filename string `json:"filename,omitempty"`
	Data     []byte `json:"data,omitempty"`
	Language string `json:"language,omitempty"`
}

// Range is some lines of a file.
type Range struct {
	Start Position `json:"start,omitzero"`
	End   Position `json:"end,omitzero"`
}

// Position is a place in a file. Lines are counted from 1.
type Position struct {
	Line      int `json:"line,omitempty"`
	Character int `json:"character,omitempty"`
}

// Translator makes Statuses of Events. The zero value is not ready: use NewTranslator.
type Translator struct{ steps map[int]*translated }

// translated is a step of which news were given.
type translated struct {
	vertex Vertex
	items  map[string]*VertexStatus // those under way
	order  []string
}

// NewTranslator returns a Translator for one build.
func NewTranslator() *Translator { return &Translator{steps: map[int]*translated{}} }

// Translate returns the news that e is.
func (t *Translator) Translate(e Event) *Status {
	switch {
	case e.Kind == Note:
		// A step that is over at once: clients of BuildKit show nothing else to the side.
		at := e.Time
		name := "[internal] " + e.Text
		return &Status{Vertexes: []*Vertex{{Digest: digest.FromString(name), Name: name, Started: &at, Completed: &at}}}
	case e.Kind == Warning && e.Step == 0:
		return &Status{Warnings: []*VertexWarning{warning("", e.Finding)}}
	}
	s := t.steps[e.Step]
	if s == nil {
		s = &translated{items: map[string]*VertexStatus{}}
		t.steps[e.Step] = s
	}
	at := e.Time
	switch e.Kind {
	case StepPlanned:
		s.vertex = Vertex{Digest: e.Digest, Inputs: e.Inputs, Name: e.Name, ProgressGroup: e.Group}
	case StepStarted:
		s.vertex.Started = &at
	case StepOutput:
		return &Status{Logs: []*VertexLog{{Vertex: s.vertex.Digest, Stream: 1, Data: e.Data, Timestamp: at}}}
	case StepTransfer:
		return &Status{Statuses: []*VertexStatus{s.transfer(e)}}
	case Warning:
		return &Status{Warnings: []*VertexWarning{warning(s.vertex.Digest, e.Finding)}}
	case StepDone:
		return s.done(e)
	}
	return s.news()
}

// news is the step as it is now.
func (s *translated) news() *Status {
	v := s.vertex
	return &Status{Vertexes: []*Vertex{&v}}
}

func (s *translated) transfer(e Event) *VertexStatus {
	at := e.Time
	v := s.items[e.Item]
	if v == nil || e.Current < v.Current { // begun, or begun anew
		if v == nil {
			s.order = append(s.order, e.Item)
		}
		v = &VertexStatus{ID: e.Item, Vertex: s.vertex.Digest, Started: &at}
		s.items[e.Item] = v
	}
	if e.Current > 0 || e.Total > 0 {
		v.Name = "transferring"
	}
	v.Current, v.Total, v.Timestamp = e.Current, e.Total, at
	if e.Total > 0 && e.Current >= e.Total {
		v.Completed = &at
	}
	out := *v
	return &out
}

func (s *translated) done(e Event) *Status {
	at := e.Time
	if s.vertex.Started == nil { // clients take what never began for waiting still
		s.vertex.Started = &at
	}
	s.vertex.Completed, s.vertex.Cached, s.vertex.Error = &at, e.Cached, e.Error
	out := s.news()
	for _, item := range s.order {
		if v := s.items[item]; v.Completed == nil {
			v.Completed, v.Timestamp = &at, at
			last := *v
			out.Statuses = append(out.Statuses, &last)
		}
	}
	s.items, s.order = map[string]*VertexStatus{}, nil
	return out
}

// Warning is the finding in BuildKit's words, of no vertex.
func (f Finding) Warning() *VertexWarning { return warning("", f) }

func warning(vertex digest.Digest, f Finding) *VertexWarning {
	w := &VertexWarning{Vertex: vertex, Level: 1, Short: []byte(f.Text), URL: f.URL}
	for _, d := range f.Detail {
		w.Detail = append(w.Detail, []byte(d))
	}
	if f.At == nil {
		return w
	}
	w.SourceInfo = &SourceInfo{Filename: f.At.File, Language: "Dockerfile", Data: []byte(strings.Join(f.At.Source, "\n"))}
	for n := f.At.Line; n <= max(f.At.Line, f.At.EndLine); n++ {
		at := Position{Line: n}
		w.Range = append(w.Range, &Range{Start: at, End: at})
	}
	return w
}
