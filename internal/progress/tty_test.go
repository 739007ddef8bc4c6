package progress

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hinshun/vt10x"
)

// console is an emulated terminal with a TTY on it that is drawn on demand.
type console struct {
	*clock
	*Recorder
	term vt10x.Terminal
	raw  bytes.Buffer
	tty  *TTY
}

func newConsole(t *testing.T, cols, rows int, o TTYOptions) *console {
	c := &console{clock: newClock(), term: vt10x.New(vt10x.WithSize(cols, rows))}
	o.Now, o.Ticks = c.clock.now, make(chan time.Time)
	c.tty = NewTTY(c, c.term.Size, o)
	c.Recorder = c.recorder(c.tty)
	t.Cleanup(func() { _ = c.tty.Close() })
	return c
}

func (c *console) Write(p []byte) (int, error) {
	c.raw.Write(p)
	return c.term.Write(p)
}

// shows draws and returns what the terminal shows.
func (c *console) shows() string {
	c.tty.redraw(false)
	return c.screen()
}

func (c *console) screen() string {
	return trimLines(c.term.String())
}

type story struct {
	b strings.Builder
}

func (s *story) add(title, screen string) { fmt.Fprintf(&s.b, "== %s\n%s", title, screen) }

func TestTTYBuild(t *testing.T) {
	c := newConsole(t, 72, 20, TTYOptions{})
	fmt.Fprint(c, "$ kiln build .\r\n")
	var s story
	c.Note("sandbox gvisor: no user namespace may be made here")
	load := c.Step("[internal] load build definition from Dockerfile", "")
	from := c.Step("[build 1/4] FROM docker.io/library/golang:1.26", "build")
	copied := c.Step("[build 2/4] COPY . .", "build")
	dl := c.Step("[build 3/4] RUN go mod download && a command that is so long that it cannot be shown", "build")
	run := c.Step("[build 4/4] RUN make", "build")
	s.add("nothing runs", c.shows())
	load.Start()
	load.Done(nil)
	from.Start()
	c.ms(100)
	from.Transfer("sha256:0123456789ab", 0, 40_100_000)
	from.Transfer("sha256:ba9876543210", 0, 0)
	c.ms(1000)
	from.Transfer("sha256:0123456789ab", 12_500_000, 40_100_000)
	from.Transfer("sha256:ba9876543210", 1_000_000, 0)
	s.add("transfers", c.shows())
	from.Transfer("sha256:0123456789ab", 40_100_000, 40_100_000)
	c.ms(1000)
	s.add("one has come", c.shows())
	from.Done(nil)
	copied.Cached()
	dl.Start()
	say(dl, "go: downloading a\ngo: downloading b\n")
	run.Start()
	for i := range 10 {
		c.ms(1000)
		say(run, fmt.Sprintf("cc -o %d %d.c\r\n", i, i))
	}
	say(run, "\x1b[1;32mlinking\x1b[0m 世界 10%\rlinking 世界 20%")
	c.Warn("FromAsCasing: 'as' and 'FROM' keywords' casing do not match")
	s.add("two run", c.shows())
	dl.Done(nil)
	s.add("one is done", c.shows())
	run.Done(errors.New("exit code: 2"))
	_ = c.tty.Close()
	s.add("closed", c.screen())
	golden(t, "tty-build.txt", s.b.String())
	if !c.term.CursorVisible() || c.term.Mode()&vt10x.ModeWrap == 0 {
		t.Error("the terminal is not left as it was found")
	}
}

func TestTTYFinished(t *testing.T) {
	c := newConsole(t, 60, 10, TTYOptions{})
	for i := range 30 {
		st := c.Step(fmt.Sprintf("[%d/30] RUN %d", i+1, i+1), "")
		st.Start()
		if i == 20 {
			c.ms(500)
			var s story
			s.add("more steps than rows", c.shows())
			golden(t, "tty-rows.txt", s.b.String())
		}
		st.Done(nil)
	}
	_ = c.tty.Close()
	if got := c.screen(); !strings.HasSuffix(got, " => [30/30] RUN 30"+strings.Repeat(" ", 37)+"0.0s\n") {
		t.Errorf("the end is not shown:\n%s", got)
	}
	out := c.raw.String()
	last := out[strings.LastIndex(out, "[+] Building"):]
	if !strings.HasPrefix(last, "[+] Building 0.5s (30/30) FINISHED") {
		t.Errorf("header: %.60q", last)
	}
	if n := strings.Count(last, "=> "); n != 30 {
		t.Errorf("the finished display has %d of 30 steps", n)
	}
}

// Running steps are shown before finished ones, and share the room.
func TestTTYManyRun(t *testing.T) {
	c := newConsole(t, 60, 12, TTYOptions{})
	var steps []*Step
	for i := range 6 {
		st := c.Step(fmt.Sprintf("[s%d 1/1] RUN %d", i, i), "")
		st.Start()
		steps = append(steps, st)
		for j := range 5 {
			say(st, fmt.Sprintf("output %d\n", j))
		}
	}
	steps[1].Done(nil)
	var s story
	s.add("five run in ten lines", c.shows())
	golden(t, "tty-many.txt", s.b.String())
}

func TestTTYResize(t *testing.T) {
	c := newConsole(t, 80, 24, TTYOptions{Style: Style{NoColor: true}})
	st := c.Step("[1/2] RUN a command with a rather long text, longer than narrow", "")
	st.Start()
	say(st, strings.Repeat("0123456789", 12)+"\n")
	var s story
	s.add("80x24", c.shows())
	for _, d := range [][2]int{{40, 24}, {120, 24}, {10, 3}, {1, 1}, {80, 24}} {
		c.term.Resize(d[0], d[1])
		s.add(fmt.Sprintf("%dx%d", d[0], d[1]), c.shows())
	}
	golden(t, "tty-resize.txt", s.b.String())
}

func TestTTYUnknownSize(t *testing.T) {
	var b bytes.Buffer
	tty := NewTTY(&b, func() (int, int) { return 0, 0 }, TTYOptions{Style: Style{NoColor: true}})
	r := NewRecorder(tty)
	r.Step("x", "").Start()
	_ = tty.Close()
	_ = tty.Close()
	if !strings.Contains(b.String(), " => x") {
		t.Errorf("shows %q", b.String())
	}
}

// ours are the only control sequences that a display may send.
var ours = regexp.MustCompile(`\x1b\[(\?25[lh]|\?7[lh]|[0-9]*[AJK]|[0-9]{1,2}m)|\r\n?`)

func TestTTYLetsNoControlThrough(t *testing.T) {
	evil := "\x1b]0;owned\x07\x1b[2J\x1b[8m\x1bc\x9b31m\u009b2J\x1b]52;c;aGk=\x1b\\\x1bP$q\x1b\\x\r\b\v\f\x00\x7f\u202e"
	c := newConsole(t, 80, 24, TTYOptions{})
	a := c.Step("[1/3] RUN "+evil+"\nx", evil)
	b := c.Step("[2/3] RUN b", "")
	c.Note(evil + "\nsecond line")
	c.Warn(evil)
	a.Start()
	b.Start()
	for i := range evil {
		say(a, evil[:i]+"\n")
		say(a, evil[i:])
		a.Transfer(evil[i:], 1, 2)
		c.shows()
	}
	a.Done(errors.New(evil))
	_ = c.tty.Close()
	rest := ours.ReplaceAllString(c.raw.String(), "")
	for _, r := range rest {
		if !printable(r) {
			t.Fatalf("%q reaches the terminal", r)
		}
	}
	if c.term.Title() != "" {
		t.Errorf("the title became %q", c.term.Title())
	}
}

func TestTTYNoColor(t *testing.T) {
	c := newConsole(t, 80, 24, TTYOptions{Style: Style{NoColor: true}})
	st := c.Step("x", "")
	st.Start()
	say(st, "\x1b[31mred\n")
	c.shows()
	st.Done(errors.New("no"))
	_ = c.tty.Close()
	if m := regexp.MustCompile(`\x1b\[[0-9;]*m`).FindString(c.raw.String()); m != "" {
		t.Errorf("sends %q although NO_COLOR is set", m)
	}
}

// Whatever happens, a frame fits the terminal, and what was on the terminal
// before the build stays.
func TestTTYFramesFit(t *testing.T) {
	for seed := range uint64(50) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		cols, rows := 20+rnd.IntN(100), 4+rnd.IntN(40)
		c := newConsole(t, cols, rows, TTYOptions{})
		fmt.Fprint(c, "before\r\n")
		texts := []string{"世界 wide", "e\u0301 combining", "👩‍👩‍👧 family", "plain text\n", "\x1b[3A", "\r", "\t", strings.Repeat("x", 200)}
		var steps []*Step
		for range 200 {
			c.ms(rnd.IntN(300))
			if len(steps) < 40 && rnd.IntN(5) == 0 {
				steps = append(steps, c.Step(texts[rnd.IntN(len(texts))], ""))
			}
			if len(steps) == 0 {
				continue
			}
			st := steps[rnd.IntN(len(steps))]
			switch rnd.IntN(8) {
			case 0:
				st.Done(nil)
			case 1:
				st.Start()
			case 2:
				st.Transfer(texts[rnd.IntN(len(texts))], rnd.Int64N(1e9), rnd.Int64N(2)*1e9)
			default:
				say(st, texts[rnd.IntN(len(texts))])
			}
			lines := c.tty.board.frame(c.clock.now(), cols, rows, false, styles{})
			if len(lines) > rows-1 {
				t.Fatalf("seed %d: %d lines on %d rows", seed, len(lines), rows)
			}
			for _, l := range lines {
				if n := textWidth(l); n > cols-1 {
					t.Fatalf("seed %d: %d columns on %d: %q", seed, n, cols, l)
				}
			}
		}
		if got := c.shows(); !strings.HasPrefix(got, "before\n[+]") && !strings.HasPrefix(got, "[+]") {
			t.Fatalf("seed %d: the screen begins with\n%s", seed, got)
		}
	}
}

// A terminal that is stopped (Ctrl-S) must not stop the build.
func TestTTYBlockedTerminal(t *testing.T) {
	release := make(chan struct{})
	entered := make(chan struct{}, 100)
	ticks := make(chan time.Time)
	tty := NewTTY(writerFunc(func(p []byte) (int, error) {
		entered <- struct{}{}
		<-release
		return len(p), nil
	}), func() (int, int) { return 80, 24 }, TTYOptions{Ticks: ticks})
	r := NewRecorder(tty)
	st := r.Step("x", "")
	st.Start()
	ticks <- time.Time{}
	<-entered
	sent := make(chan struct{})
	go func() {
		say(st, "still going\n")
		close(sent)
	}()
	select {
	case <-sent:
	case <-time.After(10 * time.Second):
		t.Error("a step waits for the terminal")
	}
	close(release)
	_ = tty.Close()
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
