package diag_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/kiln-build/kiln/internal/diag"
)

func TestMessage(t *testing.T) {
	inner := &diag.Error{Err: errors.New("exit code: 7"), At: &diag.Location{File: "Dockerfile", Line: 3}}
	for want, err := range map[string]error{
		"plain":               errors.New("plain"),
		"exit code: 7":        inner,
		"build: exit code: 7": fmt.Errorf("build: %w", inner),
		"outer: exit code: 7": &diag.Error{Err: fmt.Errorf("outer: %w", inner), At: &diag.Location{File: "other", Line: 1}},
		"no file":             &diag.Error{Err: errors.New("no file"), At: &diag.Location{Line: 3}},
	} {
		if got := diag.Message(err); got != want {
			t.Errorf("%v: %q, want %q", err, got, want)
		}
	}
}
