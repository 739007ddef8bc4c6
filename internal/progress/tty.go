package progress

import (
	"bytes"
	"fmt"
	"io"
	"sync"
	"time"
)

const drawEvery = 100 * time.Millisecond

// TTYOptions are what a terminal display may differ in.
type TTYOptions struct {
	Style
	Now func() time.Time // nil: time.Now
	// Ticks makes the display redraw itself; nil: ten times a second.
	Ticks <-chan time.Time
}

// TTY shows a build on a terminal: a line for each step, redrawn in place, and
// below those that run the last lines of their output. Nothing but the display
// may write to the terminal until Close. Whatever the build's output, names
// and notes hold, no control characters of theirs reach the terminal.
type TTY struct {
	w    io.Writer
	size func() (cols, rows int)
	now  func() time.Time
	s    styles

	mu      sync.Mutex // of what follows
	board   board
	notes   []string // not yet written
	found   findings
	verbose bool

	draw  sync.Mutex // held while writing
	drawn int        // lines of the last frame, which the cursor is below

	stop chan struct{}
	idle chan struct{} // closed when the ticking goroutine is gone
	once sync.Once
}

// NewTTY returns a display on the terminal w. size is asked before each frame;
// zeros mean that it is not known.
func NewTTY(w io.Writer, size func() (cols, rows int), o TTYOptions) *TTY {
	t := &TTY{
		w: w, size: size, now: o.Now, s: newStyles(!o.NoColor), verbose: o.Verbose,
		stop: make(chan struct{}), idle: make(chan struct{}),
	}
	if t.now == nil {
		t.now = time.Now
	}
	go t.tick(o.Ticks)
	return t
}

func (t *TTY) tick(ticks <-chan time.Time) {
	defer close(t.idle)
	if ticks == nil {
		own := time.NewTicker(drawEvery)
		defer own.Stop()
		ticks = own.C
	}
	for {
		select {
		case <-t.stop:
			return
		case <-ticks:
			t.redraw(false)
		}
	}
}

// Send takes note of e for the next frame.
func (t *TTY) Send(e Event) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch e.Kind {
	case Note:
		t.notes = append(t.notes, Clean(e.Text))
	case Warning:
		t.found.add(e.Finding)
	}
	t.board.apply(e)
}

// Close draws the whole display a last time, below it the warnings, and leaves
// the terminal as it was found. It may be called more than once.
func (t *TTY) Close() error {
	t.once.Do(func() {
		close(t.stop)
		<-t.idle
		t.redraw(true)
	})
	return nil
}

// redraw replaces the last frame, in one write so that nothing flickers. It
// does not hold up Send while the terminal takes its time.
func (t *TTY) redraw(final bool) {
	t.draw.Lock()
	defer t.draw.Unlock()
	cols, rows := t.size()

	t.mu.Lock()
	var lines []string
	if t.board.planned > 0 {
		lines = t.board.frame(t.now(), cols, rows, final, t.s)
	}
	notes := t.notes
	t.notes = nil
	found := t.found.all
	t.mu.Unlock()

	if len(lines)+len(notes) == 0 && (!final || len(found) == 0) {
		return
	}
	var b bytes.Buffer
	b.WriteString("\x1b[?25l") // hide the cursor
	if t.drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", t.drawn)
	}
	b.WriteByte('\r')
	if len(notes) > 0 {
		b.WriteString("\x1b[J")
	}
	for _, n := range notes {
		b.WriteString(n + "\r\n")
	}
	// Without wrapping, a terminal that finds a character wider than
	// runeWidth does still has as many lines as are counted here.
	b.WriteString("\x1b[?7l")
	for _, l := range lines {
		b.WriteString(l + "\x1b[K\r\n")
	}
	b.WriteString("\x1b[J\x1b[?7h")
	if final {
		t.writeFindings(&b)
	}
	b.WriteString("\x1b[?25h")
	t.drawn = len(lines)
	_, _ = t.w.Write(b.Bytes())
}

// writeFindings is for the last frame, when no more events come.
func (t *TTY) writeFindings(b *bytes.Buffer) {
	var text bytes.Buffer
	t.found.write(&text, t.verbose, t.s)
	b.Write(bytes.ReplaceAll(text.Bytes(), []byte("\n"), []byte("\r\n")))
}
