package console

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/internal/diag"
)

var update = flag.Bool("update", false, "write golden files anew")

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

func TestPrintError(t *testing.T) {
	lines := strings.Split("FROM a AS build\nARG X\n\nRUN x\nCOPY . .\n\nRUN make \\\n  all\n\tUSER u\r\n\x1b]0;t\aCMD x", "\n")
	at := func(first, last int) *diag.Location {
		return &diag.Location{File: "Dockerfile", Line: first, EndLine: last, Source: lines}
	}
	inner := &diag.Error{Err: errors.New("exit code: 2"), Hint: "inner hint", Code: diag.ExitStep}
	var b strings.Builder
	for _, c := range []struct {
		name string
		err  error
	}{
		{"plain", errors.New("no reason")},
		{"one line", &diag.Error{Err: errors.New("exit code: 2"), At: at(5, 5), Hint: "Do it."}},
		{"some lines", &diag.Error{Err: errors.New("exit code: 2"), At: at(7, 8)}},
		{"first", &diag.Error{Err: errors.New("no such image"), At: at(1, 0)}},
		{"last", &diag.Error{Err: errors.New("bad"), At: at(10, 99)}},
		{"outside", &diag.Error{Err: errors.New("bad"), At: at(11, 11)}},
		{"inner details", fmt.Errorf("build app: %w", &diag.Error{Err: inner, At: at(4, 4)})},
		{"controls and lines", errors.New("registry said\n\x1b[2J\x1b]0;x\amore\n")},
	} {
		fmt.Fprintf(&b, "== %s\n", c.name)
		PrintError(&b, c.err)
	}
	golden(t, "errors.txt", b.String())
}
