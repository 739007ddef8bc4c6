package frontend

import (
	"errors"
	"fmt"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/solver/errdefs"

	"github.com/kiln-build/kiln/internal/diag"
)

// said is an error in other words.
type said struct {
	error
	text string
}

func (s *said) Error() string { return s.text }

func (s *said) Unwrap() error { return s.error }

// explain turns the front end's error into ours, with its place in the Dockerfile
// of that name.
func explain(err error, filename string) error {
	var have *diag.Error
	code, hint := diag.ExitDockerfile, ""
	if errors.As(err, &have) {
		code, hint = have.Code, have.Hint
		if have.At != nil {
			return err
		}
	}
	e := &diag.Error{Err: err, Code: code, Hint: hint}
	for _, s := range errdefs.Sources(err) {
		if s.Info == nil || len(s.Ranges) == 0 {
			continue
		}
		r := s.Ranges[0]
		e.At = &diag.Location{
			File: s.Info.Filename, Line: int(r.GetStart().GetLine()), EndLine: int(r.GetEnd().GetLine()),
			Source: strings.Split(string(s.Info.Data), "\n"),
		}
	}
	var le *parser.LocationError
	if e.At == nil && errors.As(err, &le) && len(le.Locations) > 0 && len(le.Locations[0]) > 0 {
		r := le.Locations[0][0]
		e.At = &diag.Location{File: filename, Line: r.Start.Line, EndLine: r.End.Line}
	}
	if e.At != nil { // once is enough
		if text, ok := strings.CutPrefix(err.Error(), fmt.Sprintf("dockerfile parse error on line %d: ", e.At.Line)); ok {
			e.Err = &said{err, text}
		}
	}
	return e
}
