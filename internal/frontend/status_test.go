package frontend

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	bkclient "github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/progress"
)

// TestRawJSONIsBuildKits reads what --progress=rawjson writes with BuildKit's own
// types: they know every field, and lose none.
func TestRawJSONIsBuildKits(t *testing.T) {
	var b bytes.Buffer
	r := progress.NewRecorder(progress.NewRawJSON(&b))
	r.Note("a note")
	r.Warn("a warning")
	if _, err := Load(t.Context(), input(sloppy), catalogue{}, r); err != nil {
		t.Fatal(err)
	}
	s := r.Plan(progress.StepInfo{
		Name: "[2/2] RUN make", Digest: digest.FromString("make"), Inputs: []digest.Digest{digest.FromString("from")},
		Group: &progress.Group{ID: "id", Name: "a group", Weak: true},
	})
	s.Start()
	_, _ = s.Write([]byte("hello\n"))
	s.Transfer("item", 1, 2)
	s.Done(errors.New("exit code: 1"))
	r.Step("cached", "").Cached()
	kinds := map[string]int{}
	for line := range strings.Lines(b.String()) {
		var st bkclient.SolveStatus
		d := json.NewDecoder(strings.NewReader(line))
		d.DisallowUnknownFields()
		if err := d.Decode(&st); err != nil {
			t.Errorf("%v: %s", err, line)
			continue
		}
		again, err := json.Marshal(&st)
		if err != nil || string(again)+"\n" != line {
			t.Errorf("%v\nBuildKit writes %s\nKiln writes     %s", err, again, line)
		}
		kinds["vertexes"] += len(st.Vertexes)
		kinds["statuses"] += len(st.Statuses)
		kinds["logs"] += len(st.Logs)
		for _, w := range st.Warnings {
			kinds["warnings"]++
			if strings.HasPrefix(string(w.Short), "StageNameCasing: ") {
				kinds["lints"]++
				if w.Vertex == "" || w.Level != 1 || w.URL == "" || len(w.Detail) != 1 || len(w.Range) != 1 || w.Range[0].Start.Line != 5 ||
					string(w.SourceInfo.Data) != sloppy {
					t.Errorf("lint is %+v", w)
				}
			}
		}
	}
	for _, k := range []string{"vertexes", "statuses", "logs", "warnings", "lints"} {
		if kinds[k] == 0 {
			t.Errorf("no %s: %v", k, kinds)
		}
	}
}
