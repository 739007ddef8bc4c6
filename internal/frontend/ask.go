package frontend

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/builder"
	"github.com/moby/buildkit/frontend/subrequests"
	"github.com/moby/buildkit/frontend/subrequests/lint"
	"github.com/moby/buildkit/frontend/subrequests/outline"
	"github.com/moby/buildkit/frontend/subrequests/targets"
	"github.com/moby/buildkit/solver/pb"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/progress"
)

// Question is what can be asked about a Dockerfile without building it.
type Question string

// The questions that BuildKit's front end answers, by its names for them.
const (
	Lint     Question = "lint"    // what is better not done so
	Outline  Question = "outline" // arguments, secrets and SSH keys that a target takes
	Targets  Question = "targets" // its stages
	Describe Question = "subrequests.describe"
)

// Questions are all of them.
func Questions() []Question { return []Question{Lint, Outline, Targets, Describe} }

// Answer is the front end's to a Question.
type Answer struct {
	Question Question
	JSON     []byte // as the front end formats it
	Text     []byte // what the front end says itself, which Print goes without; may be empty
	Status   int    // 0: nothing to complain about
}

// Ask asks the front end instead of planning a build.
func Ask(ctx context.Context, in Input, q Question, sources Sources, rec *progress.Recorder) (*Answer, error) {
	c := newClient(in, sources, rec)
	c.opts["requestid"] = "frontend." + string(q)
	defer func() { c.step.Done(nil) }()
	res, err := builder.Build(ctx, c)
	if err != nil {
		return nil, explain(err, in.Filename)
	}
	a := &Answer{Question: q, JSON: res.Metadata["result.json"], Text: res.Metadata["result.txt"]}
	if a.JSON == nil {
		return nil, fmt.Errorf("the front end gave no answer to %q", q)
	}
	if s, ok := res.Metadata["result.statuscode"]; ok {
		if a.Status, err = strconv.Atoi(string(s)); err != nil {
			return nil, fmt.Errorf("the front end's status code: %w", err)
		}
	}
	return a, nil
}

// Print writes the answer as `docker buildx build --call` prints it, without control
// characters of the Dockerfile's. The Dockerfile is called name in it.
func (a *Answer) Print(w io.Writer, name string) error {
	var (
		b   bytes.Buffer
		err error
	)
	switch a.Question {
	case Lint:
		err = a.printLint(&b, name)
	case Outline:
		err = outline.PrintOutline(a.JSON, &b)
	case Targets:
		err = targets.PrintTargets(a.JSON, &b)
	default:
		err = subrequests.PrintDescribe(a.JSON, &b)
	}
	if err != nil {
		return fmt.Errorf("read the front end's answer: %w", err)
	}
	return printClean(w, b.String())
}

// PrintText writes the answer in the front end's own words, as `buildctl build --opt requestid=…` does.
func (a *Answer) PrintText(w io.Writer) error { return printClean(w, string(a.Text)) }

// printClean writes lines without control characters but tabs.
func printClean(w io.Writer, text string) error {
	for line := range strings.Lines(text) {
		fields := strings.Split(strings.TrimSuffix(line, "\n"), "\t") // which Clean would make spaces
		for i := range fields {
			fields[i] = progress.Clean(fields[i])
		}
		if _, err := fmt.Fprintln(w, strings.Join(fields, "\t")); err != nil {
			return fmt.Errorf("write output: %w", err)
		}
	}
	return nil
}

func (a *Answer) printLint(b *bytes.Buffer, name string) error {
	var r lint.LintResults
	if err := json.Unmarshal(a.JSON, &r); err != nil {
		return err
	}
	renamed := func(s *pb.SourceInfo) *pb.SourceInfo {
		if s == nil {
			return nil
		}
		return &pb.SourceInfo{Filename: name, Data: s.Data, Language: s.Language}
	}
	switch n := len(r.Warnings); {
	case n == 1:
		fmt.Fprintln(b, "Check complete, 1 warning has been found!")
	case n > 1:
		fmt.Fprintf(b, "Check complete, %d warnings have been found!\n", n)
	case r.Error == nil:
		fmt.Fprintln(b, "Check complete, no warnings found.")
	}
	if err := r.PrintTo(b, renamed); err != nil {
		return err
	}
	if r.Error != nil && len(r.Warnings) > 0 {
		fmt.Fprintln(b)
	}
	return nil
}

// Broken is why the Dockerfile cannot be built, which only Lint answers; nil if
// it can. The Dockerfile is called name in it.
func (a *Answer) Broken(name string) error {
	var r lint.LintResults
	if a.Question != Lint || json.Unmarshal(a.JSON, &r) != nil || r.Error == nil {
		return nil
	}
	e := &diag.Error{Err: errors.New(r.Error.Message), Code: diag.ExitDockerfile}
	if i := int(r.Error.Location.SourceIndex); i >= 0 && i < len(r.Sources) {
		e.At = place(r.Sources[i], r.Error.Location.Ranges)
	}
	if e.At != nil {
		e.At.File = name
		e.Err = errors.New(withoutLine(r.Error.Message, e.At))
	}
	return e
}
