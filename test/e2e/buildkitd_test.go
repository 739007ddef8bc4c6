package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kiln-build/kiln/test/kilnrun"
	"github.com/kiln-build/kiln/test/refbuild"
)

// server is Kiln as buildkitd, without privilege.
type server struct {
	t      *testing.T
	runner *kilnrun.Runner
	addr   string // where it says that it listens
	said   *watched
}

// startServer starts a server, whose store is the runner's. It is ended with the test.
func startServer(t *testing.T, r *kilnrun.Runner, args ...string) *server {
	t.Helper()
	cmd, err := r.As(context.WithoutCancel(t.Context()), "buildkitd", args...)
	if err != nil {
		t.Fatal(err)
	}
	s := &server{t: t, runner: r, said: &watched{until: "Listening on ", seen: make(chan struct{})}}
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = s.said, s.said, 5*time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGINT)
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("the server ended with: %v", err)
			}
		case <-time.After(30 * time.Second):
			t.Error("the server does not end")
			_ = cmd.Process.Kill()
			<-ended
		}
		if t.Failed() {
			t.Logf("the server said:\n%s", s.log())
		}
		noPanic(t, s.log())
	})
	select {
	case <-s.said.seen:
	case err := <-ended:
		ended <- err
		t.Fatalf("the server ends: %v\n%s", err, s.log())
	case <-time.After(patience):
		t.Fatalf("the server does not listen:\n%s", s.log())
	}
	s.addr = regexp.MustCompile(`Listening on (\S+)`).FindStringSubmatch(s.log())[1]
	return s
}

// serveBed starts a server with the bed's store, which speaks plain HTTP with the bed's registry.
func serveBed(t *testing.T, bed *kilnrun.Bed, args ...string) *server {
	t.Helper()
	return startServer(t, bed.Runner, append([]string{"--addr", "unix://" + filepath.Join(bed.Work, "s.sock"), "--insecure-registry", bed.Host, "--store-limit", "none"}, args...)...)
}

// serveEmpty starts one more, with a store of its own that has nothing.
func serveEmpty(t *testing.T, bed *kilnrun.Bed) *server {
	t.Helper()
	dir, err := os.MkdirTemp(bed.Dir, "empty-*")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	r, err := bed.At(filepath.Join(dir, "kiln"))
	if err != nil {
		t.Fatal(err)
	}
	return serveBed(t, &kilnrun.Bed{Runner: r, Dir: dir, Host: bed.Host})
}

func (s *server) log() string {
	s.said.mu.Lock()
	defer s.said.mu.Unlock()
	return s.said.b.String()
}

// client is a program that people drive BuildKit with, unmodified, and the server that it is to use. It is
// whoever runs the tests, not who the server is.
type client struct {
	t    *testing.T
	name string // buildctl or buildx
	path string
	home string // its own
	env  []string
	pre  []string // options before the verb
}

// buildctl is BuildKit's own.
func (s *server) buildctl(options ...string) *client {
	s.t.Helper()
	bin, err := refbuild.Programs(s.t.Context())
	if err != nil {
		s.t.Skipf("BuildKit's buildctl cannot be built here: %v", err)
	}
	c := newClient(s.t, "buildctl", filepath.Join(bin, "buildctl"))
	c.pre = append([]string{"--addr", s.addr}, options...)
	return c
}

// buildx is Docker's, by itself, with the server as its remote builder.
func (s *server) buildx(options ...string) *client {
	s.t.Helper()
	path, err := refbuild.Buildx(s.t.Context())
	if err != nil {
		s.t.Skipf("buildx cannot be built here: %v", err)
	}
	c := newClient(s.t, "buildx", path)
	c.run(append(append([]string{"create", "--name", "kiln", "--driver", "remote"}, options...), s.addr)...)
	return c
}

// clients are both.
func (s *server) clients() []*client { return []*client{s.buildctl(), s.buildx()} }

func newClient(t *testing.T, name, path string) *client {
	home := t.TempDir()
	return &client{t: t, name: name, path: path, home: home, env: []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + home, "DOCKER_CONFIG=" + filepath.Join(home, ".docker"), "BUILDX_CONFIG=" + filepath.Join(home, "buildx"), "BUILDX_BUILDER=kiln", "GIT_CONFIG_NOSYSTEM=1",
	}}
}

// in is the client in another test, a subtest.
func (c *client) in(t *testing.T) *client {
	other := *c
	other.t = t
	return &other
}

func (c *client) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, c.path, slices.Concat(c.pre, args)...)
	cmd.Dir, cmd.Env, cmd.WaitDelay = c.home, c.env, 5*time.Second
	return cmd
}

// try runs the client to its end.
func (c *client) try(args ...string) (out string, code int) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 5*patience) // W1 takes two minutes when everything else runs too
	defer cancel()
	cmd := c.command(ctx, args...)
	b, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil || ctx.Err() != nil {
		c.t.Fatalf("%s %s: %v\n%s", c.name, args, err, b)
	}
	return string(b), cmd.ProcessState.ExitCode()
}

// run is try for what must work.
func (c *client) run(args ...string) string {
	c.t.Helper()
	out, code := c.try(args...)
	if code != 0 {
		c.t.Fatalf("%s %s exits with %d:\n%s", c.name, args, code, out)
	}
	return out
}

// order is a build, which each client has its own words for.
type order struct {
	dir      string // context
	file     string // Dockerfile; empty: the context's own
	target   string
	args     []string          // build arguments, NAME=VALUE
	contexts map[string]string // named contexts: a directory, or a URL or docker-image:// reference
	cacheTo  string
	// cacheFrom is type=registry,… and the like.
	cacheFrom string
	// opts are options of the front end that buildx has flags for, by buildctl's names for them: ulimit, add-hosts.
	opts map[string]string
	// more are options that both have: --output, --secret, --ssh, --metadata-file, --no-cache.
	more []string
}

// flags are the options of buildx that stand for options of the front end.
func flags() map[string]string {
	return map[string]string{"ulimit": "ulimit", "add-hosts": "add-host", "shm-size": "shm-size", "cgroup-parent": "cgroup-parent", "platform": "platform", "no-cache": "no-cache-filter"}
}

// args are the command line of a build.
func (o order) line(c *client) []string {
	file := o.file
	if file == "" {
		file = filepath.Join(o.dir, "Dockerfile")
	}
	args := slices.Concat([]string{"build", "--progress", "plain"}, o.more)
	add := func(a ...string) { args = append(args, a...) }
	if c.name == "buildx" {
		add("--file", file, "--target", o.target)
		for _, a := range o.args {
			add("--build-arg", a)
		}
		for name, from := range o.contexts {
			add("--build-context", name+"="+from)
		}
		for k, v := range o.opts {
			add("--" + flags()[k] + "=" + v)
		}
		if o.cacheTo != "" {
			add("--cache-to", o.cacheTo)
		}
		if o.cacheFrom != "" {
			add("--cache-from", o.cacheFrom)
		}
		return append(args, o.dir)
	}
	add("--frontend", "dockerfile.v0", "--local", "context="+o.dir, "--local", "dockerfile="+filepath.Dir(file), "--opt", "filename="+filepath.Base(file), "--opt", "target="+o.target)
	for _, a := range o.args {
		add("--opt", "build-arg:"+a)
	}
	for name, from := range o.contexts {
		if filepath.IsAbs(from) {
			add("--local", name+"="+from)
			from = "local:" + name
		}
		add("--opt", "context:"+name+"="+from)
	}
	for k, v := range o.opts {
		add("--opt", k+"="+v)
	}
	if o.cacheTo != "" {
		add("--export-cache", o.cacheTo)
	}
	if o.cacheFrom != "" {
		add("--import-cache", o.cacheFrom)
	}
	return args
}

// build does an order, and returns what the client printed.
func (c *client) build(o order) string {
	c.t.Helper()
	start := time.Now()
	out := c.run(o.line(c)...)
	c.t.Logf("%s built in %.2f s", c.name, time.Since(start).Seconds())
	return out
}

// contains fails for each of the texts that is not in what was printed.
func contains(t *testing.T, out string, texts ...string) {
	t.Helper()
	for _, s := range texts {
		if !strings.Contains(out, s) {
			t.Errorf("there is no %q in\n%s", s, out)
		}
	}
}

// eventually waits until something is so.
func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !so(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}
