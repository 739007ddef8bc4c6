package e2e

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/registry/registrytest"
	"github.com/kiln-build/kiln/test/kilnrun"
)

// search is a step that writes down all that it can find out about its world.
// What it looks for is spelt backwards, lest the Dockerfile itself be found.
const search = `ARG REGISTRY
FROM ${REGISTRY}/library/debian:bookworm
COPY <<"END" /search.sh
mkdir /found; exec 2>/found/errors
env > /found/env
set > /found/set
hostname > /found/hostname; uname -a > /found/uname
find / -ls > /found/files
find / -type s -ls > /found/sockets
ls -lR /dev > /found/dev
for p in /proc/[0-9]*; do
  for f in environ cmdline maps mounts mountinfo mountstats status comm cgroup io limits auxv stat; do
    [ -r $p/$f ] && { echo "== $p/$f"; timeout 5 cat $p/$f | tr '\0' '\n'; }
  done
  ls -l $p/fd $p/fdinfo $p/ns $p/map_files $p/cwd $p/root $p/exe
  for fd in $p/fd/*; do readlink -f $fd; done
done > /found/processes
for f in $(find /proc/self/net/ /proc/net/ /proc/sys /proc/sysvipc /sys /proc -maxdepth 8 -type f -not -path '/proc/[0-9]*' -not -path '/proc/self/[!n]*' -not -path '/proc/thread-self/*' -not -name kmsg -not -name kcore); do
  echo "== $f"; timeout 2 head -c 100000 $f
done > /found/kernel
cat /proc/net/unix > /found/unix
perl -MSocket -e 'socket(S, AF_UNIX, SOCK_STREAM, 0); print connect(S, pack_sockaddr_un("\0" . $ARGV[0])) ? "CONNECTED\n" : "refused: $!\n"' ABSTRACT > /found/abstract
perl -MSocket -e 'socket(S, AF_UNIX, SOCK_STREAM, 0); print connect(S, pack_sockaddr_un(scalar reverse $ARGV[0])) ? "CONNECTED\n" : "refused: $!\n"' SOCKET > /found/socket
ls -la / /.. /../../.. /proc/1/root/.. /proc/1/cwd/../.. > /found/parents
cat $(echo CONFIG | rev) > /found/config 2>/dev/null && echo READABLE >> /found/config
rev /pattern > /dev/shm/pattern; rm /pattern
find / -xdev -type f -print0 | xargs -0 grep -a -l -F -f /dev/shm/pattern > /found/grep
rm /dev/shm/pattern
for f in /found/*; do echo "=== $f"; cat $f; done
echo searched it all
END
COPY <<"END" /pattern
PATTERN
END
RUN sh /search.sh
`

func reverse(s string) string {
	r := []byte(s)
	slices.Reverse(r)
	return string(r)
}

// canaries are secrets, and where they were planted.
type canaries map[string]string

func (c canaries) plant(where string) string {
	s := "canary" + strings.ToLower(rand.Text())
	c[s] = where
	return s
}

// find reports every canary that a text has.
func (c canaries) find(t *testing.T, in, text string) {
	t.Helper()
	for s, where := range c {
		if i := strings.Index(text, s); i >= 0 {
			t.Errorf("%s has %s: ...%q...", in, where, text[max(0, i-80):min(len(text), i+len(s)+80)])
		}
	}
}

// plantAll hides canaries wherever the builder has secrets or files.
func (c canaries) plantAll(t *testing.T, bed *kilnrun.Bed, reg *registrytest.Registry, o registrytest.Options) {
	t.Helper()
	auth := base64.StdEncoding.EncodeToString([]byte(o.User + ":" + o.Password))
	c[auth] = "config.json's auth"
	config, err := json.Marshal(map[string]any{
		"auths": map[string]any{
			reg.Host():                   map[string]string{"auth": auth},
			"other.registry.example.com": map[string]string{"identitytoken": c.plant("the token of another registry in config.json")},
		},
		"HttpHeaders": map[string]string{"X-Secret": c.plant("a header in config.json")},
	})
	if err != nil {
		t.Fatal(err)
	}
	if out, code := run(t, bed.Runner, "images"); code != 0 { // makes the store
		t.Fatal(out)
	}
	home := filepath.Join(bed.Work, "home-"+c.plant("the path of the home directory"))
	files{
		"docker/config.json":  string(config),
		"beside.txt":          c.plant("a file beside the store"),
		"store/planted.txt":   c.plant("a file in the store"),
		"store/tmp/plant.txt": c.plant("a file in the store's tmp"),
	}.write(t, bed.Work)
	files{".netrc": c.plant("the .netrc"), ".aws/credentials": c.plant("the AWS credentials")}.write(t, home)
	for _, k := range []string{"AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "KILN_SECRET", "KUBERNETES_TOKEN", "SSH_AUTH_SOCK"} {
		bed.Env = append(bed.Env, k+"="+c.plant("the builder's "+k))
	}
	bed.Env = append(bed.Env, "DOCKER_CONFIG="+filepath.Join(bed.Work, "docker"), "HOME="+home)
	if err := kilnrun.Own(bed.Work); err != nil {
		t.Fatal(err)
	}
}

// TestSecretsStayOut: a step that looks at all that there is finds neither the
// builder's credentials nor its files' names, and the image has none of them.
func TestSecretsStayOut(t *testing.T) {
	guard(t)
	for _, mode := range []string{"plain", "json"} {
		t.Run(mode, func(t *testing.T) { secretsStayOut(t, mode) })
	}
}

func secretsStayOut(t *testing.T, mode string) {
	bed := kilnrun.Open(t, debian)
	c := canaries{}
	opts := registrytest.Options{User: c.plant("the user name in config.json"), Password: c.plant("the password in config.json"), Token: true}
	reg := registrytest.New(t, opts)
	c.plantAll(t, bed, reg, opts)

	abstract, socket := "kiln-"+strings.ToLower(rand.Text()), filepath.Join(bed.Dir, "s")
	listen(t, "@"+abstract)
	listen(t, socket)
	if err := os.Chmod(socket, 0o777); err != nil {
		t.Fatal(err)
	}
	patterns := []string{reverse(bed.Dir)}
	for s := range c {
		patterns = append(patterns, reverse(s))
	}
	dockerfile := strings.NewReplacer("PATTERN", strings.Join(patterns, "\n"), "ABSTRACT", abstract, "SOCKET", reverse(socket),
		"CONFIG", reverse(filepath.Join(bed.Work, "docker", "config.json"))).Replace(search)
	dir := files{"Dockerfile": dockerfile}.write(t, filepath.Join(bed.Dir, "context"))
	ref := reg.Host() + "/secrets:" + mode
	out, code := run(t, bed.Runner, "build", "--progress", mode, "--push", "--build-arg", "REGISTRY="+bed.Host, "-t", ref, dir)
	if code != 0 {
		t.Fatalf("exit code %d\n%s", code, out)
	}
	text := out
	if mode == "json" {
		text += stepOutput(t, out)
	}
	for _, s := range []string{"searched it all", "=== /found/files", "/proc/1/environ", "refused: ", "Linux buildkitsandbox "} {
		if !strings.Contains(text, s) {
			t.Errorf("the search is not whole: there is no %q", s)
		}
	}
	for _, s := range []string{"CONNECTED", "READABLE"} {
		if strings.Contains(out, s+"\n") {
			t.Errorf("the step reached something of the builder: %s", s)
		}
	}
	clean(t, bed, c, "the build's output", text)
	imageIsClean(t, bed, c, ref, opts)
	if t.Failed() {
		t.Logf("%.8000s", text)
	}
}

func listen(t *testing.T, addr string) {
	t.Helper()
	l, err := net.Listen("unix", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
}

// stepOutput is what the steps printed, from progress as JSON.
func stepOutput(t *testing.T, out string) string {
	t.Helper()
	var b strings.Builder
	for line := range strings.Lines(out) {
		var e progress.Event
		if !strings.HasPrefix(line, "{") {
			continue
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Errorf("progress line %q: %v", line, err)
		}
		b.Write(e.Data)
	}
	return b.String()
}

// clean fails if a text has a canary or names something of the builder's machine.
func clean(t *testing.T, bed *kilnrun.Bed, c canaries, in, text string) {
	t.Helper()
	c.find(t, in, text)
	paths := canaries{bed.Dir: "the path of the test's directory", filepath.Base(bed.Dir): "the name of the test's directory"}
	if wd, err := os.Getwd(); err == nil {
		paths[wd] = "the test's working directory"
	}
	if h, err := os.Hostname(); err == nil && len(h) > 5 {
		paths[h] = "the machine's hostname"
	}
	paths.find(t, in, text)
}

// imageIsClean looks into all that was pushed.
func imageIsClean(t *testing.T, bed *kilnrun.Bed, c canaries, ref string, o registrytest.Options) {
	t.Helper()
	r, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(r, remote.WithAuth(&authn.Basic{Username: o.User, Password: o.Password}))
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := img.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	clean(t, bed, c, "the manifest", string(manifest))
	clean(t, bed, c, "the config", string(config))
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers[1:] { // the first is the base image's
		clean(t, bed, c, "a layer", uncompressed(t, l))
	}
	if len(layers) != 4 {
		t.Errorf("the image has %d layers", len(layers))
	}
}

func uncompressed(t *testing.T, l v1.Layer) string {
	t.Helper()
	rc, err := l.Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	b, err := io.ReadAll(rc)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
