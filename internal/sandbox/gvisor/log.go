package gvisor

import (
	"bytes"
	"io"
	"iter"
	"strings"
	"sync"
)

// logSize is how much of a sentry's log is kept.
const logSize = 64 << 10

// sentryLog keeps the end of what a sentry writes to stderr: warnings, and the
// report of its crash.
type sentryLog struct {
	also io.Writer // nil, or gets everything

	mu      sync.Mutex
	buf     []byte // the end of the log; from the report of a crash on, its beginning
	crashed bool
}

// Write implements io.Writer.
func (l *sentryLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.also != nil {
		_, _ = l.also.Write(b) // a debug log that cannot be written must not stop the sentry
	}
	if l.crashed {
		l.buf = append(l.buf, b[:min(len(b), logSize-min(len(l.buf), logSize))]...)
		return len(b), nil
	}
	seen := max(0, len(l.buf)-16) // a mark may be torn in two
	l.buf = append(l.buf, b...)
	if i := crashStart(l.buf, seen); i >= 0 {
		l.crashed = true
		l.buf = l.buf[i:]
	} else if extra := len(l.buf) - logSize; extra > logSize {
		l.buf = append(l.buf[:0], l.buf[extra:]...)
	}
	return len(b), nil
}

// crashStart is where the Go runtime's report of a crash begins in b, at or
// after seen; -1 if there is none.
func crashStart(b []byte, seen int) int {
	for _, mark := range []string{"panic: ", "fatal error: ", "SIG"} {
		if seen == 0 && bytes.HasPrefix(b, []byte(mark)) {
			return 0
		}
		if i := bytes.Index(b[seen:], []byte("\n"+mark)); i >= 0 {
			return seen + i + 1
		}
	}
	return -1
}

// crash is the part that tells most: the beginning of a crash's report, else
// the last lines.
func (l *sentryLog) crash() string {
	const most = 12
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []string
	for line := range lines(string(l.buf)) {
		if strings.TrimSpace(line) != "" {
			all = append(all, line)
		}
	}
	if l.crashed {
		return strings.Join(all[:min(most, len(all))], "\n")
	}
	return strings.Join(all[max(len(all)-most, 0):], "\n")
}

func lines(s string) iter.Seq[string] { return strings.SplitSeq(s, "\n") }
