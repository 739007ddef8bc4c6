// Package progress carries what a build has to say while it runs, as typed
// events, and renders them: for a terminal, as plain lines, as JSON lines.
//
// The build reports to a Recorder; the Recorder numbers the steps and hands
// each event, one at a time, to one Sink. Logs are something else (log/slog).
package progress

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/diag"
)

// Kind of an Event.
type Kind string

// The kinds of events. A step's events come in this order: planned, started,
// any number of output, transfer and warning, done.
const (
	StepPlanned  Kind = "planned"  // the step exists and waits for others
	StepStarted  Kind = "started"  //
	StepOutput   Kind = "output"   // Data: bytes a RUN step wrote, as they came
	StepTransfer Kind = "transfer" // Item, Current, Total: bytes pulled, pushed, read
	StepDone     Kind = "done"     // Cached, Error
	Note         Kind = "note"     // Text: one line about the build as a whole
	Warning      Kind = "warning"  // Finding; Step is 0 if it is about the build as a whole
)

// Event is one thing that happened. Unused fields are empty.
type Event struct {
	Time time.Time `json:"time"`
	Kind Kind      `json:"kind"`
	Step int       `json:"step,omitempty"` // from 1, in order of planning
	StepInfo
	Data    []byte `json:"data,omitempty"`
	Item    string `json:"item,omitempty"` // what is transferred: a short digest, "context"
	Current int64  `json:"current,omitempty"`
	Total   int64  `json:"total,omitempty"` // 0: not known
	Cached  bool   `json:"cached,omitempty"`
	Error   string `json:"error,omitempty"`
	Finding
}

// StepInfo is what is known of a step when it is planned.
type StepInfo struct {
	Name  string `json:"name,omitempty"`  // "[build 2/5] RUN make"
	Stage string `json:"stage,omitempty"` // Dockerfile stage; may be empty
	// Digest is what BuildKit's clients know the step by: that of the operation in
	// its graph. Empty: Plan makes one of the name.
	Digest digest.Digest   `json:"digest,omitempty"`
	Inputs []digest.Digest `json:"inputs,omitempty"` // the steps that it needs
	// Group is what several steps are shown as; nil: the step is shown by itself.
	Group *Group `json:"group,omitempty"`
}

// Group is shown in place of the steps in it.
type Group struct {
	ID   string `json:"id,omitempty"`
	Name string `json:"name,omitempty"`
	Weak bool   `json:"weak,omitempty"` // not shown for this step's sake alone
}

// Finding is something that the user should read.
type Finding struct {
	Text   string         `json:"text,omitempty"`   // one line
	Detail []string       `json:"detail,omitempty"` // what it means, in sentences
	URL    string         `json:"url,omitempty"`    // where more is to be read
	At     *diag.Location `json:"location,omitempty"`
}

// Sink takes events, one at a time and in order. It must be quick.
type Sink interface{ Send(Event) }

// Recorder hands events to a Sink. Safe for concurrent use. A nil *Recorder
// drops everything.
type Recorder struct {
	mu    sync.Mutex
	sink  Sink
	steps int
	names map[string]int // how often a name was planned
	found findings
	now   func() time.Time
}

// NewRecorder returns a Recorder for sink.
func NewRecorder(sink Sink) *Recorder {
	return &Recorder{sink: sink, names: map[string]int{}, now: time.Now}
}

func (r *Recorder) send(e Event) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	e.Time = r.now()
	if e.Kind == Warning {
		r.found.add(e.Finding)
	}
	r.sink.Send(e)
}

// Findings are all warnings so far, each once.
func (r *Recorder) Findings() []Finding {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.found.all)
}

// Note says one line about the build as a whole.
func (r *Recorder) Note(text string) { r.send(Event{Kind: Note, Finding: Finding{Text: text}}) }

// Warn says one line that the user should read.
func (r *Recorder) Warn(text string) { r.send(Event{Kind: Warning, Finding: Finding{Text: text}}) }

// Find reports a finding about the build as a whole.
func (r *Recorder) Find(f Finding) { r.send(Event{Kind: Warning, Finding: f}) }

// Step announces a step that is no operation of a build's graph. stage may be empty.
func (r *Recorder) Step(name, stage string) *Step { return r.Plan(StepInfo{Name: name, Stage: stage}) }

// Plan announces a step.
func (r *Recorder) Plan(info StepInfo) *Step {
	if r == nil {
		return &Step{}
	}
	r.mu.Lock()
	r.steps++
	s := &Step{r: r, n: r.steps}
	if info.Digest == "" {
		info.Digest = r.digest(info.Name)
	}
	r.mu.Unlock()
	s.send(Event{Kind: StepPlanned, StepInfo: info})
	return s
}

// digest makes a digest of a step's name: the same in each build, and another
// for each step of that name.
func (r *Recorder) digest(name string) digest.Digest {
	n := r.names[name]
	r.names[name]++
	if n > 0 {
		name = fmt.Sprintf("%s\x00%d", name, n)
	}
	return digest.FromString(name)
}

// Step reports on one step. Safe for concurrent use.
type Step struct {
	r *Recorder
	n int

	mu            sync.Mutex
	started, done bool
}

func (s *Step) send(e Event) {
	e.Step = s.n
	s.r.send(e)
}

// Start says that the step runs now. Later calls do nothing.
func (s *Step) Start() {
	s.mu.Lock()
	was := s.started
	s.started = true
	s.mu.Unlock()
	if !was {
		s.send(Event{Kind: StepStarted})
	}
}

// Write reports output of the step; it never fails.
func (s *Step) Write(p []byte) (int, error) {
	s.send(Event{Kind: StepOutput, Data: append([]byte(nil), p...)})
	return len(p), nil
}

// Transfer reports that current of total bytes (0: not known) of item have
// moved. Call it as often as you like: it is the renderings that thin out. Of a
// step that has ended nothing is said.
func (s *Step) Transfer(item string, current, total int64) {
	s.mu.Lock()
	over := s.done
	s.mu.Unlock()
	if over {
		return
	}
	s.send(Event{Kind: StepTransfer, Item: item, Current: current, Total: total})
}

// Part reports something that the step does, from now until done is called.
func (s *Step) Part(name string) (done func()) {
	s.Transfer(name, 0, 0)
	return func() { s.Transfer(name, 0, 0) }
}

// Warn reports what was found out about the step, or about what it read.
func (s *Step) Warn(f Finding) { s.send(Event{Kind: Warning, Finding: f}) }

// Done ends the step. Later calls do nothing.
func (s *Step) Done(err error) {
	e := Event{Kind: StepDone}
	if err != nil {
		e.Error = diag.Message(err) // the place is that of the step
	}
	s.finish(e)
}

// Cancel ends the step as one that was given up, if it has begun.
func (s *Step) Cancel() {
	s.mu.Lock()
	started := s.started
	s.mu.Unlock()
	if started {
		s.Done(context.Canceled)
	}
}

// Cached ends the step as one whose result was in the cache.
func (s *Step) Cached() {
	s.Start()
	s.finish(Event{Kind: StepDone, Cached: true})
}

func (s *Step) finish(e Event) {
	s.mu.Lock()
	was := s.done
	s.done = true
	s.mu.Unlock()
	if !was {
		s.send(e)
	}
}
