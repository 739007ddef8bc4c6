package progress

import (
	"fmt"
	"strings"
	"time"
)

const (
	windowLines  = 6 // of output shown under a running step
	maxTransfers = 8 // shown under a running step
	minCols      = 20
)

// board is the state that the terminal rendering draws.
type board struct {
	steps   []*ttyStep // by number
	order   []*ttyStep // those that started, in that order
	began   time.Time
	planned int
	done    int
	failed  bool
}

type ttyStep struct {
	name      string
	started   time.Time
	ended     time.Time // zero: it runs
	cached    bool
	err       string
	screen    *screen
	transfers []*transfer
}

func (b *board) apply(e Event) {
	if b.began.IsZero() {
		b.began = e.Time
	}
	if e.Step < 1 {
		return
	}
	for len(b.steps) < e.Step {
		b.steps = append(b.steps, &ttyStep{})
	}
	st := b.steps[e.Step-1]
	if e.Kind == StepPlanned {
		b.planned++
		st.name = Clean(e.Name)
		return
	}
	if st.started.IsZero() {
		st.started = e.Time
		b.order = append(b.order, st)
	}
	switch e.Kind {
	case StepOutput:
		if st.screen == nil {
			st.screen = newScreen(windowLines)
		}
		st.screen.write(e.Data, e.Time)
	case StepTransfer:
		st.transfer(e)
	case StepDone:
		b.done++
		b.failed = b.failed || e.Error != ""
		st.ended, st.cached, st.err = e.Time, e.Cached, e.Error
		st.screen = nil
	}
}

func (st *ttyStep) transfer(e Event) {
	for _, t := range st.transfers {
		if t.item == e.Item {
			t.current, t.total, t.last = e.Current, e.Total, e.Time
			return
		}
	}
	st.transfers = append(st.transfers, &transfer{
		item: e.Item, current: e.Current, total: e.Total, began: e.Time, last: e.Time,
	})
}

func (st *ttyStep) runs() bool { return st.ended.IsZero() }

// styles are the colours of the display; all empty without colour.
type styles struct{ done, failed, canceled, faint, reset string }

func newStyles(color bool) styles {
	if !color {
		return styles{}
	}
	return styles{
		done: "\x1b[34m", failed: "\x1b[31m", canceled: "\x1b[33m", faint: "\x1b[2m", reset: "\x1b[0m",
	}
}

func (s styles) apply(style, text string) string {
	if style == "" {
		return text
	}
	return style + text + s.reset
}

// frame is the display at the time now as lines, none wider than cols-1: what
// fits in rows, or, if final, everything.
func (b *board) frame(now time.Time, cols, rows int, final bool, s styles) []string {
	if cols <= 0 || rows <= 0 {
		cols, rows = 80, 24
	}
	cols = max(cols, minCols) - 1 // the last column stays free: erasing there would hit its character
	lines := []string{cut(b.header(now, final), cols)}
	room := make([]int, len(b.order)) // lines for each step; 0: not shown
	if final {
		for i := range room {
			room[i] = 1
		}
	} else {
		b.share(room, max(rows-2, 1))
	}
	for i, st := range b.order {
		if room[i] > 0 {
			lines = append(lines, st.line(now, cols, s))
			lines = append(lines, st.details(now, cols, room[i]-1, s)...)
		}
	}
	return lines
}

func (b *board) header(now time.Time, final bool) string {
	h := fmt.Sprintf("[+] Building %s (%d/%d)", seconds(now.Sub(b.began)), b.done, b.planned)
	if final && !b.failed && b.done == b.planned {
		h += " FINISHED"
	}
	return h
}

// share gives each step its lines out of rows: first one to each running step,
// then room for what those have to show, then one to finished steps, the last
// first.
func (b *board) share(room []int, rows int) {
	var running []int
	for i := len(b.order) - 1; i >= 0 && rows > 0; i-- {
		if b.order[i].runs() {
			running = append(running, i)
			room[i] = 1
			rows--
		}
	}
	for k, i := range running {
		n := min(b.order[i].wants(), rows/(len(running)-k))
		room[i] += n
		rows -= n
	}
	for i := len(b.order) - 1; i >= 0 && rows > 0; i-- {
		if room[i] == 0 {
			room[i] = 1
			rows--
		}
	}
}

// wants is the number of lines that a running step has below its own.
func (st *ttyStep) wants() int {
	n := 0
	for _, t := range st.transfers {
		if !t.complete() {
			n++
		}
	}
	n = min(n, maxTransfers)
	if st.screen != nil {
		n += len(st.screen.text())
	}
	return n
}

func (t *transfer) complete() bool { return t.total > 0 && t.current >= t.total }

func (st *ttyStep) line(now time.Time, cols int, s styles) string {
	end, name, style := now, st.name, ""
	if !st.runs() {
		end, style = st.ended, s.done
		switch {
		case canceled(st.err):
			name, style = "CANCELED "+name, s.canceled
		case st.err != "":
			name, style = "ERROR "+name, s.failed
		case st.cached:
			name = "CACHED " + name
		}
	}
	d := end.Sub(st.started)
	if d < 50*time.Millisecond {
		d = 0
	}
	return s.apply(style, align(" => "+name, st.sum(), seconds(d), cols))
}

// sum tells of all the step's transfers together.
func (st *ttyStep) sum() string {
	if len(st.transfers) == 0 {
		return ""
	}
	var current, total int64
	first, last := st.transfers[0].began, st.transfers[0].last
	known := true
	for _, t := range st.transfers {
		current += t.current
		total += max(t.total, t.current)
		known = known && t.total > 0
		if t.last.After(last) {
			last = t.last
		}
	}
	if !known || !st.runs() {
		total = 0
	}
	text := amount(current, total)
	if v := speed(current, last.Sub(first)); v != "" {
		text += " " + v
	}
	return text
}

// details are at most n lines of what a running step does.
func (st *ttyStep) details(now time.Time, cols, n int, s styles) []string {
	if n <= 0 || !st.runs() {
		return nil
	}
	var lines []string
	for _, t := range st.transfers {
		if len(lines) == min(n, maxTransfers) {
			break
		}
		if t.complete() {
			continue
		}
		status := amount(t.current, t.total)
		if v := speed(t.current, t.last.Sub(t.began)); v != "" {
			status += " " + v
		}
		lines = append(lines, align(" => => "+Clean(t.item), status, seconds(now.Sub(t.began)), cols))
	}
	if st.screen == nil {
		return lines
	}
	text := st.screen.text()
	for _, l := range text[max(len(text)-(n-len(lines)), 0):] {
		lines = append(lines, s.apply(s.faint, cut(" => => # "+string(l.text), cols)))
	}
	return lines
}

// align puts the time to the right end of cols columns and status before it,
// which goes first if there is too little room.
func align(left, status, right string, cols int) string {
	room := cols - len(right) - 1
	if status != "" && room-len(status)-1 >= min(minCols, textWidth(left)) {
		room -= len(status) + 1
		right = status + " " + right
	}
	left = cut(left, max(room, 0))
	return left + strings.Repeat(" ", max(room-textWidth(left), 0)) + " " + right
}
