package progress

import (
	"bytes"
	"errors"
	"fmt"
	"testing"
)

func TestFailures(t *testing.T) {
	c := newClock()
	var next bytes.Buffer
	f := NewFailures(NewJSON(&next))
	r := c.recorder(f)
	ok, silent := r.Step("[1/4] RUN fine", ""), r.Step("[2/4] COPY nothing /", "")
	bad, gone := r.Step("[build 3/4] RUN make", ""), r.Step("[4/4] RUN other", "")
	for _, s := range []*Step{ok, silent, bad, gone} {
		s.Start()
	}
	say(ok, "not to be repeated\n")
	say(gone, "nor this\n")
	for i := range 60 {
		c.ms(100)
		say(bad, fmt.Sprintf("line %d \x1b[31mred\x1b]0;title\a\n", i))
	}
	say(bad, "10%\r20%\rerror: no end of line")
	ok.Done(nil)
	silent.Done(errors.New(`"/nothing": not found`))
	bad.Done(errors.New("exit code: 2"))
	gone.Done(errors.New("context canceled"))
	var b bytes.Buffer
	if err := f.Report(&b); err != nil {
		t.Fatal(err)
	}
	golden(t, "failures.txt", b.String())
	if len(f.steps) != 0 {
		t.Errorf("%d steps that are done are kept", len(f.steps))
	}
	if n := bytes.Count(next.Bytes(), []byte("\n")); n != 4+4+63+4 {
		t.Errorf("%d events were handed on", n)
	}
}
