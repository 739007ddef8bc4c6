package frontend

import (
	"errors"
	"fmt"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"

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
		if at := place(s.Info, s.Ranges); at != nil {
			e.At = at
		}
	}
	var le *parser.LocationError
	if e.At == nil && errors.As(err, &le) && len(le.Locations) > 0 && len(le.Locations[0]) > 0 {
		rs := le.Locations[0]
		e.At = &diag.Location{File: filename, Line: rs[0].Start.Line, EndLine: rs[len(rs)-1].End.Line}
	}
	if e.At != nil {
		if text := withoutLine(err.Error(), e.At); text != err.Error() {
			e.Err = &said{err, text}
		}
	}
	return e
}

// Verbatim is a message with what the front end said as it said it, if err comes from there: with the line. It is
// for those who look for the words of BuildKit's.
func Verbatim(err error, message string) string {
	var s *said
	if errors.As(err, &s) {
		return strings.Replace(message, s.text, s.error.Error(), 1)
	}
	return message
}

// withoutLine is a message without the line that it begins with: once is enough.
func withoutLine(message string, at *diag.Location) string {
	return strings.TrimPrefix(message, fmt.Sprintf("dockerfile parse error on line %d: ", at.Line))
}

// place is where something is in a Dockerfile; nil if that is not known. The
// front end gives a range for each line of an instruction.
func place(info *pb.SourceInfo, ranges []*pb.Range) *diag.Location {
	if info == nil || len(ranges) == 0 {
		return nil
	}
	return &diag.Location{
		File: info.Filename, Source: strings.Split(string(info.Data), "\n"),
		Line: int(ranges[0].GetStart().GetLine()), EndLine: int(ranges[len(ranges)-1].GetEnd().GetLine()),
	}
}
