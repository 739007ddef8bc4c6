package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/test/kilnrun"
)

// TestClientsCancel: a client that is interrupted, or killed, in the middle of a step takes the step's
// processes with it, and the server goes on.
func TestClientsCancel(t *testing.T) {
	guard(t)
	bed := kilnrun.Open(t, busybox)
	s := serveBed(t, bed)
	dir := files{
		"Dockerfile": "FROM " + bed.Host + "/library/busybox:latest\nARG N\nRUN echo be\"\"gun $N; sleep 1000 & sleep 1000; echo ended > /ended\n",
		"Next":       "FROM " + bed.Host + "/library/busybox:latest\nRUN echo next > /made\n",
	}.write(t, filepath.Join(bed.Dir, "context"))
	const limit = 5 * time.Second
	idle := processes(bed.Bin, nil)
	if len(idle) != 1 {
		t.Fatalf("the server is %+v", idle)
	}
	for _, c := range s.clients() {
		for _, sig := range []os.Signal{os.Interrupt, os.Kill} {
			t.Run(fmt.Sprint(c.name, " ", sig), func(t *testing.T) {
				c := c.in(t)
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				cmd := c.command(ctx, order{dir: dir, args: []string{"N=" + c.name + sig.String()}}.line(c)...)
				w := begin(ctx, t, cmd)
				during := processes(bed.Bin, nil)
				if len(during) < 3 {
					t.Errorf("the server, its shim and the sandbox are %d processes: %+v", len(during), during)
				}
				at := time.Now()
				if err := cmd.Process.Signal(sig); err != nil {
					t.Fatal(err)
				}
				left := func() []process {
					return slices.DeleteFunc(processes(bed.Bin, nil), func(p process) bool { return p.pid == idle[0].pid || p.state == "Z" })
				}
				for len(left()) > 0 && time.Since(at) < limit {
					time.Sleep(10 * time.Millisecond)
				}
				if l := left(); len(l) > 0 {
					t.Errorf("%v after %v there are %+v", limit, sig, l)
				}
				t.Logf("the step was gone after %v", time.Since(at))
				if err := cmd.Wait(); err == nil {
					t.Errorf("the client says that it worked:\n%s", w.b.String())
				}
				if sig == os.Interrupt {
					contains(t, w.b.String(), "cancel")
				}
				eventually(t, "the build's files are gone", func() bool {
					files, _ := filepath.Glob(filepath.Join(bed.Store(), "tmp", "*"))
					return len(files) == 0
				})
				out := t.TempDir()
				c.build(order{dir: dir, file: filepath.Join(dir, "Next"), more: []string{"--output", "type=local,dest=" + out, "--no-cache"}})
				if got := read(t, filepath.Join(out, "made")); got != "next\n" {
					t.Errorf("the next build makes %q", got)
				}
			})
		}
	}
}

// TestClientsErrors: what fails, and what is refused, is said in the client, with its place in the Dockerfile.
func TestClientsErrors(t *testing.T) {
	guard(t)
	t.Parallel()
	bed := kilnrun.Open(t, busybox)
	s := serveBed(t, bed)
	from := "FROM " + bed.Host + "/library/busybox:latest\n"
	for _, e := range []struct {
		name, dockerfile string
		more             []string
		says             []string
	}{
		{"step", from + "\nRUN echo before; \\\n  exit 7\nRUN true\n", nil, []string{
			"before\n", "Dockerfile:3\n", "3 | >>> RUN echo before; \\\n", "4 | >>>   exit 7\n", "5 |     RUN true\n",
			`process "/bin/sh -c echo before;   exit 7" did not complete successfully: exit code: 7`,
		}},
		{"instruction", from + "RUM true\n", nil, []string{"Dockerfile:2\n", ">>> RUM true", "unknown instruction: RUM (did you mean RUN?)"}},
		{"flag", from + "RUN --mout=type=tmpfs true\n", nil, []string{"Dockerfile:2\n", "unknown flag: --mout"}},
		{"file", from + "COPY absent /\n", nil, []string{"Dockerfile:2\n", ">>> COPY absent /", `"/absent": not found`}},
		{"image", "FROM " + bed.Host + "/library/absent:1\n", nil, []string{"Dockerfile:1\n", "/library/absent:1", "404 Not Found"}},
		{"secret", from + "RUN --mount=type=secret,id=tok,required=true true\n", nil, []string{"Dockerfile:2\n", "tok", "not found"}},
		{"agent", from + "RUN --mount=type=ssh,required=true true\n", nil, []string{"Dockerfile:2\n", "ssh"}},
		{"syntax", "# syntax=example.com/other/frontend:1\n" + from, nil, []string{"example.com/other/frontend:1", "not supported"}},
		{"insecure", from + "RUN --security=insecure true\n", nil, []string{"security.insecure is not allowed"}},
		{"host", from + "RUN --network=host true\n", nil, []string{"network.host is not allowed"}},
		{"entitlement", from, []string{"--allow", "security.insecure"}, []string{"security.insecure is not allowed"}},
		{"exporter", from, []string{"--output", "type=image,name=x,no-such-option=1"}, []string{"no-such-option"}},
		{"cache", from, []string{"CACHE-TO", "type=s3,region=x,bucket=y"}, []string{"s3"}},
		{"push", from + "LABEL a=b\n", []string{"--output", "type=image,push=true,name=" + bed.Host + "/UPPER"}, []string{"UPPER", "lower case"}},
		{"registry", from, []string{"--output", "type=image,push=true,name=127.0.0.1:1/app"}, []string{"127.0.0.1:1", "connection refused"}},
	} {
		t.Run(e.name, func(t *testing.T) {
			dir := files{"Dockerfile": e.dockerfile}.write(t, filepath.Join(bed.Dir, "errors", e.name))
			for _, c := range s.clients() {
				o := order{dir: dir, more: e.more}
				if e.name == "cache" {
					o.more, o.cacheTo = nil, e.more[1]
				}
				out, code := c.in(t).try(o.line(c)...)
				if code != 1 {
					t.Errorf("%s exits with %d", c.name, code)
				}
				contains(t, out, e.says...)
				if strings.Contains(out, " > [internal] load build definition") {
					t.Error("it is said that the Dockerfile could not be read")
				}
				if t.Failed() {
					t.Logf("%s said:\n%s", c.name, out)
				}
			}
		})
	}
	dir := files{"Dockerfile": from}.write(t, filepath.Join(bed.Dir, "errors", "frontend"))
	ctl := s.buildctl()
	for _, e := range []struct{ args, says []string }{
		{[]string{"--frontend", "other.v0"}, []string{"other.v0"}},
		{[]string{"--frontend", "gateway.v0", "--opt", "source=example.com/other/frontend:1"}, []string{"example.com/other/frontend:1", "not supported"}},
		{[]string{"--frontend", "dockerfile.v0", "--output", "type=nosuch"}, []string{`exporter "nosuch" could not be found`}},
		{[]string{"--frontend", "dockerfile.v0", "--source-policy-file", put(t, filepath.Join(dir, "policy.json"), []byte(`{"rules": [{"action": "DENY", "selector": {"identifier": "*"}}]}`))}, []string{"polic"}},
	} {
		out, code := ctl.try(slices.Concat([]string{"build", "--local", "context=" + dir, "--local", "dockerfile=" + dir}, e.args)...)
		if code != 1 {
			t.Errorf("%s: exit code %d", e.args, code)
		}
		contains(t, out, e.says...)
	}
}

// TestClientsAttestations: docs/buildkit-api.md says what happens. The provenance that buildx wants unless it is told otherwise is
// left out; what somebody asks for is refused.
func TestClientsAttestations(t *testing.T) {
	guard(t)
	t.Parallel()
	bed := kilnrun.Open(t, busybox)
	s := serveBed(t, bed)
	dir := files{"Dockerfile": "FROM " + bed.Host + "/library/busybox:latest\nLABEL a=b\n"}.write(t, filepath.Join(bed.Dir, "context"))
	ctl, x := s.buildctl(), s.buildx()
	digests := map[string]bool{}
	for i, c := range []struct {
		client *client
		args   []string
		kind   string // that is refused; empty: it works
	}{
		{x, nil, ""},
		{x, []string{"--provenance=false"}, ""},
		{x, []string{"--sbom=false"}, ""},
		{x, []string{"--attest", "type=provenance,disabled=true"}, ""},
		{x, []string{"--provenance=true"}, "provenance"},
		{x, []string{"--provenance=mode=max"}, "provenance"},
		{x, []string{"--sbom=true"}, "sbom"},
		{x, []string{"--attest", "type=provenance,mode=min"}, "provenance"},
		{x, []string{"--attest", "type=sbom,generator=example.com/scanner"}, "sbom"},
		{x, []string{"--build-arg", "BUILDKIT_ATTEST_SBOM=1"}, "sbom"},
		{ctl, nil, ""},
		{ctl, []string{"--opt", "attest:provenance=mode=min,inline-only=true"}, ""},
		{ctl, []string{"--opt", "attest:provenance=mode=max"}, "provenance"},
		{ctl, []string{"--opt", "attest:sbom="}, "sbom"},
	} {
		ref := fmt.Sprintf("%s/attested:%d", bed.Host, i)
		out, code := c.client.try(order{dir: dir, more: append([]string{"--output", "type=image,push=true,name=" + ref}, c.args...)}.line(c.client)...)
		if c.kind == "" {
			if code != 0 {
				t.Errorf("%s %s exits with %d:\n%s", c.client.name, c.args, code, out)
				continue
			}
			digests[digest(t, ref)] = true
			if m := manifestOf(t, ref); !m.MediaType.IsImage() || len(m.Layers) != 1 {
				t.Errorf("%s %s makes %+v", c.client.name, c.args, m)
			}
			continue
		}
		if code != 1 || !strings.Contains(out, fmt.Sprintf("attestations (%q) are not supported", c.kind)) {
			t.Errorf("%s %s exits with %d:\n%s", c.client.name, c.args, code, out)
		}
		notPushed(t, ref)
	}
	if len(digests) != 1 {
		t.Errorf("without attestations the image is one of %v", digests)
	}
}
