package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/remote"
	buildkit "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"

	"github.com/kiln-build/kiln/internal/registry/registrytest"
	"github.com/kiln-build/kiln/test/kilnrun"
	"github.com/kiln-build/kiln/test/refbuild"
)

// pipeline is the line that people have in their Jenkinsfiles.
func (a *access) pipeline(output ...string) []string {
	line := "build --frontend dockerfile.v0 --local context=. --local dockerfile=. --output type=image,name=" + a.host + "/team/app:1,push=true"
	return strings.Fields(strings.Join(append([]string{line}, output...), ","))
}

// here puts the context where the builder is started.
func (a *access) here() {
	a.t.Helper()
	put(a.t, filepath.Join(a.runner.Work, "Dockerfile"), []byte("FROM "+a.host+"/team/base AS app\nARG WHO=me\nCOPY f /f\n"))
	put(a.t, filepath.Join(a.runner.Work, "f"), []byte("x\n"))
}

// as runs Kiln by another program's name.
func (a *access) as(program string, args ...string) (out string, code int) {
	a.t.Helper()
	a.runner.Env, a.runner.Etc = a.env, a.etc
	cmd, err := a.runner.As(a.t.Context(), program, args...)
	if err != nil {
		a.t.Fatal(err)
	}
	b, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		a.t.Fatalf("run %s: %v", program, err)
	}
	return string(b), cmd.ProcessState.ExitCode()
}

// buildkitdTOML has BuildKit's configuration of the registry's certificate.
func (a *access) buildkitdTOML(path string) string {
	ca := put(a.t, filepath.Join(a.dir, "registry-ca.pem"), a.pem)
	return put(a.t, filepath.Join(a.dir, path), fmt.Appendf(nil, "[registry.%q]\n  ca = [%q]\n", a.host, ca))
}

// TestBuildctlDaemonless runs the pipeline's line, unchanged and without privilege, with registries
// as pipelines have them.
func TestBuildctlDaemonless(t *testing.T) {
	guard(t)
	basic := registrytest.Options{User: user, Password: password}
	tokenTLS := registrytest.Options{User: user, Password: password, TLS: true, Token: true}
	shared := kilnrun.Open(t, "library/busybox:latest").Runner
	for _, c := range []struct {
		name    string
		options registrytest.Options
		set     func(a *access) (output string)
		fails   bool
	}{
		{"password, HOME", basic, func(a *access) string {
			a.env = []string{"HOME=" + filepath.Dir(a.config(".docker/config.json", auths(map[string]string{a.host: password})))}
			return ""
		}, false},
		{"password, DOCKER_CONFIG", basic, func(a *access) string { a.login(); return "" }, false},
		{"token, SSL_CERT_FILE", tokenTLS, func(a *access) string { a.login(); a.trust(); return "" }, false},
		{"token, the user's buildkitd.toml", tokenTLS, func(a *access) string {
			a.login()
			a.env = append(a.env, "XDG_CONFIG_HOME="+filepath.Dir(filepath.Dir(a.buildkitdTOML("config/buildkit/buildkitd.toml"))))
			return ""
		}, false},
		{"token, BUILDKITD_FLAGS", tokenTLS, func(a *access) string {
			a.login()
			a.env = append(a.env, "BUILDKITD_FLAGS=--oci-worker-no-process-sandbox --config "+a.buildkitdTOML("other.toml"))
			return ""
		}, false},
		{"token, registry.insecure", tokenTLS, func(a *access) string { a.login(); return "registry.insecure=true" }, false},
		{"proxy", tokenTLS, func(a *access) string {
			a.byName()
			a.login()
			a.trust()
			a.env = append(a.env, "HTTPS_PROXY="+a.proxy.URL)
			return ""
		}, false},
		{"wrong password", basic, func(a *access) string {
			a.env = []string{"DOCKER_CONFIG=" + a.config("docker/config.json", auths(map[string]string{a.host: "pass-word-wrong"}))}
			a.wants = []string{"401", "docker/config.json"}
			return ""
		}, true},
		{"unknown certificate", tokenTLS, func(a *access) string {
			a.login()
			a.wants = []string{"unknown authority"}
			return ""
		}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			a := newAccess(t, shared, c.options, "127.0.0.1", corp)
			output := c.set(a)
			a.here()
			line := a.pipeline()
			if output != "" {
				line = a.pipeline(output)
			}
			out, code := a.as("buildctl-daemonless.sh", line...)
			switch {
			case c.fails:
				a.failed(out, code)
			case code != 0:
				t.Fatalf("buildctl-daemonless.sh exits with %d:\n%s", code, out)
			default:
				a.pushed()
			}
			a.silent(out)
		})
	}
}

// serve starts Kiln as buildkitd, which is not told the credentials.
func (a *access) serve(args ...string) *server {
	a.t.Helper()
	a.runner.Env = nil // they are the client's
	s := startServer(a.t, a.runner, append([]string{"--addr", "unix://" + filepath.Join(a.runner.Work, "s.sock")}, args...)...)
	a.t.Cleanup(func() { a.silent(s.log()) })
	return s
}

// TestBuildctlServer has a server build, by our buildctl and by BuildKit's: what they send and say is the same.
func TestBuildctlServer(t *testing.T) {
	guard(t)
	bin, err := refbuild.Programs(t.Context())
	if err != nil {
		t.Skipf("BuildKit's buildctl cannot be built here: %v", err)
	}
	shared := kilnrun.Open(t, "library/busybox:latest").Runner
	a := newAccess(t, shared, registrytest.Options{User: user, Password: password, TLS: true, Token: true}, "127.0.0.1")
	a.here()
	addr := a.serve("--config", a.buildkitdTOML("buildkitd.toml")).addr
	a.login()
	ca := put(t, filepath.Join(a.dir, "ca.pem"), a.pem)

	ours := func(args ...string) string {
		t.Helper()
		out, code := a.as("buildctl", append([]string{"--addr", addr}, args...)...)
		if code != 0 {
			t.Fatalf("buildctl %s exits with %d:\n%s", args, code, out)
		}
		a.silent(out)
		return out
	}
	theirs := func(args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "buildctl"), append([]string{"--addr", addr}, args...)...)
		cmd.Dir = a.runner.Work
		cmd.Env = append(append(os.Environ(), a.env...), "SSL_CERT_FILE="+ca) // it gets tokens itself
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("BuildKit's buildctl %s: %v\n%s", args, err, out)
		}
		return string(out)
	}
	meta := filepath.Join(a.runner.Work, "meta.json")
	out := ours(append(a.pipeline(), "--metadata-file", meta)...)
	if !strings.Contains(out, addr) {
		t.Errorf("nothing says which server builds:\n%s", out)
	}
	a.pushed()
	mine := read(t, meta)
	theirs(append(a.pipeline(), "--metadata-file", meta)...)
	if other := read(t, meta); mine != other {
		t.Errorf("metadata\n%s\nand by BuildKit's client\n%s", mine, other)
	}
	var said struct {
		Digest string `json:"containerimage.digest"`
	}
	if err := json.Unmarshal([]byte(mine), &said); err != nil {
		t.Fatal(err)
	}
	if d, err := remote.Head(a.name("app:1"), a.direct()...); err != nil || d.Digest.String() != said.Digest {
		t.Errorf("the registry has %v (%v), --metadata-file says %s", d, err, said.Digest)
	}
	for _, args := range [][]string{
		{"debug", "workers"},
		{"debug", "workers", "--verbose"},
		{"debug", "workers", "--format", "{{json .}}"},
		{"debug", "info"},
		{"debug", "histories"},
	} {
		if o, b := ours(args...), theirs(args...); o != b {
			t.Errorf("%s:\n%s\nand BuildKit's\n%s", args, o, b)
		}
	}
	dockerfile := []string{"build", "--progress", "quiet", "--frontend", "dockerfile.v0", "--local", "context=.", "--local", "dockerfile=."}
	for _, id := range []string{"frontend.lint", "frontend.outline", "frontend.targets", "frontend.subrequests.describe"} {
		args := append(append([]string{}, dockerfile...), "--opt", "requestid="+id)
		want := theirs(args...)
		if got := ours(args...); got != want || (want == "") != (id == "frontend.lint") {
			t.Errorf("%s:\n%s\nand BuildKit's\n%s", id, got, want)
		}
	}
	for _, kind := range []string{"tar", "oci", "docker"} {
		file := filepath.Join(a.runner.Work, "out."+kind)
		args := append(append([]string{}, dockerfile...), "--output", "type="+kind+",dest="+file)
		ours(args...)
		got := read(t, file)
		theirs(args...)
		if got != read(t, file) || len(got) < 1000 {
			t.Errorf("type=%s: archives of %d bytes differ", kind, len(got))
		}
	}
	dir := filepath.Join(a.runner.Work, "tree")
	ours(append(append([]string{}, dockerfile...), "--output", "type=local,dest="+dir)...)
	if got := read(t, filepath.Join(dir, "f")); got != "x\n" {
		t.Errorf("/f is %q", got)
	}
}

// TestBuildctlBuilds builds what is no plain Dockerfile: steps with a secret and an agent, and an LLB definition from
// standard input, in buildctl's own process and by a server.
func TestBuildctlBuilds(t *testing.T) {
	guard(t)
	bed := kilnrun.Open(t, "library/busybox:latest")
	a := &access{t: t, dir: bed.Dir, runner: bed.Runner}
	addr := a.serve().addr
	put(t, filepath.Join(bed.Work, "Dockerfile"), []byte("FROM "+bed.Host+`/library/busybox
RUN --mount=type=secret,id=token test "$(wc -c </run/secrets/token)" = `+strconv.Itoa(len(password))+`
RUN --mount=type=ssh test -S "$SSH_AUTH_SOCK"
RUN echo done >/made
`))
	secret := put(t, filepath.Join(bed.Dir, "token"), []byte(password))
	def, err := llb.Scratch().File(llb.Mkfile("/made", 0o644, []byte("done\n"))).Marshal(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var definition bytes.Buffer
	if err := llb.WriteTo(def, &definition); err != nil {
		t.Fatal(err)
	}
	agent, err := net.Listen("unix", filepath.Join(bed.Work, "agent.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer agent.Close()
	if err := os.Chmod(agent.Addr().String(), 0o777); err != nil {
		t.Fatal(err)
	}
	dockerfile := []string{
		"--frontend", "dockerfile.v0", "--local", "context=.", "--local", "dockerfile=.", "--no-cache",
		"--secret", "id=token,src=" + secret, "--ssh", "default=" + agent.Addr().String(),
	}
	for _, where := range [][]string{{"buildctl-daemonless.sh"}, {"buildctl", "--addr", addr}} {
		for what, args := range map[string][]string{"Dockerfile": dockerfile, "LLB": nil} {
			dir := filepath.Join(bed.Work, where[0]+"-"+what)
			trace := dir + ".trace"
			all := append(append(where[1:], "build", "--trace", trace, "--output", "type=local,dest="+dir), args...)
			cmd, err := bed.As(t.Context(), where[0], all...)
			if err != nil {
				t.Fatal(err)
			}
			cmd.Stdin = bytes.NewReader(definition.Bytes())
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Errorf("%s of %s: %v\n%s", what, where, err, out)
				continue
			}
			a.silent(string(out))
			if got := read(t, filepath.Join(dir, "made")); got != "done\n" {
				t.Errorf("%s of %s: /made is %q", what, where, got)
			}
			for line := range strings.Lines(read(t, trace)) {
				var s buildkit.SolveStatus
				if err := json.Unmarshal([]byte(line), &s); err != nil {
					t.Fatalf("the trace of %s of %s: %v\n%s", what, where, err, line)
				}
			}
		}
	}
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
