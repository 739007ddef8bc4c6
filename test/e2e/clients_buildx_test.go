package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/registry/registrytest"
	"github.com/kiln-build/kiln/test/kilnrun"
)

// TestBuildxBake builds two targets of a file that share a stage, which runs once, and a third of one of them.
func TestBuildxBake(t *testing.T) {
	guard(t)
	t.Parallel()
	bed := kilnrun.Open(t, busybox)
	s := serveBed(t, bed)
	dir := files{
		"Dockerfile": "FROM " + bed.Host + "/library/busybox:latest AS common\nRUN echo com\"\"mon runs; head -c 16 /dev/urandom | od -x > /common\n" +
			"FROM common AS a\nARG NAME\nRUN echo $NAME > /name\nFROM common AS b\nARG NAME\nRUN sleep 0.1; echo $NAME > /name\n",
		"docker-bake.hcl": `
variable "REPOSITORY" {}
group "default" {
  targets = ["a", "b", "c"]
}
target "common" {
  context = "."
  args = { NAME = "of bake" }
}
target "a" {
  inherits = ["common"]
  target = "a"
  tags = ["${REPOSITORY}:a"]
  output = ["type=registry", "type=local,dest=a"]
}
target "b" {
  inherits = ["common"]
  target = "b"
  tags = ["${REPOSITORY}:b"]
  output = ["type=registry"]
}
target "c" {
  contexts = { parent = "target:a" }
  dockerfile-inline = "FROM parent\nRUN cat /name /name > /twice"
  tags = ["${REPOSITORY}:c"]
  output = ["type=registry"]
}
`,
	}.write(t, filepath.Join(bed.Dir, "context"))
	x := s.buildx()
	repository, meta := bed.Host+"/baked", filepath.Join(bed.Dir, "meta.json")
	bake := func() string {
		t.Helper()
		cmd := x.command(t.Context(), "bake", "--progress", "plain", "--metadata-file", meta)
		cmd.Dir, cmd.Env = dir, append(cmd.Env, "REPOSITORY="+repository)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return string(out)
	}
	if out := bake(); strings.Count(out, " common runs\n") != 1 {
		t.Errorf("the common stage does not run once:\n%s", out)
	}
	common := read(t, filepath.Join(dir, "a", "common"))
	for _, target := range []string{"a", "b", "c"} {
		fs := rootfs(t, repository+":"+target)
		if fs["/common"].Data != common || fs["/name"].Data != "of bake\n" {
			t.Errorf("%s has %q and %q, of the common stage is %q", target, fs["/common"].Data, fs["/name"].Data, common)
		}
		if !strings.Contains(read(t, meta), digest(t, repository+":"+target)) {
			t.Errorf("--metadata-file has nothing of %s:\n%s", target, read(t, meta))
		}
	}
	if got := rootfs(t, repository+":c")["/twice"].Data; got != "of bake\nof bake\n" {
		t.Errorf("what is built of a target has %q", got)
	}
	if out := bake(); len(executed(out)) > 0 || !strings.Contains(out, "CACHED") {
		t.Errorf("the second time is executed %q:\n%s", executed(out), out)
	}
}

// TestDockerBuildx runs buildx as what most people call it by: a plugin of Docker's command.
func TestDockerBuildx(t *testing.T) {
	guard(t)
	t.Parallel()
	docker, err := exec.LookPath("docker")
	if err != nil {
		t.Skip("there is no docker command: apt-get install docker-cli")
	}
	bed := kilnrun.Open(t, busybox)
	x := serveBed(t, bed).buildx()
	plugins := filepath.Join(x.home, ".docker", "cli-plugins")
	if err := os.MkdirAll(plugins, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(x.path, filepath.Join(plugins, "docker-buildx")); err != nil {
		t.Fatal(err)
	}
	x.path, x.name = docker, "docker"
	x.env = append(x.env, "DOCKER_HOST=unix:///nonexistent.sock")
	dir := files{"Dockerfile": "FROM " + bed.Host + "/library/busybox:latest\nRUN echo docker > /by\n"}.write(t, filepath.Join(bed.Dir, "context"))
	ref := bed.Host + "/by-docker"
	x.run("buildx", "build", "--builder", "kiln", "--push", "-t", ref, dir)
	if got := rootfs(t, ref)["/by"].Data; got != "docker\n" {
		t.Errorf("/by is %q", got)
	}
	x.run("build", "--push", "-t", ref+":again", dir)
	if digest(t, ref+":again") != digest(t, ref) {
		t.Error("docker build makes another image")
	}
	contains(t, x.run("buildx", "imagetools", "inspect", ref), digest(t, ref))
}

// TestBuildxCredentials: buildx has the password of a registry that wants tokens, and the server has not.
func TestBuildxCredentials(t *testing.T) {
	guard(t)
	t.Parallel()
	shared := kilnrun.Open(t, busybox).Runner
	a := newAccess(t, shared, registrytest.Options{User: user, Password: password, TLS: true, Token: true}, "127.0.0.1")
	a.here()
	x := a.serve("--config", a.buildkitdTOML("buildkitd.toml")).buildx()
	x.env = append(x.env, "SSL_CERT_FILE="+put(t, filepath.Join(a.dir, "ca.pem"), a.pem)) // it gets tokens itself
	line := []string{"build", "--progress", "plain", "--push", "--tag", a.host + "/team/app:1", a.runner.Work}
	out, code := x.try(line...)
	if code == 0 || !strings.Contains(out, "401 Unauthorized") {
		t.Errorf("without a password buildx exits with %d:\n%s", code, out)
	}
	a.login()
	x.env = append(x.env, a.env...)
	a.silent(x.run(line...))
	a.pushed()
}

// TestBuildxUnchanged: what has not changed since the last build is not sent again to find that out.
func TestBuildxUnchanged(t *testing.T) {
	guard(t)
	t.Parallel()
	bed := kilnrun.Open(t, busybox)
	s := serveBed(t, bed)
	big := strings.Repeat("0123456789abcdef", 50_000) // 800 kB
	dir := files{"Dockerfile": "FROM scratch\nCOPY big small /\n", "big": big, "small": "one"}.write(t, filepath.Join(bed.Dir, "context"))
	at := time.Now().Add(-time.Minute).Truncate(time.Second).Add(time.Millisecond) // not so young that it may change again
	if err := os.Chtimes(filepath.Join(dir, "big"), at, at); err != nil {
		t.Fatal(err)
	}
	c := s.buildx().in(t)
	said := regexp.MustCompile(`transferring context: ([\d.]+)(B|kB|MB)\b`)
	build := func() (sent float64, out string) {
		t.Helper()
		out = c.build(order{dir: dir, more: []string{"--output", "type=image,push=true,name=" + bed.Host + "/unchanged"}})
		for _, m := range said.FindAllStringSubmatch(out, -1) {
			n, err := strconv.ParseFloat(m[1], 64)
			if err != nil {
				t.Fatal(err)
			}
			sent = max(sent, n*map[string]float64{"B": 1, "kB": 1e3, "MB": 1e6}[m[2]])
		}
		return sent, out
	}
	if sent, out := build(); sent < float64(len(big)) {
		t.Errorf("at first %v bytes were sent:\n%s", sent, out)
	}
	if sent, out := build(); sent == 0 || sent > 10_000 || len(notDone(out)) > 0 {
		t.Errorf("with nothing changed %v bytes were sent:\n%s", sent, out)
	}
	put(t, filepath.Join(dir, "small"), []byte("two"))
	if sent, out := build(); sent < float64(len(big)) || len(notDone(out)) != 1 { // the step that copies both reads both
		t.Errorf("for a step that is executed %v bytes were sent:\n%s", sent, out)
	}
	if fs := rootfs(t, bed.Host+"/unchanged"); fs["/small"].Data != "two" || fs["/big"].Data != big {
		t.Error("the image has not what the context has")
	}
}
