package diag

import (
	"context"
	"errors"
	"testing"
)

func TestEnded(t *testing.T) {
	at := &Location{File: "Dockerfile", Line: 4}
	placed := &Error{Err: errors.New("killed"), At: at, Code: ExitStep}
	late, interrupted, first := New(ExitTimeout, "too long"), New(ExitInterrupted, "interrupted"), &Error{Err: errors.New("first"), At: at, Code: ExitStep}
	for _, c := range []struct {
		name       string
		cause, err error
		want       string
		code       int
	}{
		{"goes on", nil, placed, "Dockerfile:4: killed", ExitStep},
		{"goes on, no error", nil, nil, "", ExitOK},
		{"timeout", late, errors.New("x"), "too long", ExitTimeout},
		{"timeout at a place", late, placed, "Dockerfile:4: too long", ExitTimeout},
		{"timeout that is told already", late, &Error{Err: late, At: at, Code: ExitTimeout}, "Dockerfile:4: too long", ExitTimeout},
		{"timeout, no error", late, nil, "too long", ExitTimeout},
		{"interrupted", interrupted, placed, "interrupted", ExitInterrupted},
		{"another failure", first, &Error{Err: errors.New("y"), At: &Location{File: "Dockerfile", Line: 9}}, "Dockerfile:4: first", ExitStep},
		{"cancelled", context.Canceled, placed, "context canceled", ExitFailure},
	} {
		ctx, cancel := context.WithCancelCause(t.Context())
		if c.cause != nil {
			cancel(c.cause)
		}
		got := Ended(ctx, c.err)
		text := ""
		if got != nil {
			text = got.Error()
		}
		if text != c.want || ExitCode(got) != c.code || c.cause != nil && !errors.Is(got, c.cause) {
			t.Errorf("%s: %q, exit code %d, want %q, %d", c.name, text, ExitCode(got), c.want, c.code)
		}
		cancel(nil)
	}
}
