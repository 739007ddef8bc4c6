package buildctl

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/cli/console"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/spf13/cobra"
)

// parse reads a command line of buildctl build.
func parse(t *testing.T, env map[string]string, args ...string) (build.Request, *buildFlags, error) {
	t.Helper()
	cmd := &cobra.Command{}
	f := newBuildFlags(cmd)
	if err := cmd.ParseFlags(Arguments(args)); err != nil {
		return build.Request{}, f, err
	}
	req, err := f.request(func(k string) string { return env[k] })
	return req, f, err
}

// TestPassed: secrets and agents that are passed to steps.
func TestPassed(t *testing.T) {
	req, _, err := parse(t, nil, "--frontend", "dockerfile.v0", "--secret", "id=a,src=f", "--secret", "id=b,env=E", "--ssh", "default", "--ssh", "k=/x,/y", "--allow", "network.host")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(req.Secrets, req.SSH), "[{a f } {b  E}] [{default [] false} {k [/x /y] false}]"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	for _, args := range [][]string{{"--secret", "topsecret"}, {"--ssh", "k=raw=true"}} {
		_, _, err := parse(t, nil, append(args, "--frontend", "dockerfile.v0")...)
		if diag.ExitCode(err) != diag.ExitUsage || strings.Contains(err.Error(), "topsecret") {
			t.Errorf("%q: %v", args, err)
		}
	}
}

// TestPipelineLine is the line that people have in their Jenkinsfiles.
func TestPipelineLine(t *testing.T) {
	req, _, err := parse(t, nil, strings.Fields(
		"--frontend dockerfile.v0 --local context=. --local dockerfile=. --output type=image,name=REGISTRY/NAME:TAG,push=true")...)
	if err != nil {
		t.Fatal(err)
	}
	if req.Locals["context"] != "." || req.Locals["dockerfile"] != "." || len(req.Outputs) != 1 {
		t.Errorf("%+v", req)
	}
	if o := req.Outputs[0]; o.Type != "image" || !o.Push || !slices.Equal(o.Names, []string{"REGISTRY/NAME:TAG"}) {
		t.Errorf("%+v", o)
	}
}

func TestOptions(t *testing.T) {
	env := map[string]string{"FROM_ENV": "e", "SOURCE_DATE_EPOCH": "5"}
	req, _, err := parse(t, env,
		"-frontend=dockerfile.v0", "--local", "context=a", "-local", "dockerfile=b=c", "--oci-layout", "l=dir",
		"--opt", "target=x", "--opt", "build-arg:A=1=2", "--opt", "build-arg:FROM_ENV", "--opt", "build-arg:UNSET", "--opt", "label:l=v",
		"--opt", "platform=linux/amd64,linux/arm64", "--opt", "filename=D.other", "--opt", "context:n=docker-image://x", "--opt", "target=y",
		"--opt", "image-resolve-mode=pull", "--no-cache", "-o", `type=image,"name=h.example:5000/a,docker.io/b",registry.insecure=true,push=true`,
		"--output", "type=oci", "--output=type=tar,dest=f", "--output", "type=oci,tar=false,dest=d",
		"--export-cache", "type=registry,ref=c.example/cache,mode=max,registry.insecure=true", "--import-cache", "type=local,src=d", "--import-cache", "x",
	)
	if err != nil {
		t.Fatal(err)
	}
	got := fmt.Sprint(
		req.Locals, req.Layouts, req.Attrs, req.BuildArgs, req.Labels, req.Target, len(req.Platforms), req.Pull, req.NoCache, req.InsecureHosts(), req.Outputs,
		req.CacheTo, req.CacheTo[0].Mode, req.CacheFrom,
	)
	want := "map[context:a dockerfile:b=c] map[l:dir] map[context:n:docker-image://x filename:D.other] " +
		"map[A:1=2 FROM_ENV:e SOURCE_DATE_EPOCH:5] map[l:v]y2 true true [c.example h.example:5000 docker.io] " +
		"[type=image,push=true,registry.insecure=true,name=h.example:5000/a,name=docker.io/b type=oci,dest=- type=tar,dest=f type=oci,dest=d,tar=false] " +
		"[type=registry,ref=c.example/cache]max[type=local,d type=registry,ref=x]"
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestGatewayFrontend(t *testing.T) {
	req, _, err := parse(t, nil, "--frontend", "gateway.v0", "--opt", "source=docker/dockerfile:1.4", "--local", "context=.")
	if err != nil || req.BuildArgs["BUILDKIT_SYNTAX"] != "docker/dockerfile:1.4" {
		t.Errorf("%v, %v", req.BuildArgs, err)
	}
}

func TestRefused(t *testing.T) {
	for line, want := range map[string]string{
		"--frontend other.v0":                                          `front end "other.v0"`,
		"--frontend gateway.v0":                                        "source=docker/dockerfile",
		"--frontend dockerfile.v0 --local .":                           "NAME=VALUE",
		"--frontend dockerfile.v0 --opt target":                        "NAME=VALUE",
		"--frontend dockerfile.v0 --opt platform=a/b/c/d/e":            "platform",
		"--frontend dockerfile.v0 --output name=x":                     "type=TYPE",
		"--frontend dockerfile.v0 --output type=nosuch":                `"nosuch"`,
		"--frontend dockerfile.v0 --output type=local":                 "dest=PATH",
		"--frontend dockerfile.v0 -o type=image,registry.insecure=yes": "true or false",
		"--frontend dockerfile.v0 --import-cache type=gha":             "type=gha are not supported",
		"--frontend dockerfile.v0 --export-cache type=s3":              "type=s3 are not supported",
		"--nosuch": "nosuch",
		"--frontend dockerfile.v0 --source-policy-file f":          "--source-policy-file",
		"--frontend dockerfile.v0 --proxy-network":                 "--proxy-network",
		"--frontend dockerfile.v0 --allow device=x":                "device=x",
		"--frontend dockerfile.v0 --export-cache type=s3,bucket=b": "s3",
	} {
		if _, _, err := parse(t, nil, strings.Fields(line)...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", line, err)
		}
	}
	c := &console.Console{Streams: console.Streams{In: strings.NewReader(""), Out: io.Discard, Err: io.Discard}, Getenv: func(string) string { return "" }}
	if code := c.Execute(t.Context(), New(c), []string{"build", "--frontend", "x"}); code != diag.ExitUsage {
		t.Errorf("exit code %d", code)
	}
}

// TestDaemonFlags: what is given for a server that is not started.
func TestDaemonFlags(t *testing.T) {
	f, err := parseDaemonFlags("--root /r -config=/c --debug --addr unix:///x --oci-worker=true --oci-worker-snapshotter native --oci-worker-no-process-sandbox --allow-insecure-entitlement network.host")
	if want := (daemonFlags{Root: "/r", Config: "/c"}); err != nil || f != want {
		t.Errorf("%+v, %v", f, err)
	}
	for flags, want := range map[string]string{
		"--otel-socket-path /x":                 "otel-socket-path",
		"--containerd-worker":                   "containerd-worker",
		"--allow-insecure-entitlement anything": "anything",
		"more":                                  `"more"`,
	} {
		if _, err := parseDaemonFlags(flags); diag.ExitCode(err) != diag.ExitUsage || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", flags, err)
		}
	}
}

func TestAuthCerts(t *testing.T) {
	certs, err := authCerts([]string{"host=https://H.example:5000,ca=a", "host=h.example:5000,ca=b,cert=c,key=k"})
	if got, want := fmt.Sprint(certs), "map[h.example:5000:{[a b] [{c k}]}]"; err != nil || got != want {
		t.Errorf("%s, %v; want %s", got, err, want)
	}
	for _, v := range []string{"ca=a", "host=h", "host=h,cert=c", "host=h,insecure=true", "host"} {
		if _, err := authCerts([]string{v}); diag.ExitCode(err) != diag.ExitUsage {
			t.Errorf("%s: %v", v, err)
		}
	}
}

// TestRemote: what a server is asked for.
func TestRemote(t *testing.T) {
	cmd := &cobra.Command{}
	f := newBuildFlags(cmd)
	if err := cmd.ParseFlags([]string{
		"--frontend", "other.v0", "--local", "context=.", "--opt", "a=b", "--no-cache", "-o", `type=image,"name=x,y",Push=true`, "--allow", "security.insecure",
		"--export-cache", "registry.example/c", "--import-cache", "type=s3,bucket=b", "--proxy-network",
	}); err != nil {
		t.Fatal(err)
	}
	getenv := func(k string) string { return map[string]string{"SOURCE_DATE_EPOCH": "5"}[k] }
	b := &builder{server: &server{Console: &console.Console{Getenv: getenv}}, buildFlags: f, ref: "r"}
	r, err := b.remoteRequest()
	got := fmt.Sprint(r.Ref, r.Frontend, r.Attrs, r.Locals, r.Outputs, r.CacheTo, r.CacheFrom, r.Allow, r.ProxyNetwork)
	const want = "rother.v0map[a:b build-arg:SOURCE_DATE_EPOCH:5 no-cache:] map[context:.] [{image map[name:x,y push:true]}] " +
		"[{registry map[mode:min ref:registry.example/c]}] [{s3 map[bucket:b]}] [security.insecure] true"
	if got != want || err != nil {
		t.Errorf("got\n%s (%v)\nwant\n%s", got, err, want)
	}
}
