package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	buildkit "github.com/moby/buildkit/client"

	"github.com/kiln-build/kiln/test/kilnrun"
)

// commandsDockerfile has what lints, outlines and lists of targets tell of.
const commandsDockerfile = `ARG REGISTRY=docker.io
FROM ${REGISTRY}/library/busybox:latest AS base
# NAME is who is greeted.
ARG NAME=nobody
RUN echo of step; echo $NAME > /name
# last is what is built.
FROM base AS last
COPY f /f
`

// TestBuildctlCommands goes through what buildctl does besides building.
func TestBuildctlCommands(t *testing.T) {
	guard(t)
	t.Parallel()
	bed := kilnrun.Open(t, busybox)
	s := serveBed(t, bed, "--oci-worker-labels", "pool=blue")
	c := s.buildctl()
	dir := files{"Dockerfile": commandsDockerfile, "f": "f\n"}.write(t, filepath.Join(bed.Dir, "context"))
	o := order{dir: dir, args: []string{"REGISTRY=" + bed.Host}, more: []string{"--ref-file", filepath.Join(c.home, "ref")}}
	c.build(o)
	ref := read(t, filepath.Join(c.home, "ref"))

	want(t, c.run("debug", "workers"), 0, 0, `(?m)^ID\s+PLATFORMS\n\w{25}\s+linux/`)
	want(t, c.run("debug", "workers", "--verbose"), 0, 0, `pool:\s+blue`, `executor:\s+kiln-gvisor`)
	want(t, c.run("debug", "info"), 0, 0, `BuildKit:\s+github.com/kiln-build/kiln v0\.33\.1`)
	var history struct {
		Record struct{ Ref string }
	}
	if err := json.Unmarshal([]byte(c.run("debug", "histories", "--format", "{{json .}}")), &history); err != nil || history.Record.Ref != ref {
		t.Errorf("the history has %+v, not %s: %v", history, ref, err)
	}
	want(t, c.run("debug", "logs", ref, "--progress", "plain"), 0, 0, `\[base 2/2\] RUN echo of step; echo nobody > /name`, `(?m) \d+\.\d+ of step$`)
	du := c.run("du", "--verbose")
	want(t, du, 0, 0, `(?m)^ID:\s`, `(?m)^Description:\s+from \S+/library/busybox$`, `(?m)^Type:\s+regular$`, `(?m)^Reclaimable:\s+[1-9]`)
	if out := c.run("du", "--filter", "type==nosuch"); strings.Contains(out, "true") {
		t.Errorf("what the filter does not select is shown:\n%s", out)
	}
	want(t, c.run("prune", "--filter", "type==nosuch"), 0, 0, `(?m)^Total:\s+0B$`)
	if out := c.build(o); len(notDone(out)) > 0 {
		t.Errorf("what was not to be pruned is gone:\n%s", out)
	}
	want(t, c.run("prune", "--all"), 0, 0, `(?m)^Total:\s+[1-9]`)
	want(t, c.run("du"), 0, 0, `(?m)^Total:\s+0B$`)
	if out := c.build(o); len(executed(out)) != 1 {
		t.Errorf("after prune is executed %q:\n%s", executed(out), out)
	}
	c.run("prune-histories")
	if out := c.run("debug", "histories"); strings.Contains(out, ref) {
		t.Errorf("the history still has %s:\n%s", ref, out)
	}
}

// TestBuildxCommands goes through what buildx does besides building.
func TestBuildxCommands(t *testing.T) {
	guard(t)
	t.Parallel()
	bed := kilnrun.Open(t, busybox)
	s := serveBed(t, bed, "--oci-worker-labels", "pool=blue")
	x := s.buildx()
	dir := files{
		"Dockerfile": commandsDockerfile, "f": "f\n",
		"Bad":  "FROM " + bed.Host + "/library/busybox:latest\nRUN exit 7\n",
		"Lint": "from " + bed.Host + "/library/busybox:latest as Base\nMAINTAINER me\n",
	}.write(t, filepath.Join(bed.Dir, "context"))
	o := order{dir: dir, args: []string{"REGISTRY=" + bed.Host}}

	want(t, x.run("ls"), 0, 0, `(?m)^kiln\*?\s+remote`, `(?m)unix://\S+\s+running\s+v0\.33\.1\s+linux/`)
	want(t, x.run("inspect", "--bootstrap", "kiln"), 0, 0, `Status:\s+running`, `BuildKit version:\s+v0\.33\.1`, `pool:\s+blue`)
	x.build(o)
	x.build(order{dir: dir, args: append(o.args, "NAME=you"), more: []string{"--output", "type=local,dest=" + t.TempDir()}})
	if out, code := x.try(order{dir: dir, file: filepath.Join(dir, "Bad")}.line(x)...); code != 1 {
		t.Errorf("exit code %d:\n%s", code, out)
	}
	raw(t, x, dir, bed.Host)

	// What is asked of the front end.
	ask := func(more ...string) string {
		t.Helper()
		out, _ := x.try(slices.Concat([]string{"build", "--build-arg", "REGISTRY=" + bed.Host}, more, []string{dir})...)
		return out
	}
	contains(t, ask("--call", "targets"), "last", "is what is built.", "base")
	contains(t, ask("--call", "outline", "--target", "base"), "NAME", "nobody", "is who is greeted.")
	contains(t, ask("--check", "-f", filepath.Join(dir, "Lint")), "MaintainerDeprecated", "StageNameCasing")
	contains(t, ask("--check"), "Check complete, no warnings found.")

	// A context from standard input.
	pipe := x.command(t.Context(), "build", "--build-arg", "REGISTRY="+bed.Host, "--output", "type=local,dest="+filepath.Join(x.home, "piped"), "-")
	pipe.Stdin = strings.NewReader(string(tarBytes(t, tarEntry{Name: "Dockerfile", Body: commandsDockerfile}, tarEntry{Name: "f", Body: "piped\n"})))
	if out, err := pipe.CombinedOutput(); err != nil {
		t.Errorf("a context from standard input: %v\n%s", err, out)
	} else if got := read(t, filepath.Join(x.home, "piped", "f")); got != "piped\n" {
		t.Errorf("/f of standard input is %q", got)
	}

	refs := strings.Fields(x.run("history", "ls", "--format", "{{.Ref}}"))
	if len(refs) < 5 {
		t.Errorf("the history has %q", refs)
	}
	failed := strings.Fields(x.run("history", "ls", "--filter", "status=error", "--format", "{{.Ref}}"))
	if len(failed) != 1 {
		t.Fatalf("failed: %q", failed)
	}
	want(t, x.run("history", "inspect", failed[0]), 0, 0, `Dockerfile:\s+Bad`, `Error:.*exit code: 7`)
	want(t, x.run("history", "logs", "--progress", "plain", refs[len(refs)-1]), 0, 0, `(?m) \d+\.\d+ of step$`)
	x.run("history", "rm", failed[0])
	if left := strings.Fields(x.run("history", "ls", "--format", "{{.Ref}}")); len(left) != len(refs)-1 || slices.Contains(left, failed[0]) {
		t.Errorf("the history has %q, of %q %q was removed", left, refs, failed)
	}

	want(t, x.run("du"), 0, 0, `(?m)^Reclaimable:\s+[1-9]`)
	contains(t, x.run("du", "--verbose"), "from "+bed.Host+"/library/busybox")
	want(t, x.run("prune", "--force", "--all"), 0, 0, `(?m)^Total:\s+[1-9]`)
	want(t, x.run("du"), 0, 0, `(?m)^Total:\s+0B$`)
}

// raw reads progress as JSON.
func raw(t *testing.T, x *client, dir, host string) {
	t.Helper()
	cmd := x.command(t.Context(), "build", "--progress", "rawjson", "--no-cache", "--build-arg", "REGISTRY="+host, dir)
	var lines strings.Builder
	cmd.Stderr = &lines
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, lines.String())
	}
	names, logs := map[string]bool{}, ""
	for line := range strings.Lines(lines.String()) {
		var st buildkit.SolveStatus
		if err := json.Unmarshal([]byte(line), &st); err != nil {
			continue // a warning of buildx's own
		}
		for _, v := range st.Vertexes {
			names[v.Name] = v.Completed != nil
		}
		for _, l := range st.Logs {
			logs += string(l.Data)
		}
	}
	if done, ok := names["[last 1/1] COPY f /f"]; !ok || !done || logs != "of step\n" {
		t.Errorf("rawjson has %v and the output %q", names, logs)
	}
}

// TestClientsTogether: several clients build at the same time, and what they have in common is done once.
func TestClientsTogether(t *testing.T) {
	guard(t)
	t.Parallel()
	bed := kilnrun.Open(t, busybox)
	s := serveBed(t, bed)
	dir := files{"Dockerfile": "FROM " + bed.Host + "/library/busybox:latest\nRUN sleep 1; head -c 8 /dev/urandom | od -x > /common\nARG N\nRUN echo $N > /n\n"}.write(t, filepath.Join(bed.Dir, "context"))
	type running struct {
		cmd *exec.Cmd
		out string
	}
	var all []running
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	clients := s.clients()
	for i := range 4 {
		c, out := clients[i%2], t.TempDir()
		r := running{c.command(ctx, order{dir: dir, args: []string{fmt.Sprint("N=", i)}, more: []string{"--output", "type=local,dest=" + out}}.line(c)...), out}
		if err := r.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		all = append(all, r)
	}
	for i, r := range all {
		if err := r.cmd.Wait(); err != nil {
			t.Fatalf("build %d: %v", i, err)
		}
		if got := read(t, filepath.Join(r.out, "n")); got != fmt.Sprintln(i) {
			t.Errorf("build %d has %q", i, got)
		}
		if a, b := read(t, filepath.Join(all[0].out, "common")), read(t, filepath.Join(r.out, "common")); a != b || !regexp.MustCompile(`^0000000( [0-9a-f]{4}){4}\n`).MatchString(a) {
			t.Errorf("build %d has %q of the step that all have, the first %q", i, b, a)
		}
	}
}
