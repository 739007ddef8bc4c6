package frontend

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/source"
	"github.com/kiln-build/kiln/internal/source/remote"
	"github.com/kiln-build/kiln/internal/tree/memtree"
)

var update = flag.Bool("update", false, "write the golden files anew")

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("%v (run with -update to make it)", err)
	}
	if got != string(want) {
		t.Errorf("%s differs; run with -update if this is meant.\ngot:\n%s\nwant:\n%s", file, got, want)
	}
}

// catalogue resolves any reference to an image without layers.
type catalogue struct{}

func (catalogue) Resolve(_ context.Context, ref string, p ocispec.Platform) (*image.Image, error) {
	c := fmt.Sprintf(`{"os":%q,"architecture":%q,"config":{},"rootfs":{"type":"layers"}}`, p.OS, p.Architecture)
	return &image.Image{Ref: ref, Digest: digest.FromString(ref), RawConfig: []byte(c)}, nil
}

func (catalogue) Describe(context.Context, string, map[string]string, remote.Ask) (remote.Metadata, error) {
	return remote.Metadata{}, errors.New("there is nothing remote")
}

func (catalogue) ResolveLayout(context.Context, string, digest.Digest, ocispec.Platform) (*image.Image, error) {
	return nil, errors.New("there is no layout")
}

func input(dockerfile string) Input {
	return Input{
		Filename: "Dockerfile", Platforms: []ocispec.Platform{{OS: "linux", Architecture: "amd64"}},
		BuildArgs: map[string]string{},
		Contexts: source.Trees{
			ContextName:    memtree.New(map[string]memtree.File{"a": {Data: "a"}, "b": {Data: "b"}, ".dockerignore": {Data: "b\n"}}),
			DockerfileName: memtree.New(map[string]memtree.File{"Dockerfile": {Data: dockerfile}}),
		},
	}
}

// sloppy has much that the front end complains about, and comments and mounts
// that it tells of.
const sloppy = `# escape=\
# VERSION is what is built
ARG VERSION=1.0
# base is what the others start from
FROM busybox AS Base
ENV old style
MAINTAINER me
COPY b /
RUN --mount=type=secret,id=token,required --mount=type=ssh echo $undefined
# app is what is shipped
FROM base as app
ARG DEBUG
CMD echo hi
`

func TestAsk(t *testing.T) {
	for _, q := range Questions() {
		a, err := Ask(t.Context(), input(sloppy), q, catalogue{}, nil)
		if err != nil {
			t.Errorf("%s: %v", q, err)
			continue
		}
		if want := map[bool]int{true: 1, false: 0}[q == Lint]; a.Status != want {
			t.Errorf("%s: status %d", q, a.Status)
		}
		var b bytes.Buffer
		if err := a.Print(&b, "dir/Dockerfile"); err != nil {
			t.Errorf("%s: %v", q, err)
		}
		golden(t, string(q)+".txt", b.String())
		golden(t, string(q)+".json", string(a.JSON)+"\n")
	}
}

func TestAskLint(t *testing.T) {
	check := "# check=skip=JSONArgsRecommended;error=true\n"
	for name, c := range map[string]struct {
		dockerfile string
		args       map[string]string
		want       string
		status     int
	}{
		"clean":      {"FROM busybox\nCMD [\"true\"]\n", nil, "Check complete, no warnings found.\n", 0},
		"one":        {"FROM busybox\nCMD true\n", nil, "Check complete, 1 warning has been found!\n\nWARNING: JSONArgsRecommended - ", 1},
		"skipped":    {check + "FROM busybox\nCMD true\n", nil, "Check complete, no warnings found.\n", 0},
		"by the arg": {"FROM busybox\nCMD true\n", map[string]string{"BUILDKIT_DOCKERFILE_CHECK": "skip=all"}, "Check complete, no warnings found.\n", 0},
		"syntax":     {"# syntax=docker/dockerfile:1\nFROM busybox\nCMD true\n", nil, "Check complete, 1 warning has been found!\n", 1},
	} {
		in := input(c.dockerfile)
		in.BuildArgs = c.args
		a, err := Ask(t.Context(), in, Lint, catalogue{}, nil)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var b bytes.Buffer
		if err := a.Print(&b, "Dockerfile"); err != nil || !strings.HasPrefix(b.String(), c.want) || a.Status != c.status {
			t.Errorf("%s: status %d, %v, printed:\n%s", name, a.Status, err, &b)
		}
	}
}

// What cannot be built is an error with its place, after the warnings.
func TestAskLintOfBrokenDockerfile(t *testing.T) {
	a, err := Ask(t.Context(), input("FROM busybox as x\nCOPY --from=nosuch:tag --chown a \\\n  /\n"), Lint, catalogue{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := a.Print(&b, "d/Dockerfile"); err != nil || !strings.HasSuffix(b.String(), "--------------------\n\n") {
		t.Errorf("%v, printed:\n%s", err, &b)
	}
	err = a.Broken("d/Dockerfile")
	var d *diag.Error
	if !errors.As(err, &d) || d.At == nil || d.At.File != "d/Dockerfile" || d.At.Line != 2 || d.At.EndLine != 3 || d.Code != diag.ExitDockerfile {
		t.Errorf("got %v, %+v", err, d)
	}
	if a.Status == 0 {
		t.Error("status 0")
	}
}

func TestAskPrintsNoControls(t *testing.T) {
	a, err := Ask(t.Context(), input("FROM busybox AS X\x1b]0;title\x07\n\tRUN \x1b[2J\u202e\n"), Lint, catalogue{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := a.Print(&b, "Dock\x1b[2Jerfile"); err != nil || !strings.Contains(b.String(), "\tRUN") || strings.ContainsAny(b.String(), "\x1b\x07\u202e") {
		t.Errorf("%v, printed %q", err, &b)
	}
}

func TestErrorsByCheck(t *testing.T) {
	// As a build: warnings become an error.
	_, err := Load(t.Context(), input("# check=error=true\nFROM busybox as x\n"), catalogue{}, nil)
	if err == nil || !strings.Contains(err.Error(), "lint violation found for rules: FromAsCasing") || diag.ExitCode(err) != diag.ExitDockerfile {
		t.Errorf("got %v", err)
	}
}
