package cli

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/internal/cli/console"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

const referenceDir = "../../docs/reference"

// The command reference is made from the commands themselves: run this test
// with -update after a change.
func TestReference(t *testing.T) {
	root := newRootCommand(&App{console.Console{
		Streams: console.Streams{In: strings.NewReader(""), Out: io.Discard, Err: io.Discard},
		Getenv:  func(string) string { return "" },
	}})
	root.DisableAutoGenTag = true
	want := map[string]string{}
	var add func(*cobra.Command)
	add = func(c *cobra.Command) {
		if c.Name() == "help" || c.Hidden {
			return
		}
		var b bytes.Buffer
		if err := doc.GenMarkdown(c, &b); err != nil {
			t.Fatal(err)
		}
		want[strings.ReplaceAll(c.CommandPath(), " ", "_")+".md"] = b.String()
		for _, sub := range c.Commands() {
			add(sub)
		}
	}
	add(root)
	if *update {
		writeReference(t, want)
	}
	have, err := filepath.Glob(filepath.Join(referenceDir, "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range have {
		if _, ok := want[filepath.Base(f)]; !ok {
			t.Errorf("%s is about no command", f)
		}
	}
	for name, text := range want {
		b, err := os.ReadFile(filepath.Join(referenceDir, name))
		if err != nil || string(b) != text {
			t.Errorf("%s is out of date: run 'go test ./internal/cli -run TestReference -update' (%v)", name, err)
		}
	}
}

func writeReference(t *testing.T, want map[string]string) {
	t.Helper()
	if err := os.MkdirAll(referenceDir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range want {
		if err := os.WriteFile(filepath.Join(referenceDir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// Every command says what it is for, and every option what it does.
func TestCommandsAreExplained(t *testing.T) {
	root := newRootCommand(&App{console.Console{Getenv: func(string) string { return "" }}})
	for _, c := range root.Commands() {
		if c.Short == "" || c.Long == "" || c.GroupID == "" {
			t.Errorf("%s: no help, or in no group", c.CommandPath())
		}
		if strings.HasSuffix(c.Short, ".") {
			t.Errorf("%s: its short help ends with a period", c.CommandPath())
		}
		for _, l := range strings.Split(c.Long+"\n"+c.Example, "\n") {
			if len(l) > 95 {
				t.Errorf("%s: a line of its help has %d characters: %q", c.CommandPath(), len(l), l)
			}
		}
		if m := regexp.MustCompile(`(?m)^  kiln (\S+)`).FindAllStringSubmatch(c.Example, -1); m != nil {
			for _, s := range m {
				if _, _, err := root.Find([]string{s[1]}); err != nil {
					t.Errorf("%s: an example uses %q, which is none", c.CommandPath(), s[1])
				}
			}
		}
	}
}

// The documented exit codes are those that there are.
func TestExitCodesAreDocumented(t *testing.T) {
	b, err := os.ReadFile("../../docs/exit-codes.md")
	if err != nil {
		t.Fatal(err)
	}
	var have []string
	for _, m := range regexp.MustCompile(`(?m)^\| (\d+) \|`).FindAllStringSubmatch(string(b), -1) {
		have = append(have, m[1])
	}
	want := []string{}
	for _, code := range []int{
		diag.ExitOK, diag.ExitFailure, diag.ExitUsage, diag.ExitDockerfile, diag.ExitStep, diag.ExitRegistry,
		diag.ExitTimeout, diag.ExitSandbox, diag.ExitInterrupted,
	} {
		want = append(want, itoa(code))
	}
	if strings.Join(have, " ") != strings.Join(want, " ") {
		t.Errorf("documented: %v, want %v", have, want)
	}
}
