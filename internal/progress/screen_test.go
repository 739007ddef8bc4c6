package progress

import (
	"strings"
	"testing"
	"time"
	"unicode"
)

func screenText(rows int, chunks ...string) string {
	s := newScreen(rows)
	for _, c := range chunks {
		s.write([]byte(c), time.Time{})
	}
	var lines []string
	for _, l := range s.text() {
		lines = append(lines, string(l.text))
	}
	return strings.Join(lines, "|")
}

func TestScreen(t *testing.T) {
	for name, c := range map[string]struct {
		in   []string
		want string
	}{
		"lines":                {[]string{"a\nb", "c\n"}, "a|bc"},
		"empty lines":          {[]string{"a\n\nb\n"}, "a||b"},
		"last lines only":      {[]string{"1\n2\n3\n4\n5"}, "3|4|5"},
		"carriage return":      {[]string{"50%\r100%\r\ndone"}, "100%|done"},
		"shorter overwrite":    {[]string{"abcdef\rXY"}, "XYcdef"},
		"erase line":           {[]string{"abcdef\r\x1b[Kxy"}, "xy"},
		"erase whole line":     {[]string{"abcdef\x1b[2K\rxy"}, "xy"},
		"backspace":            {[]string{"abc\b\bX"}, "aXc"},
		"tab":                  {[]string{"a\tb"}, "a       b"},
		"colour":               {[]string{"\x1b[1;31mred\x1b[0m \x1b[38;5;12mx\x1b[m"}, "red x"},
		"colour in pieces":     {[]string{"\x1b", "[1;", "31", "mred"}, "red"},
		"title":                {[]string{"\x1b]0;title\x07a\x1b]2;t\x1b\\b"}, "ab"},
		"title in pieces":      {[]string{"\x1b]0;ti", "tle\x1b", "\\a"}, "a"},
		"device control":       {[]string{"\x1bP+q544e\x1b\\a"}, "a"},
		"private mode":         {[]string{"\x1b[?1049ha\x1b[?25l"}, "a"},
		"query":                {[]string{"\x1b[6n\x1b[c\x1b[>0qa"}, "a"},
		"charset":              {[]string{"\x1b(0a\x1b)B"}, "a"},
		"8-bit controls":       {[]string{"\u009b31ma\u009d0;x\u009c\x9b2J"}, "31ma0;x\ufffd2J"},
		"two progress bars":    {[]string{"a 0%\nb 0%\n\x1b[2Aa 1%\n\x1b[Bc\n"}, "a 1%|b 0%|c"},
		"clear screen":         {[]string{"a\nb\x1b[2J\x1b[Hc"}, "c"},
		"rune in pieces":       {[]string{"\xe4\xb8", "\x96x"}, "世x"},
		"not UTF-8":            {[]string{"\xff\xfea"}, "\ufffd\ufffda"},
		"bidi override":        {[]string{"a\u202eb\u2066c"}, "abc"},
		"cursor far away":      {[]string{"\x1b[999999999999Ca\x1b[99999999A\x1b[9999Db"}, "b"},
		"unfinished":           {[]string{"a\x1b[31"}, "a"},
		"escape in a sequence": {[]string{"\x1b[3\x1b[31ma"}, "a"},
	} {
		if got := screenText(3, c.in...); got != c.want {
			t.Errorf("%s: %q shows %q, want %q", name, c.in, got, c.want)
		}
	}
}

func TestClean(t *testing.T) {
	for in, want := range map[string]string{
		"RUN make":                       "RUN make",
		"RUN a\n\tb":                     "RUN a  b",
		"\x1b[2Jx\x1b]0;t\x07y\u009bz\r": "xyz",
		"a\xffb":                         "a\ufffdb",
		"世界\u202e!":                      "世界!",
		"x\x1b]never ended":              "x",
	} {
		if got := Clean(in); got != want {
			t.Errorf("Clean(%q) = %q, want %q", in, got, want)
		}
	}
}

func FuzzScreen(f *testing.F) {
	for _, s := range []string{"a\rb\n", "\x1b[3A\x1b[2K\x1b[10;10Hx", "\x1b]0;t\x1b\\", "\xe4\xb8", "\x1b[1;2;3;4;5;6m"} {
		f.Add([]byte(s), 2)
	}
	f.Fuzz(func(t *testing.T, p []byte, n int) {
		s := newScreen(4)
		n = max(1, min(n, len(p)+1))
		for rest := p; len(rest) > 0; {
			k := min(n, len(rest))
			s.write(rest[:k], time.Time{})
			rest = rest[k:]
		}
		if len(s.lines) > 4 || len(s.held) > 3 {
			t.Fatalf("%d lines, %d bytes held", len(s.lines), len(s.held))
		}
		for _, l := range s.text() {
			if len(l.text) > maxLineRunes {
				t.Fatalf("a line of %d runes", len(l.text))
			}
			for _, r := range l.text {
				if unicode.IsControl(r) {
					t.Fatalf("%q is shown", r)
				}
			}
		}
		if c := Clean(string(p)); strings.IndexFunc(c, unicode.IsControl) >= 0 {
			t.Fatalf("Clean leaves %q", c)
		}
	})
}
