package gvisor

import (
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

	mu  sync.Mutex
	buf []byte
}

// Write implements io.Writer.
func (l *sentryLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.also != nil {
		_, _ = l.also.Write(b) // a debug log that cannot be written must not stop the sentry
	}
	l.buf = append(l.buf, b...)
	if extra := len(l.buf) - logSize; extra > logSize {
		l.buf = append(l.buf[:0], l.buf[extra:]...)
	}
	return len(b), nil
}

// crash is the part that tells most: from a panic on, else the last lines.
func (l *sentryLog) crash() string {
	const most = 12
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []string
	start := -1
	for line := range lines(string(l.buf)) {
		if strings.TrimSpace(line) == "" {
			continue
		}
		if start < 0 && (strings.HasPrefix(line, "panic:") || strings.HasPrefix(line, "fatal error:") || strings.HasPrefix(line, "SIG")) {
			start = len(all)
		}
		all = append(all, line)
	}
	if start < 0 {
		start = max(len(all)-most, 0)
	}
	return strings.Join(all[start:min(start+most, len(all))], "\n")
}

func lines(s string) iter.Seq[string] { return strings.SplitSeq(s, "\n") }
