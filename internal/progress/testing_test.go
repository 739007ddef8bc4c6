package progress

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the golden files anew")

// golden compares got with testdata/name.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("%v (run with -update to make it)", err)
	}
	if got != string(want) {
		t.Errorf("%s differs; run with -update if this is meant.\ngot:\n%s\nwant:\n%s", file, got, want)
	}
}

// clock is a clock that tests move, with timers.
type clock struct {
	mu     sync.Mutex
	t      time.Time
	timers []timer
}

type timer struct {
	at time.Time
	f  func()
}

func newClock() *clock { return &clock{t: time.Unix(1_700_000_000, 0).UTC()} }

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) after(d time.Duration, f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.timers = append(c.timers, timer{c.t.Add(d), f})
}

// sleep moves the clock and runs the timers that come due, in their order.
func (c *clock) sleep(d time.Duration) {
	end := c.now().Add(d)
	for {
		c.mu.Lock()
		next := -1
		for i, t := range c.timers {
			if !t.at.After(end) && (next < 0 || t.at.Before(c.timers[next].at)) {
				next = i
			}
		}
		if next < 0 {
			c.t = end
			c.mu.Unlock()
			return
		}
		t := c.timers[next]
		c.timers = append(c.timers[:next], c.timers[next+1:]...)
		c.t = t.at
		c.mu.Unlock()
		t.f()
	}
}

func (c *clock) ms(n int) { c.sleep(time.Duration(n) * time.Millisecond) }

// recorder returns a Recorder that has the clock's time.
func (c *clock) recorder(s Sink) *Recorder {
	r := NewRecorder(s)
	r.now = c.now
	return r
}

func (c *clock) plain() (*Plain, *bytes.Buffer) {
	var b bytes.Buffer
	p := NewPlain(&b, Style{})
	p.now, p.after = c.now, c.after
	return p, &b
}

// say writes a step's output.
func say(s *Step, text string) { _, _ = s.Write([]byte(text)) }

func trimLines(s string) string {
	lines := strings.Split(s, "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	return strings.TrimRight(strings.Join(lines, "\n"), "\n") + "\n"
}
