package console

import (
	"errors"
	"io"
	"strings"
	"syscall"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/progress"
)

// PrintError writes err for its user: the lines of the Dockerfile that it is
// about, what failed, and what to do. Control characters from outside (a
// registry's answer, a file's content) are left out.
func PrintError(w io.Writer, err error) {
	var b strings.Builder
	at, hint := details(err)
	if hint == "" {
		hint = diskHint(err)
	}
	if at != nil {
		progress.Excerpt(&b, at)
	}
	lines := strings.Split(strings.TrimRight(err.Error(), "\n"), "\n")
	for i, l := range lines {
		lead := "  "
		if i == 0 {
			lead = "ERROR: "
		}
		b.WriteString(strings.TrimRight(lead+progress.Clean(l), " ") + "\n")
	}
	if hint != "" {
		b.WriteString("hint: " + progress.Clean(hint) + "\n")
	}
	_, _ = io.WriteString(w, b.String())
}

// details are the place and the hint nearest to the outside of err's chain.
func details(err error) (at *diag.Location, hint string) {
	for err != nil {
		var d *diag.Error
		if !errors.As(err, &d) {
			break
		}
		if at == nil {
			at = d.At
		}
		if hint == "" {
			hint = d.Hint
		}
		err = d.Err
	}
	return at, hint
}

// diskHint is for a full disk that whoever found it had nothing to say about.
func diskHint(err error) string {
	if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) {
		return ""
	}
	return "The disk is full. If it is the store's, `kiln prune` removes what no image needs, and --root names another."
}
