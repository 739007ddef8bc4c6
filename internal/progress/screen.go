package progress

import (
	"time"
	"unicode/utf8"
)

// maxLineRunes bounds one line of a screen: what is longer is cut, not wrapped.
const maxLineRunes = 1024

// screen turns what a command writes for a terminal into its last lines of
// text, so that they can be shown elsewhere: it obeys the carriage returns,
// cursor movements and erasures that progress bars are made of, and drops every
// other control and escape sequence. Its memory is bounded by rows and
// maxLineRunes, whatever is written.
type screen struct {
	rows  int
	lines []screenLine
	y, x  int // cursor: index into lines, and of a rune in the line

	state  parseState
	params [4]int
	param  int // index into params
	held   []byte
}

type screenLine struct {
	text []rune
	at   time.Time // when its first rune came
}

type parseState uint8

const (
	ground    parseState = iota
	escape               // after ESC
	escSkip              // after ESC and an intermediate byte: one more byte
	csi                  // after ESC [
	csiIgnore            // in a CSI sequence that is not obeyed
	str                  // in an OSC, DCS, SOS, PM or APC string: until BEL or ST
	strEscape            // in such a string, after ESC
)

func newScreen(rows int) *screen { return &screen{rows: rows} }

// write feeds output that came at the time at.
func (s *screen) write(p []byte, at time.Time) {
	if len(s.held) > 0 {
		p = append(s.held, p...)
		s.held = nil
	}
	for len(p) > 0 {
		if p[0] < utf8.RuneSelf {
			s.feed(rune(p[0]), at)
			p = p[1:]
			continue
		}
		if !utf8.FullRune(p) {
			s.held = append([]byte(nil), p...)
			return
		}
		r, n := utf8.DecodeRune(p)
		s.feed(r, at)
		p = p[n:]
	}
}

// text returns the lines from the first to the last that is not empty.
func (s *screen) text() []screenLine {
	n := len(s.lines)
	for n > 0 && len(s.lines[n-1].text) == 0 {
		n--
	}
	return s.lines[:n]
}

func (s *screen) feed(r rune, at time.Time) {
	switch s.state {
	case ground:
		s.control(r, at)
	case escape:
		s.afterEscape(r)
	case escSkip:
		s.state = ground
	case csi, csiIgnore:
		s.inCSI(r, at)
	case str:
		switch r {
		case 0x07, 0x18, 0x1a, 0x9c:
			s.state = ground
		case 0x1b:
			s.state = strEscape
		}
	case strEscape:
		s.state = ground
		if r != '\\' {
			s.afterEscape(r)
		}
	}
}

func (s *screen) afterEscape(r rune) {
	s.state = ground
	switch {
	case r == 0x1b:
		s.state = escape
	case r == '[':
		s.state, s.params, s.param = csi, [4]int{}, 0
	case r == ']', r == 'P', r == 'X', r == '^', r == '_':
		s.state = str
	case r >= 0x20 && r <= 0x2f:
		s.state = escSkip
	}
}

func (s *screen) inCSI(r rune, at time.Time) {
	switch {
	case r >= '0' && r <= '9':
		if v := &s.params[s.param]; *v < maxLineRunes {
			*v = *v*10 + int(r-'0')
		}
	case r == ';' || r == ':':
		if s.param < len(s.params)-1 {
			s.param++
		}
	case r >= 0x20 && r <= 0x3f: // private markers and intermediates
		s.state = csiIgnore
	case r >= 0x40 && r <= 0x7e:
		if s.state == csi {
			s.obey(r)
		}
		s.state = ground
	case r == 0x1b:
		s.state = escape
	case r == 0x18 || r == 0x1a:
		s.state = ground
	case r < 0x20: // controls act inside a sequence, as terminals have it
		state := s.state
		s.control(r, at)
		s.state = state
	default:
		s.state = ground
	}
}

// obey carries out the CSI sequences that progress bars use.
func (s *screen) obey(final rune) {
	n := max(s.params[0], 1)
	switch final {
	case 'A', 'F':
		s.y = max(s.y-n, 0)
	case 'B', 'E':
		s.y = min(s.y+n, len(s.lines))
	case 'C':
		s.x = min(s.x+n, maxLineRunes)
	case 'D':
		s.x = max(s.x-n, 0)
	case 'G':
		s.x = min(n-1, maxLineRunes)
	case 'H', 'f':
		s.y, s.x = min(n-1, len(s.lines)), min(max(s.params[1], 1)-1, maxLineRunes)
	case 'K':
		s.eraseLine(s.params[0])
	case 'J':
		s.eraseScreen(s.params[0])
	}
	if final == 'E' || final == 'F' {
		s.x = 0
	}
}

func (s *screen) eraseLine(how int) {
	if s.y >= len(s.lines) {
		return
	}
	l := &s.lines[s.y]
	switch how {
	case 0:
		l.text = l.text[:min(s.x, len(l.text))]
	case 1:
		for i := range min(s.x+1, len(l.text)) {
			l.text[i] = ' '
		}
	case 2:
		l.text = l.text[:0]
	}
}

func (s *screen) eraseScreen(how int) {
	switch how {
	case 0:
		s.eraseLine(0)
		if s.y+1 < len(s.lines) {
			s.lines = s.lines[:s.y+1]
		}
	case 2, 3:
		s.lines, s.y, s.x = nil, 0, 0
	}
}

func (s *screen) control(r rune, at time.Time) {
	switch r {
	case 0x1b:
		s.state = escape
	case '\n', '\v', '\f':
		s.line(at) // an empty line is a line
		s.y, s.x = s.y+1, 0
	case '\r':
		s.x = 0
	case '\b':
		s.x = max(s.x-1, 0)
	case '\t':
		for next := s.x + 8 - s.x%8; s.x < next && s.x < maxLineRunes; {
			s.put(' ', at)
		}
	default:
		if printable(r) {
			s.put(r, at)
		}
	}
}

// line makes sure that the cursor's line exists and returns it.
func (s *screen) line(at time.Time) *screenLine {
	for s.y >= s.rows {
		if len(s.lines) > 0 {
			n := copy(s.lines, s.lines[1:])
			s.lines = s.lines[:n]
		}
		s.y--
	}
	for len(s.lines) <= s.y {
		s.lines = append(s.lines, screenLine{at: at})
	}
	return &s.lines[s.y]
}

func (s *screen) put(r rune, at time.Time) {
	l := s.line(at)
	if s.x >= maxLineRunes {
		return
	}
	if len(l.text) == 0 {
		l.at = at
	}
	for len(l.text) < s.x {
		l.text = append(l.text, ' ')
	}
	if s.x < len(l.text) {
		l.text[s.x] = r
	} else {
		l.text = append(l.text, r)
	}
	s.x++
}
