// Package examples tests that every example builds, without any privilege, and
// does what it says.
package examples

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/kiln-build/kiln/test/compare"
	"github.com/kiln-build/kiln/test/kilnrun"
)

// example is how one is built and what its image must have.
type example struct {
	dir   string
	bases []string
	args  []string
	pre   string // directory of an image to build first, given as BASE
	check func(t *testing.T, c *v1.Config, out string)
}

const (
	busybox = "library/busybox:latest"
	debian  = "library/debian:bookworm"
)

func all() []example {
	return []example{
		{dir: "go-multistage", bases: []string{busybox, "library/golang:1.26"}, check: func(t *testing.T, c *v1.Config, out string) {
			wants(t, c.User, "1000")
			wants(t, out, "hello 1.0")
		}},
		{dir: "node-service", bases: []string{"library/node:20"}, check: func(t *testing.T, c *v1.Config, out string) {
			wants(t, c.User, "node")
			wants(t, out, "ok 2026")
		}},
		{dir: "python-venv", bases: []string{debian}, check: func(t *testing.T, c *v1.Config, _ string) {
			wants(t, strings.Join(c.Env, " "), "PATH=/opt/venv/bin:")
		}},
		{dir: "static-site", bases: []string{busybox}, check: func(t *testing.T, c *v1.Config, _ string) {
			if c.Healthcheck == nil {
				t.Error("no health check")
			}
		}},
		{dir: "heredocs", bases: []string{busybox}, check: func(t *testing.T, c *v1.Config, _ string) {
			wants(t, strings.Join(c.Entrypoint, " "), "/usr/local/bin/entry")
		}},
		{dir: "onbuild", bases: []string{busybox}, pre: "onbuild/base", check: func(t *testing.T, c *v1.Config, _ string) {
			wants(t, c.Labels["app"], "example")
			if len(c.OnBuild) > 0 {
				t.Errorf("triggers %q are still there", c.OnBuild)
			}
		}},
		{dir: "multi-target", bases: []string{busybox}, args: []string{"--target", "test"}, check: func(t *testing.T, _ *v1.Config, out string) {
			wants(t, out, "tested")
		}},
		{dir: "multi-target", bases: []string{busybox}, check: func(t *testing.T, c *v1.Config, out string) {
			wants(t, strings.Join(c.Entrypoint, " "), "sh /app/app.sh")
			if strings.Contains(out, "tested") {
				t.Error("a stage ran that the target does not need")
			}
		}},
		{dir: "labels-and-args", bases: []string{busybox}, args: []string{"--build-arg", "VERSION=1.2.3"}, check: func(t *testing.T, c *v1.Config, _ string) {
			wants(t, c.Labels["org.opencontainers.image.version"], "1.2.3")
			wants(t, strings.Join(c.Env, " "), "APP_VERSION=1.2.3")
		}},
	}
}

func wants(t *testing.T, got, want string) {
	t.Helper()
	if !strings.Contains(got, want) {
		t.Errorf("no %q in %q", want, got)
	}
}

// TestEveryExampleIsListed holds the table above and README.md to the directories.
func TestEveryExampleIsListed(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	tested := map[string]bool{}
	for _, e := range all() {
		tested[e.dir] = true
	}
	files, err := filepath.Glob("*/Dockerfile")
	if err != nil || len(files) < 6 {
		t.Fatalf("%d examples, %v", len(files), err)
	}
	for _, f := range files {
		dir := filepath.Dir(f)
		if !tested[dir] {
			t.Errorf("%s is not tested", dir)
		}
		if !strings.Contains(string(readme), "["+dir+"]("+dir+")") {
			t.Errorf("%s is not in README.md", dir)
		}
		one, err := os.ReadFile(filepath.Join(dir, "README.md"))
		if err != nil || strings.Count(string(one), "\n") != 1 {
			t.Errorf("%s needs a README.md of one line: %v", dir, err)
		}
	}
}

func TestExamples(t *testing.T) {
	if os.Getenv("KILN_E2E") == "" {
		t.Skip("set KILN_E2E=1: scripts/test e2e")
	}
	for _, e := range all() {
		t.Run(strings.Join(append([]string{e.dir}, e.args...), " "), func(t *testing.T) {
			bed := kilnrun.Open(t, e.bases...)
			dir := filepath.Join(bed.Dir, "context")
			if err := os.CopyFS(dir, os.DirFS(e.dir)); err != nil {
				t.Fatal(err)
			}
			args := e.args
			if e.pre != "" {
				base, _ := bed.Build(t, filepath.Join(bed.Dir, "context", "base"), "base")
				args = append(args, "--build-arg", "BASE="+base)
			}
			ref, out := bed.Build(t, dir, "example/"+e.dir, args...)
			img, err := compare.Open(ref)
			if err != nil {
				t.Fatal(err)
			}
			c, err := img.ConfigFile()
			if err != nil {
				t.Fatal(err)
			}
			e.check(t, &c.Config, out)
		})
	}
}
