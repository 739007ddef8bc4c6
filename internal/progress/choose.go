package progress

import (
	"errors"
	"fmt"
	"io"
	"os"
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
func Modes() []string { return []string{"auto", "tty", "plain", "json", "quiet"} }

// Choose returns the rendering that mode asks for, on w. auto is tty if w is a
// terminal that can move its cursor, else plain. getenv is asked for TERM and
// NO_COLOR.
func Choose(mode string, w io.Writer, getenv func(string) string) (Display, error) {
	f, isTerm := w.(*os.File)
	isTerm = isTerm && term.IsTerminal(int(f.Fd()))
	switch mode {
	case "auto", "":
		if !isTerm || getenv("TERM") == "dumb" {
			return NewPlain(w), nil
		}
		return newFileTTY(f, getenv), nil
	case "tty":
		if !isTerm {
			return nil, errors.New("progress mode \"tty\" needs a terminal, and there is none: use plain")
		}
		return newFileTTY(f, getenv), nil
	case "plain":
		return NewPlain(w), nil
	case "json":
		return NewJSON(w), nil
	case "quiet":
		return NewQuiet(), nil
	}
	return nil, fmt.Errorf("unknown progress mode %q: use one of %s", mode, strings.Join(Modes(), ", "))
}

func newFileTTY(w *os.File, getenv func(string) string) *TTY {
	size := func() (int, int) {
		cols, rows, err := term.GetSize(int(w.Fd()))
		if err != nil {
			return 0, 0
		}
		return cols, rows
	}
	return NewTTY(w, size, TTYOptions{NoColor: getenv("NO_COLOR") != ""})
}
