package progress

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/kiln-build/kiln/internal/diag"
)

// Style is how displays for people differ.
type Style struct {
	NoColor bool
	Verbose bool // findings with all that is known of them
}

// findings collects what is repeated at a build's end, each once.
type findings struct {
	all  []Finding
	seen map[string]bool
}

func (f *findings) add(n Finding) {
	key := n.Text + "\x00" + n.URL
	if n.At != nil {
		key += fmt.Sprintf("\x00%s:%d", n.At.File, n.At.Line)
	}
	if f.seen[key] {
		return
	}
	if f.seen == nil {
		f.seen = map[string]bool{}
	}
	f.seen[key] = true
	f.all = append(f.all, n)
}

// write lists them as buildx does: a line for each, or, if verbose, with the
// explanation, where to read more, and the lines of the Dockerfile.
func (f *findings) write(w io.Writer, verbose bool, c styles) {
	if len(f.all) == 0 {
		return
	}
	head := fmt.Sprintf("%d warnings found", len(f.all))
	if len(f.all) == 1 {
		head = "1 warning found"
	}
	more := func(n Finding) bool { return len(n.Detail) > 0 || n.URL != "" || n.At != nil }
	if !verbose && slices.ContainsFunc(f.all, more) {
		head += " (use --debug to expand)"
	}
	fmt.Fprintf(w, "\n %s\n", c.apply(c.canceled, head+":"))
	for _, n := range f.all {
		fmt.Fprintf(w, " - %s\n", Clean(n.Text))
		if !verbose {
			continue
		}
		for _, d := range n.Detail {
			fmt.Fprintf(w, "%s\n", Clean(d))
		}
		if n.URL != "" {
			fmt.Fprintf(w, "More info: %s\n", Clean(n.URL))
		}
		if n.At != nil {
			Excerpt(w, n.At)
		}
		fmt.Fprintln(w)
	}
}

// Excerpt shows the lines of at with some around them, in BuildKit's form.
func Excerpt(w io.Writer, at *diag.Location) {
	first, last := at.Line, max(at.EndLine, at.Line)
	if first < 1 || first > len(at.Source) {
		return
	}
	last = min(last, len(at.Source))
	around := 2
	if first != last {
		around = 1
	}
	fmt.Fprintf(w, "%s:%d\n--------------------\n", Clean(at.File), first)
	for n := max(first-around, 1); n <= min(last+around, len(at.Source)); n++ {
		mark := "   "
		if n >= first && n <= last {
			mark = ">>>"
		}
		line := Clean(strings.TrimRight(at.Source[n-1], "\r\n"))
		fmt.Fprintln(w, strings.TrimRight(fmt.Sprintf(" %3d | %s %s", n, mark, line), " "))
	}
	fmt.Fprintln(w, "--------------------")
}
