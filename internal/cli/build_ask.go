package cli

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/cli/console"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/progress"
)

// call is the value of --call: what is to be asked, and how the answer is to be shown.
type call struct {
	question     frontend.Question // empty: nothing, there is to be a build
	json         bool
	ignoreStatus bool
}

// parseCall reads METHOD[,format=json|text][,ignorestatus=true], as buildx does.
func parseCall(s string) (c call, err error) {
	bad := func(why string) (call, error) {
		return call{}, diag.New(diag.ExitUsage, "invalid --call %q: %s", s, why).
			WithHint("It is build, check, outline, targets or subrequests.describe, and perhaps ,format=json and ,ignorestatus=true.")
	}
	if s == "" {
		return call{}, nil
	}
	fields, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return bad("it is not one line of fields")
	}
	method := ""
	for _, f := range fields {
		k, v, ok := strings.Cut(f, "=")
		switch {
		case !ok && method == "":
			method = f
		case !ok:
			return bad("it names two methods")
		case k == "format" && (v == "json" || v == "text"):
			c.json = v == "json"
		case k == "ignorestatus":
			if c.ignoreStatus, err = strconv.ParseBool(v); err != nil {
				return bad("ignorestatus is true or false")
			}
		default:
			return bad(fmt.Sprintf("%q is not known", f))
		}
	}
	switch q := frontend.Question(method); {
	case method == "", method == "build":
		return call{}, nil
	case method == "check":
		c.question = frontend.Lint
	case slices.Contains(frontend.Questions(), q):
		c.question = q
	default:
		return bad(fmt.Sprintf("there is no method %q", method))
	}
	return c, nil
}

// ask asks the front end and prints its answer to standard output, like buildx. If it
// complains, the exit code is its.
func (a *App) ask(ctx context.Context, f *buildFlags, env build.Env, req build.Request) error {
	var answer *frontend.Answer
	err := a.WithProgress(f.mode, f.Debug, func(rec *progress.Recorder) (err error) {
		env.Progress = rec
		f.say(rec)
		answer, err = build.Ask(ctx, env, req, f.call.question)
		return err
	})
	if err != nil {
		return err
	}
	name := f.dockerfileName()
	if f.MetadataFile != "" {
		if err := writeAnswer(f.MetadataFile, answer, name); err != nil {
			return err
		}
	}
	if f.call.json {
		_, err = fmt.Fprintf(a.Out, "%s\n", answer.JSON)
	} else {
		err = answer.Print(a.Out, name)
	}
	if err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	if err := answer.Broken(name); err != nil {
		return err
	}
	if answer.Status != 0 && !f.call.ignoreStatus {
		return console.ExitStatus(answer.Status)
	}
	return nil
}

// writeAnswer writes what buildx writes of an answer into --metadata-file.
func writeAnswer(file string, answer *frontend.Answer, name string) error {
	var text strings.Builder
	if err := answer.Print(&text, name); err != nil {
		return err
	}
	m := map[string]any{"result.json": json.RawMessage(answer.JSON), "result.txt": text.String(), "result.statuscode": strconv.Itoa(answer.Status)}
	b, err := json.MarshalIndent(m, "", "  ")
	if err == nil {
		err = console.WriteText(file, string(b)+"\n")
	}
	if err != nil {
		return fmt.Errorf("write --metadata-file: %w", err)
	}
	return nil
}

// dockerfileName is what the Dockerfile is called to the user.
func (f *buildFlags) dockerfileName() string {
	switch {
	case f.File == "-", f.File == "" && f.Context == "-":
		return "stdin"
	case f.File != "":
		return f.File
	case strings.Contains(f.Context, "://"):
		return "Dockerfile"
	}
	return filepath.Join(f.Context, "Dockerfile")
}
