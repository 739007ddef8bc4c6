package progress

import (
	"bytes"
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	failureLines = 50 // of output, kept for each running step
	maxFailures  = 8  // failed steps that are reported
)

// Failures is a Sink in front of another. It keeps the last lines of output of
// each step that runs, so that those of a failed one can be repeated where
// people look: at the end.
type Failures struct {
	next Sink

	mu     sync.Mutex
	steps  map[int]*failing
	failed []*failing
}

type failing struct {
	name    string
	started time.Time
	screen  *screen
}

// NewFailures returns a Sink that hands everything on to next.
func NewFailures(next Sink) *Failures {
	return &Failures{next: next, steps: map[int]*failing{}}
}

// Send takes note of e and hands it on.
func (f *Failures) Send(e Event) {
	f.note(e)
	f.next.Send(e)
}

func (f *Failures) note(e Event) {
	if e.Step == 0 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	st := f.steps[e.Step]
	if st == nil {
		if e.Kind == StepDone && e.Error == "" {
			return
		}
		st = &failing{started: e.Time}
		f.steps[e.Step] = st
	}
	switch e.Kind {
	case StepPlanned:
		st.name = Clean(e.Name)
	case StepStarted:
		st.started = e.Time
	case StepOutput:
		if st.screen == nil {
			st.screen = newScreen(failureLines)
		}
		st.screen.write(e.Data, e.Time)
	case StepDone:
		delete(f.steps, e.Step)
		if e.Error != "" && !canceled(e.Error) && len(f.failed) < maxFailures {
			f.failed = append(f.failed, st)
		}
	}
}

// Report writes the last output of each step that failed and had any, cleaned
// of everything that is not text:
//
//	------
//	 > [build 2/4] RUN make:
//	0.123 output
//	------
func (f *Failures) Report(w io.Writer) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var b bytes.Buffer
	for _, st := range f.failed {
		if st.screen == nil || len(st.screen.text()) == 0 {
			continue
		}
		fmt.Fprintf(&b, "------\n > %s:\n", st.name)
		for _, l := range st.screen.text() {
			fmt.Fprintf(&b, "%s %s\n", stamp(l.at.Sub(st.started)), string(l.text))
		}
		b.WriteString("------\n")
	}
	_, err := w.Write(b.Bytes())
	return err
}
