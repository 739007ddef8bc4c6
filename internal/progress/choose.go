package progress

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/term"
)

// Display is a Sink that may hold something back, or hold a terminal, until it
// is closed. Close may be called once no more events come.
type Display interface {
	Sink
	Close() error
}

// Modes are the values that Choose knows, as for --progress.
func Modes() []string { return []string{"auto", "tty", "plain", "json", "rawjson", "quiet", "none"} }

// Mode is the mode that is meant: for auto, what the environment variable
// BUILDKIT_PROGRESS says, if anything.
func Mode(mode string, getenv func(string) string) (string, error) {
	v := getenv("BUILDKIT_PROGRESS")
	if v == "" || mode != "auto" && mode != "" {
		return mode, nil
	}
	if !slices.Contains(Modes(), v) {
		return "", fmt.Errorf("environment variable BUILDKIT_PROGRESS: %w", unknownMode(v))
	}
	return v, nil
}

func unknownMode(mode string) error {
	return fmt.Errorf("unknown progress mode %q: use one of %s", mode, strings.Join(Modes(), ", "))
}

// Choose returns the rendering that mode asks for, on w. auto is tty if w is a
// terminal that can move its cursor, else plain. getenv is asked for TERM and
// NO_COLOR.
func Choose(mode string, w io.Writer, verbose bool, getenv func(string) string) (Display, error) {
	f, isTerm := w.(*os.File)
	isTerm = isTerm && term.IsTerminal(int(f.Fd()))
	s := Style{NoColor: getenv("NO_COLOR") != "", Verbose: verbose}
	switch mode {
	case "auto", "":
		if !isTerm || getenv("TERM") == "dumb" {
			return NewPlain(w, s), nil
		}
		return newFileTTY(f, s), nil
	case "tty":
		if !isTerm {
			return nil, errors.New("progress mode \"tty\" needs a terminal, and there is none: use plain")
		}
		return newFileTTY(f, s), nil
	case "plain":
		return NewPlain(w, s), nil
	case "json":
		return NewJSON(w), nil
	case "rawjson":
		return NewRawJSON(w), nil
	case "quiet", "none":
		return NewQuiet(), nil
	}
	return nil, unknownMode(mode)
}

func newFileTTY(w *os.File, s Style) *TTY {
	size := func() (int, int) {
		cols, rows, err := term.GetSize(int(w.Fd()))
		if err != nil {
			return 0, 0
		}
		return cols, rows
	}
	return NewTTY(w, size, TTYOptions{Style: s})
}
