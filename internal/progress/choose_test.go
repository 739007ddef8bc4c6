package progress

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
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
		"json": "*progress.JSON", "quiet": "progress.Quiet",
	} {
		d, err := Choose(mode, f, env)
		if got := fmt.Sprintf("%T", d); err != nil || got != want {
			t.Errorf("%q: %s, %v; want %s", mode, got, err, want)
		}
	}
	for mode, want := range map[string]string{"tty": "needs a terminal", "fancy": "auto, tty, plain, json, quiet"} {
		if _, err := Choose(mode, f, env); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", mode, err, want)
		}
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
