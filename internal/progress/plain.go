package progress

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

const (
	// plainTurn is how long other steps' output waits while one step is
	// shown, so that two talkative steps do not alternate line by line.
	plainTurn = 2 * time.Second
	// plainThin is the least time between two lines about one transfer, or
	// of one progress bar.
	plainThin = time.Second
	// maxWaiting bounds the output that waits for a step's turn.
	maxWaiting = 256 << 10
	// maxPartial bounds how much of a line is held until it is complete.
	maxPartial = 64 << 10
)

// Plain writes lines for people who read them in a log, in the form of
// BuildKit's plain progress: a block for each step, whose lines begin with the
// step's number. Output of commands is written byte for byte, except that of
// what a carriage return overwrites only one state a second is kept.
type Plain struct {
	w     io.Writer
	now   func() time.Time
	after func(time.Duration, func())

	mu      sync.Mutex
	out     bytes.Buffer // of one event, written at once
	steps   []*plainStep // in order of planning
	general *plainStep   // notes: step 0
	current *plainStep
	since   time.Time // when current was given its turn
	written bool      // anything yet
	armed   bool
	closed  bool
	style   Style
	found   findings
}

type plainStep struct {
	n       int
	name    string
	started time.Time
	done    bool
	waits   bool // has something to show, waiting may be empty
	waiting []byte
	open    bool // waiting, or what was written of it, ends inside a line

	partial   []byte // an incomplete line
	partialAt time.Time
	returned  bool // a carriage return follows partial
	lastLine  time.Time
	transfers []*transfer
}

type transfer struct {
	item           string
	current, total int64
	began, shown   time.Time
	last           time.Time
	ended          bool
}

// NewPlain returns a Display that writes lines to w.
func NewPlain(w io.Writer, s Style) *Plain {
	return &Plain{
		w: w, now: time.Now, after: func(d time.Duration, f func()) { time.AfterFunc(d, f) },
		general: &plainStep{}, style: s,
	}
}

// Send shows e, at once or after the turn of another step.
func (p *Plain) Send(e Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.flush()
	switch e.Kind {
	case Note:
		p.say(e.Time, e.Text)
		return
	case Warning:
		p.found.add(e.Finding)
		if e.Step == 0 {
			p.say(e.Time, "WARN: "+e.Text)
			return
		}
	}
	if e.Step < 1 {
		return
	}
	for len(p.steps) < e.Step {
		p.steps = append(p.steps, &plainStep{n: len(p.steps) + 1})
	}
	st := p.steps[e.Step-1]
	switch e.Kind {
	case StepPlanned:
		st.name = Clean(e.Name)
		return
	case StepStarted:
		st.started = e.Time
		st.waits = true
	case StepOutput:
		st.output(e.Data, e.Time)
	case StepTransfer:
		st.transfer(e)
	case Warning:
		st.line("WARN:", Clean(e.Text))
	case StepDone:
		st.finish(e)
		p.show(st, e.Time)
		p.current = nil
	}
	p.offer(st, e.Time)
}

// Close writes what is held back.
func (p *Plain) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	now := p.now()
	for _, st := range p.steps {
		st.endPartial()
		if st.waits {
			p.show(st, now)
		}
	}
	if p.current != nil && p.current.open {
		p.out.WriteByte('\n')
		p.current.open = false
	}
	p.found.write(&p.out, p.style.Verbose, styles{})
	p.flush()
	return nil
}

func (p *Plain) flush() {
	if p.out.Len() > 0 {
		_, _ = p.w.Write(p.out.Bytes())
		p.out.Reset()
	}
}

func (p *Plain) say(at time.Time, text string) {
	p.general.line("", Clean(text))
	p.show(p.general, at)
}

// offer gives st, or what waits longer, its turn if it may have it.
func (p *Plain) offer(st *plainStep, at time.Time) {
	if p.current == nil || p.current == p.general {
		for _, other := range p.steps {
			if other.waits {
				p.show(other, at)
				break
			}
		}
	}
	switch {
	case !st.waits:
	case p.current == st, at.Sub(p.since) >= plainTurn, len(st.waiting) > maxWaiting:
		p.show(st, at)
	}
	p.arm(at)
}

// arm makes sure that what waits is shown even if no event comes.
func (p *Plain) arm(at time.Time) {
	if p.armed || p.closed {
		return
	}
	for _, st := range p.steps {
		if st.waits {
			p.armed = true
			p.after(max(plainTurn-at.Sub(p.since), plainTurn/10), p.turn)
			return
		}
	}
}

func (p *Plain) turn() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.armed = false
	if p.closed {
		return
	}
	at := p.now()
	for _, st := range p.steps {
		if st.waits && at.Sub(p.since) >= plainTurn {
			p.show(st, at)
			break
		}
	}
	p.arm(at)
	p.flush()
}

// show writes what waits of st, under its name if another step was shown before.
func (p *Plain) show(st *plainStep, at time.Time) {
	if p.current != st {
		if old := p.current; old != nil {
			if old.open {
				p.out.WriteByte('\n')
				old.open = false
			}
			if old != p.general && !old.done {
				fmt.Fprintf(&p.out, "#%d ...\n", old.n)
			}
		}
		if p.written {
			p.out.WriteByte('\n')
		}
		if st.n > 0 {
			fmt.Fprintf(&p.out, "#%d %s\n", st.n, st.name)
		}
		p.current, p.since = st, at
	}
	p.written = true
	p.out.Write(st.waiting)
	st.waiting, st.waits = st.waiting[:0], false
	if cap(st.waiting) > maxPartial {
		st.waiting = nil
	}
}

// line adds one line, or ends an open one.
func (s *plainStep) line(stamp, text string) {
	s.waits = true
	if s.open {
		s.waiting = append(s.waiting, '\n')
		s.open = false
	}
	s.begin(stamp)
	if text != "" {
		s.waiting = append(s.waiting, ' ')
		s.waiting = append(s.waiting, text...)
	}
	s.waiting = append(s.waiting, '\n')
}

func (s *plainStep) begin(stamp string) {
	s.waiting = fmt.Appendf(s.waiting, "#%d", s.n)
	if stamp != "" {
		s.waiting = append(s.waiting, ' ')
		s.waiting = append(s.waiting, stamp...)
	}
}

func (s *plainStep) output(p []byte, at time.Time) {
	for len(p) > 0 {
		i := bytes.IndexAny(p, "\r\n")
		if i != 0 {
			text := p
			if i > 0 {
				text = p[:i]
			}
			s.add(text, at)
			p = p[len(text):]
			continue
		}
		if p[0] == '\n' {
			s.newline(at)
		} else {
			s.returned = s.returned || len(s.partial) > 0 || s.open
		}
		p = p[1:]
	}
}

// add appends text, which has no line break, to the incomplete line.
func (s *plainStep) add(text []byte, at time.Time) {
	if s.returned { // text overwrites partial
		s.returned = false
		switch {
		case s.open, at.Sub(s.lastLine) >= plainThin:
			s.newline(at)
		default:
			s.partial = s.partial[:0]
		}
	}
	if len(s.partial) == 0 {
		s.partialAt = at
	}
	s.partial = append(s.partial, text...)
	if len(s.partial) > maxPartial {
		s.writePartial()
	}
}

// writePartial moves the incomplete line to waiting and leaves that open.
func (s *plainStep) writePartial() {
	s.waits = true
	if !s.open {
		s.begin(stamp(s.partialAt.Sub(s.started)))
		s.waiting = append(s.waiting, ' ')
		s.open = true
	}
	s.waiting = append(s.waiting, s.partial...)
	s.partial = s.partial[:0]
}

func (s *plainStep) newline(at time.Time) {
	s.returned = false
	s.lastLine = at
	if len(s.partial) > 0 {
		s.writePartial()
	}
	if s.open {
		s.waiting = append(s.waiting, '\n')
		s.open, s.waits = false, true
		return
	}
	s.line(stamp(at.Sub(s.started)), "")
}

func (s *plainStep) endPartial() {
	if len(s.partial) > 0 || s.open {
		s.newline(s.partialAt)
	}
}

func (s *plainStep) transfer(e Event) {
	var t *transfer
	for _, t = range s.transfers {
		if t.item == e.Item {
			break
		}
		t = nil
	}
	if t == nil {
		t = &transfer{item: e.Item, began: e.Time, shown: e.Time}
		s.transfers = append(s.transfers, t)
	}
	if t.ended && e.Current < t.current { // begun anew
		t.began, t.ended = e.Time, false
	}
	t.current, t.total, t.last = e.Current, e.Total, e.Time
	switch {
	case t.ended:
	case t.total > 0 && t.current >= t.total:
		s.endTransfer(t)
	case e.Time.Sub(t.shown) >= plainThin:
		t.shown = e.Time
		s.line("", t.text()+" "+seconds(e.Time.Sub(t.began)))
	}
}

// text is what is moved, and how much of it.
func (t *transfer) text() string {
	if n := amount(t.current, t.total); n != "" {
		return Clean(t.item) + " " + n
	}
	return Clean(t.item)
}

func (s *plainStep) endTransfer(t *transfer) {
	t.ended = true
	d := t.last.Sub(t.began)
	text := t.text() + " " + seconds(d) + " done"
	if v := speed(t.current, d); v != "" {
		text += ", " + v
	}
	s.line("", text)
}

func (s *plainStep) finish(e Event) {
	s.endPartial()
	for _, t := range s.transfers {
		if !t.ended && e.Error == "" {
			s.endTransfer(t)
		}
	}
	s.transfers = nil
	s.done = true
	if s.started.IsZero() {
		s.started = e.Time
	}
	switch {
	case canceled(e.Error):
		s.line("CANCELED", "")
	case e.Error != "":
		s.line("ERROR:", Clean(e.Error))
	case e.Cached:
		s.line("CACHED", "")
	default:
		s.line("DONE", seconds(e.Time.Sub(s.started)))
	}
}

// canceled reports whether a step ended because the build did.
func canceled(err string) bool { return strings.HasSuffix(err, "context canceled") }
