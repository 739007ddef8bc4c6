package progress

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

func TestChooseOnAFile(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	env := func(string) string { return "" }
	for mode, want := range map[string]string{
		"": "*progress.Plain", "auto": "*progress.Plain", "plain": "*progress.Plain",
		"json": "*progress.JSON", "rawjson": "*progress.RawJSON", "quiet": "progress.quiet", "none": "progress.quiet",
	} {
		var d any
		d, err := Choose(mode, f, false, env)
		if u, ok := d.(unbuffered); ok {
			if d = u.Sink; d != (quiet{}) {
				d = d.(*Thin).next
			}
		}
		if got := fmt.Sprintf("%T", d); err != nil || got != want {
			t.Errorf("%q: %s, %v; want %s", mode, got, err, want)
		}
	}
	for mode, want := range map[string]string{"tty": "needs a terminal", "fancy": "auto, tty, plain, json, rawjson, quiet, none"} {
		if _, err := Choose(mode, f, false, env); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", mode, err, want)
		}
	}
}

func TestChooseByEnvironment(t *testing.T) {
	env := func(name string) string { return map[string]string{"BUILDKIT_PROGRESS": "rawjson"}[name] }
	for mode, want := range map[string]string{"auto": "rawjson", "": "rawjson", "plain": "plain"} {
		if got, err := Mode(mode, env); got != want || err != nil {
			t.Errorf("%q with BUILDKIT_PROGRESS=rawjson is %q, %v", mode, got, err)
		}
	}
	_, err := Mode("auto", func(string) string { return "fancy" })
	if err == nil || !strings.Contains(err.Error(), "BUILDKIT_PROGRESS") {
		t.Errorf("got %v", err)
	}
}

func TestJSON(t *testing.T) {
	c := newClock()
	var b bytes.Buffer
	r := c.recorder(NewJSON(&b))
	r.Note("a <note>")
	s := r.Step("[build 1/1] RUN make", "build")
	s.Start()
	say(s, "hi\xff\n")
	s.Transfer("context", 10, 20)
	c.ms(1500)
	s.Done(errors.New("exit code: 2"))
	r.Step("[2/2] COPY a b", "").Cached()
	r.Warn("careful")
	golden(t, "events.jsonl", b.String())
}

// A megabyte in pieces of 64 KiB is a few lines of JSON, the first and last among them.
func TestJSONIsThin(t *testing.T) {
	for name, open := range map[string]func(io.Writer) Display{"json": NewJSON, "rawjson": NewRawJSON} {
		c := newClock()
		var b bytes.Buffer
		r := c.recorder(open(&b))
		s := r.Step("pull", "")
		s.Start()
		const total = 1 << 20
		for n := int64(0); n <= total; n += 64 << 10 {
			s.Transfer("known", n, total)
			s.Transfer("unknown", n, 0)
			c.ms(40)
		}
		s.Done(nil)
		for _, item := range []string{"known", "unknown"} {
			var all []int64
			for line := range strings.Lines(b.String()) {
				m := regexp.MustCompile(`"(?:item|id)":"` + item + `".*?"current":(\d+)`).FindStringSubmatch(line)
				if m != nil {
					n, _ := strconv.ParseInt(m[1], 10, 64)
					all = append(all, n)
				}
			}
			if len(all) < 3 || len(all) > 7 || all[len(all)-1] != total {
				t.Errorf("%s: %q is reported at %d", name, item, all)
			}
		}
	}
}
