package progress

import (
	"fmt"
	"strings"
	"time"
	"unicode"

	"github.com/docker/go-units"
	"golang.org/x/text/width"
)

// printable reports whether r may be shown on a terminal as it is: no control,
// no invisible format character that could reorder or hide text.
func printable(r rune) bool {
	if r < 0x7f {
		return r >= 0x20
	}
	const zeroWidthJoiner = '\u200d'
	return r == zeroWidthJoiner || !unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp)
}

// Clean makes text from outside fit for one line of a terminal: line breaks
// and tabs become spaces, escape sequences and other controls vanish.
func Clean(s string) string {
	if strings.IndexFunc(s, func(r rune) bool { return !printable(r) }) < 0 {
		return strings.ToValidUTF8(s, "\ufffd")
	}
	// A screen knows where escape sequences end.
	scr := newScreen(1)
	var b strings.Builder
	for _, r := range s {
		if scr.state == ground && (r == '\n' || r == '\t') {
			r = ' '
		}
		was := scr.state
		scr.feed(r, time.Time{})
		if was == ground && printable(r) {
			b.WriteRune(r)
		}
	}
	return b.String()
}

// runeWidth is the number of terminal columns that r takes.
func runeWidth(r rune) int {
	switch {
	case r < 0x300:
		return 1
	case unicode.In(r, unicode.Mn, unicode.Me, unicode.Cf):
		return 0
	}
	switch width.LookupRune(r).Kind() {
	case width.EastAsianWide, width.EastAsianFullwidth:
		return 2
	}
	return 1
}

func textWidth(s string) int {
	n := 0
	for _, r := range s {
		n += runeWidth(r)
	}
	return n
}

// cut returns as much of the beginning of s as fits in cols columns.
func cut(s string, cols int) string {
	n := 0
	for i, r := range s {
		n += runeWidth(r)
		if n > cols {
			return s[:i]
		}
	}
	return s
}

// size shows a number of bytes as docker does: "12.5MB".
func size(n int64) string { return units.HumanSizeWithPrecision(float64(max(n, 0)), 3) }

// amount shows how much of something has been moved.
func amount(current, total int64) string {
	switch {
	case total > 0:
		return size(current) + " / " + size(total)
	case current > 0:
		return size(current)
	}
	return "" // something that is done, and nothing that is moved
}

// speed shows bytes per second; empty if too little time has passed to tell.
func speed(n int64, d time.Duration) string {
	if d < 10*time.Millisecond || n <= 0 {
		return ""
	}
	return size(int64(float64(n)/d.Seconds())) + "/s"
}

// seconds shows a duration to a tenth of a second.
func seconds(d time.Duration) string { return fmt.Sprintf("%.1fs", max(d, 0).Seconds()) }

// stamp shows the time of an output line since its step began, always about
// five characters.
func stamp(d time.Duration) string {
	prec := 1
	switch sec := max(d, 0).Seconds(); {
	case sec < 10:
		prec = 3
	case sec < 100:
		prec = 2
	}
	return fmt.Sprintf("%.*f", prec, max(d, 0).Seconds())
}
