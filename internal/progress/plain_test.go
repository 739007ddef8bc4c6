package progress

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestPlainBuild(t *testing.T) {
	c := newClock()
	p, out := c.plain()
	r := c.recorder(p)
	r.Note("sandbox gvisor: no user namespace may be made here")
	r.Note("store /home/u/.local/share/kiln")
	load := r.Step("[internal] load build definition from Dockerfile", "")
	from := r.Step("[build 1/3] FROM docker.io/library/golang:1.26", "build")
	copied := r.Step("[build 2/3] COPY . .", "build")
	run := r.Step("[build 3/3] RUN make", "build")
	load.Start()
	c.ms(12)
	load.Done(nil)
	from.Start()
	for i := range 33 {
		from.Transfer("sha256:0123456789ab", int64(i)*1_250_000, 40_100_000)
		c.ms(100)
	}
	from.Transfer("sha256:0123456789ab", 40_100_000, 40_100_000)
	from.Transfer("sha256:0123456789ab", 40_100_000, 40_100_000)
	from.Transfer("small", 100, 100)
	from.Transfer("of unknown size", 5_000_000, 0)
	from.Done(nil)
	copied.Cached()
	run.Start()
	c.ms(123)
	say(run, "cc -o a a.c\ncc -o b")
	c.ms(10_000)
	say(run, " b.c\r\n\n")
	r.Warn("FromAsCasing: 'as' and 'FROM' keywords' casing do not match")
	say(run, "Reading package lists... 0%\r")
	c.ms(300)
	say(run, "Reading package lists... 50%\r\rReading package lists... Done\r\r\n")
	for i := range 25 {
		say(run, fmt.Sprintf("\rfetching %d%%", i*4))
		c.ms(100)
	}
	say(run, "\n\x1b[31mred\x1b[0m, as it came; no end of line")
	c.ms(100_000)
	run.Done(errors.New("process \"/bin/sh -c make\" did not complete successfully: exit code: 2"))
	_ = p.Close()
	golden(t, "plain-build.txt", out.String())
}

func TestPlainTakesTurns(t *testing.T) {
	c := newClock()
	p, out := c.plain()
	r := c.recorder(p)
	a, b, quick := r.Step("[a 1/1] RUN chatty", "a"), r.Step("[b 1/1] RUN chatty too", "b"), r.Step("[c 1/1] COPY x y", "c")
	a.Start()
	b.Start()
	for i := range 35 {
		say(a, fmt.Sprintf("a says %d\n", i))
		c.ms(100)
		say(b, fmt.Sprintf("b says %d\n", i))
		c.ms(100)
		if i == 5 {
			quick.Start()
			quick.Done(nil)
		}
	}
	say(a, "a waits")
	c.ms(60_000)
	b.Done(nil)
	a.Done(errors.New("context canceled"))
	_ = p.Close()
	golden(t, "plain-turns.txt", out.String())
}

// What waits for its turn must be seen although nothing else happens.
func TestPlainShowsWhatWaits(t *testing.T) {
	c := newClock()
	p, out := c.plain()
	r := c.recorder(p)
	a, b := r.Step("a", ""), r.Step("b", "")
	a.Start()
	say(a, "1\n")
	b.Start()
	say(b, "hello\n")
	if strings.Contains(out.String(), "hello") {
		t.Fatalf("b was shown in a's turn:\n%s", out)
	}
	c.ms(2000)
	if !strings.Contains(out.String(), "#2 0.000 hello\n") {
		t.Fatalf("b waits for ever:\n%s", out)
	}
}

func TestPlainHoldsLittle(t *testing.T) {
	c := newClock()
	p, out := c.plain()
	r := c.recorder(p)
	a, b := r.Step("a", ""), r.Step("b", "")
	a.Start()
	b.Start()
	long := strings.Repeat("x", 300_000)
	say(b, long)
	say(b, "end\n")
	if n := cap(p.steps[1].partial) + cap(p.steps[1].waiting); n > 1<<20 {
		t.Errorf("holds %d bytes of a line", n)
	}
	b.Done(nil)
	if !strings.Contains(out.String(), "#2 0.000 "+long+"end\n") {
		t.Errorf("the long line was changed")
	}
}

func TestPlainCloseWritesWhatIsHeld(t *testing.T) {
	c := newClock()
	p, out := c.plain()
	r := c.recorder(p)
	a, b := r.Step("a", ""), r.Step("b\nwith a \x1b]0;title\a second line", "")
	a.Start()
	b.Start()
	say(b, "of b\n")
	say(a, "cut off")
	_ = p.Close()
	c.ms(10_000)
	golden(t, "plain-close.txt", out.String())
}
