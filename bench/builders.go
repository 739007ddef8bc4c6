package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/kiln-build/kiln/test/refbuild"
	"github.com/kiln-build/kiln/test/testenv"
)

// job is one build: a context that is built and pushed.
type job struct {
	context, ref string
	// cacheFrom and cacheTo name a cache in the registry; empty: none.
	cacheFrom, cacheTo string
}

// builder builds one workload several times with what it keeps between builds.
type builder interface {
	name() string
	// start makes the builder ready, with nothing cached.
	start(ctx context.Context, dir, host string, g *cpuGroup) error
	build(ctx context.Context, j job) error
	// stop forgets everything.
	stop() error
}

// An ordinary user for Kiln when the bench runs as root.
const nobody = 65532

// kilnBuilder runs the binary under test, without any privilege.
type kilnBuilder struct {
	bin, unpriv string // unpriv: what takes privileges away; "" to run as we are
	orphans     *orphans

	dir, host string
	group     *cpuGroup
}

func newKiln(ctx context.Context, bin string, privileged bool, o *orphans) (*kilnBuilder, error) {
	k := &kilnBuilder{bin: bin, orphans: o}
	var err error
	if k.bin == "" {
		if k.bin, err = testenv.Kiln(ctx); err != nil {
			return nil, err
		}
	}
	if os.Geteuid() == 0 && !privileged {
		k.unpriv, err = testenv.Tool(ctx, "unpriv")
	}
	return k, err
}

func (k *kilnBuilder) name() string { return "kiln" }

func (k *kilnBuilder) start(_ context.Context, dir, host string, g *cpuGroup) error {
	k.dir, k.host, k.group = dir, host, g
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if k.unpriv == "" {
		return nil
	}
	// The repository may be where another user cannot go.
	data, err := os.ReadFile(k.bin)
	if err != nil {
		return err
	}
	if err := os.WriteFile(dir+"-kiln", data, 0o755); err != nil {
		return err
	}
	return os.Chown(dir, nobody, nobody)
}

// command is a command line of Kiln's, without privilege.
func (k *kilnBuilder) command(args ...string) []string {
	if k.unpriv == "" {
		return append([]string{k.bin}, args...)
	}
	return append([]string{k.unpriv, "-ro", "-rw", k.dir, "-dir", k.dir, "--", k.dir + "-kiln"}, args...)
}

func (k *kilnBuilder) build(ctx context.Context, j job) error {
	args := []string{
		"build", "--root", filepath.Join(k.dir, "store"), "--progress", "plain", "--push",
		"--insecure-registry", k.host, "--build-arg", "REGISTRY=" + k.host, "-t", j.ref,
	}
	if j.cacheFrom != "" {
		args = append(args, "--cache-from", j.cacheFrom)
	}
	if j.cacheTo != "" {
		args = append(args, "--cache-to", "type=registry,mode=max,ref="+j.cacheTo)
	}
	return k.orphans.run(ctx, k.group.wrap(k.command(append(args, j.context)...)))
}

func (k *kilnBuilder) stop() error {
	_ = os.Remove(k.dir + "-kiln")
	return os.RemoveAll(k.dir)
}

// run is a command's whole output in its error.
func (o *orphans) run(ctx context.Context, argv []string) error {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	out, err := os.CreateTemp("", "bench-log-*")
	if err != nil {
		return err
	}
	defer os.Remove(out.Name())
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		return err
	}
	o.expect(cmd.Process.Pid)
	if err := cmd.Wait(); err != nil {
		log, _ := os.ReadFile(out.Name())
		return fmt.Errorf("run %s: %w\n%s", argv[len(argv)-1], err, tail(log, 4000))
	}
	return nil
}

func tail(b []byte, n int) []byte { return b[max(0, len(b)-n):] }

// buildkit is the oracle. Its daemon, and its client, are part of what is measured.
type buildkit struct {
	orphans *orphans
	daemon  *refbuild.Daemon
	host    string
	program []string // a server in place of its own
}

func (b *buildkit) name() string { return "buildkit" }

func (b *buildkit) start(ctx context.Context, dir, host string, g *cpuGroup) error {
	o := refbuild.Options{Hosts: []string{host}, Program: b.program}
	if g != nil {
		o.Wrap = g.wrap
		o.CgroupParent = filepath.Base(g.dir)
	}
	d, err := refbuild.StartWith(ctx, dir, o)
	if err != nil {
		return err
	}
	b.daemon, b.host = d, host
	b.orphans.expect(d.PID)
	return nil
}

func (b *buildkit) build(ctx context.Context, j job) error {
	r := refbuild.Request{Context: j.context, Ref: j.ref, Opts: []string{"build-arg:REGISTRY=" + b.host}}
	if j.cacheFrom != "" {
		r.CacheFrom = "type=registry,ref=" + j.cacheFrom
	}
	if j.cacheTo != "" {
		r.CacheTo = "type=registry,mode=max,ref=" + j.cacheTo
	}
	out, err := b.daemon.Build(ctx, r)
	if err != nil {
		return fmt.Errorf("%w\n%s", err, tail([]byte(out), 4000))
	}
	return nil
}

func (b *buildkit) stop() error {
	if err := b.daemon.Stop(); err != nil {
		return err
	}
	return os.RemoveAll(b.daemon.Dir)
}

// kilnServer is Kiln behind BuildKit's API, with BuildKit's client.
type kilnServer struct {
	kiln   *kilnBuilder
	client buildkit
}

func (s *kilnServer) name() string { return "server" }

func (s *kilnServer) start(ctx context.Context, dir, host string, g *cpuGroup) error {
	if err := s.kiln.start(ctx, dir, host, g); err != nil {
		return err
	}
	s.client = buildkit{orphans: s.kiln.orphans, program: s.kiln.command("buildkitd")}
	return s.client.start(ctx, dir, host, g)
}

func (s *kilnServer) build(ctx context.Context, j job) error { return s.client.build(ctx, j) }

func (s *kilnServer) stop() error { return errors.Join(s.client.stop(), s.kiln.stop()) }
