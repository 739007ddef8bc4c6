// Package diag holds the one error type that carries what a user needs to act:
// what failed, where in the Dockerfile, what to do, and the exit code. It is
// printed in a single place (cli).
package diag

import (
	"errors"
	"fmt"
	"strings"
)

// Exit codes of the kiln command, documented in docs/exit-codes.md.
const (
	ExitOK          = 0
	ExitFailure     = 1   // anything without a code of its own
	ExitUsage       = 2   // unknown flag, bad argument
	ExitDockerfile  = 3   // the Dockerfile, or what it names in the context, is wrong
	ExitStep        = 4   // a RUN step failed
	ExitRegistry    = 5   // a registry refused or could not be reached
	ExitTimeout     = 6   // --timeout passed
	ExitSandbox     = 7   // the sandbox could not be started here
	ExitInterrupted = 130 // SIGINT or SIGTERM
)

// Location is a place in a Dockerfile.
type Location struct {
	File    string   `json:"file"`
	Line    int      `json:"line"`    // first line, from 1
	EndLine int      `json:"endLine"` // last line, inclusive
	Source  []string `json:"-"`       // all lines of the file, for an excerpt; may be nil
}

// Error is an error that tells its user what to do.
type Error struct {
	Err  error     // what failed
	At   *Location // where, if it has to do with a Dockerfile line
	Hint string    // what to do, a sentence; may be empty
	Code int       // exit code; 0: ExitFailure
}

func (e *Error) Error() string {
	if e.At != nil && e.At.File != "" {
		return fmt.Sprintf("%s:%d: %v", e.At.File, e.At.Line, e.Err)
	}
	return e.Err.Error()
}

func (e *Error) Unwrap() error { return e.Err }

// Message is what an error says without the places in Dockerfiles, for those who show the lines.
func Message(err error) string {
	s := err.Error()
	var d *Error
	for e := err; errors.As(e, &d); e = d.Err {
		if d.At != nil && d.At.File != "" {
			s = strings.Replace(s, d.Error(), d.Err.Error(), 1)
		}
	}
	return s
}

// New returns an Error with an exit code.
func New(code int, format string, a ...any) *Error {
	return &Error{Err: fmt.Errorf(format, a...), Code: code}
}

// WithHint sets the hint.
func (e *Error) WithHint(format string, a ...any) *Error {
	e.Hint = fmt.Sprintf(format, a...)
	return e
}

// ExitCode is the exit code for err: of the outermost Error in its chain that has one.
func ExitCode(err error) int {
	if err == nil {
		return ExitOK
	}
	for e := err; e != nil; {
		var d *Error
		if !errors.As(e, &d) {
			break
		}
		if d.Code != 0 {
			return d.Code
		}
		e = d.Err
	}
	return ExitFailure
}
