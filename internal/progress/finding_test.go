package progress

import (
	"bytes"
	"strings"
	"testing"

	"github.com/hinshun/vt10x"

	"github.com/kiln-build/kiln/internal/diag"
)

var dockerfile = strings.Split("from scratch AS x\nCOPY a /\nRUN a \\\n  b\nCMD c\x1b[31m\n", "\n")

// warned reports two different findings, one of them twice.
func warned(r *Recorder) {
	load := r.Step("[internal] load build definition from Dockerfile", "")
	load.Start()
	casing := Finding{
		Text:   "FromAsCasing: 'AS' and 'from' keywords' casing do not match (line 1)",
		Detail: []string{"The 'as' keyword should match the case of the 'from' keyword"},
		URL:    "https://docs.docker.com/go/dockerfile/rule/from-as-casing/",
		At:     &diag.Location{File: "Dockerfile", Line: 1, EndLine: 1, Source: dockerfile},
	}
	load.Warn(casing)
	load.Warn(casing)
	load.Warn(Finding{Text: "Two: lines\nof \x1b[1mtext", At: &diag.Location{File: "Dockerfile", Line: 3, EndLine: 4, Source: dockerfile}})
	load.Done(nil)
}

func TestFindings(t *testing.T) {
	var s story
	for _, verbose := range []bool{false, true} {
		title := map[bool]string{false: "in short", true: "in full"}[verbose]
		c := newClock()
		p, out := c.plain()
		p.style.Verbose = verbose
		warned(c.recorder(p))
		_ = p.Close()
		s.add("plain, "+title, out.String())

		con := newConsole(t, 90, 40, TTYOptions{Style: Style{Verbose: verbose}})
		warned(con.Recorder)
		_ = con.tty.Close()
		s.add("terminal, "+title, con.screen())
		if con.term.Mode()&vt10x.ModeWrap == 0 {
			t.Error("the terminal is not left as it was found")
		}
	}
	golden(t, "findings.txt", s.b.String())
}

func TestFindingsInJSON(t *testing.T) {
	c := newClock()
	var b bytes.Buffer
	warned(c.recorder(NewJSON(&b)))
	golden(t, "findings.jsonl", b.String())
}
