// Package refbuild builds images with BuildKit, to compare Kiln's with. The
// programs come from the module test/oracle, at the version of Kiln's own front
// end, and run as root with Debian's runc: host network, no CNI, state in a
// directory that is thrown away.
package refbuild

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/kiln-build/kiln/test/testenv"
)

// Version is BuildKit's, as test/oracle/go.mod pins it.
const Version = "v0.33.1"

// BuildxVersion is that of buildx, as test/buildx/go.mod pins it.
const BuildxVersion = "v0.37.0"

// Programs builds buildkitd, buildctl and crane into the cache directory and
// returns where they are. Two minutes on two cores when Go's build cache is
// cold; nothing when they are there.
func Programs(ctx context.Context) (string, error) {
	return build(ctx, "oracle", Version,
		"github.com/moby/buildkit/cmd/buildkitd", "github.com/moby/buildkit/cmd/buildctl", "github.com/google/go-containerregistry/cmd/crane")
}

// Buildx builds docker's buildx, which is a program of its own besides a plugin, into the cache
// directory, and returns its path.
func Buildx(ctx context.Context) (string, error) {
	dir, err := build(ctx, "buildx", BuildxVersion, "github.com/docker/buildx/cmd/buildx")
	return filepath.Join(dir, "buildx"), err
}

// build builds programs of the module test/NAME, unless they are there, and returns their directory.
func build(ctx context.Context, module, version string, programs ...string) (string, error) {
	root, err := testenv.Root()
	if err != nil {
		return "", err
	}
	cache, err := testenv.CacheDir()
	if err != nil {
		return "", err
	}
	bin := filepath.Join(cache, "bin", module+"-"+version)
	if _, err := os.Stat(filepath.Join(bin, "done")); err == nil {
		return bin, nil
	}
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return "", err
	}
	args := append([]string{"build", "-trimpath", "-ldflags", "-s -w", "-o", bin + "/"}, programs...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = filepath.Join(root, "test", module)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", module, err, out)
	}
	return bin, os.WriteFile(filepath.Join(bin, "done"), nil, 0o644)
}

// Daemon is a running buildkitd.
type Daemon struct {
	// PID is its process, whose descendants are all that a build runs.
	PID int
	// Dir holds its state, socket and log.
	Dir string

	bin string
	cmd *exec.Cmd
}

// Options say how the daemon is run.
type Options struct {
	// Hosts are registries ("127.0.0.1:5000") that speak plain HTTP.
	Hosts []string
	// CgroupParent is where steps are put, relative to the daemon's hierarchy; "" for runc's own choice.
	CgroupParent string
	// Wrap, if not nil, changes the daemon's command line; the process stays the daemon's own.
	Wrap func(argv []string) []string
	// Program is a server to start in BuildKit's place: what comes before --config FILE.
	Program []string
}

// Start runs buildkitd with its state in dir, taking the registries at hosts
// ("127.0.0.1:5000") to speak plain HTTP.
func Start(ctx context.Context, dir string, hosts ...string) (*Daemon, error) {
	return StartWith(ctx, dir, Options{Hosts: hosts})
}

// StartWith is Start with more to say.
func StartWith(ctx context.Context, dir string, o Options) (*Daemon, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("start buildkitd: needs root")
	}
	if _, err := exec.LookPath("runc"); err != nil && o.Program == nil {
		return nil, errors.New("start buildkitd: needs runc: scripts/deps.sh oracle")
	}
	bin, err := Programs(ctx)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, err
	}
	d := &Daemon{Dir: dir, bin: bin}
	toml := fmt.Sprintf("root = %q\ninsecure-entitlements = [\"network.host\"]\n[grpc]\naddress = [%q]\n[worker.oci]\nnetworkMode = \"host\"\ngc = false\n", filepath.Join(dir, "state"), d.addr())
	if o.CgroupParent != "" {
		toml += fmt.Sprintf("defaultCgroupParent = %q\n", "/"+o.CgroupParent)
	}
	toml += "[worker.containerd]\nenabled = false\n"
	for _, h := range o.Hosts {
		toml += fmt.Sprintf("[registry.%q]\nhttp = true\n", h)
	}
	conf := filepath.Join(dir, "buildkitd.toml")
	if err := os.WriteFile(conf, []byte(toml), 0o644); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(dir, "buildkitd.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	program := o.Program
	if program == nil {
		program = []string{filepath.Join(bin, "buildkitd")}
	}
	argv := append(slices.Clone(program), "--config", conf)
	if o.Wrap != nil {
		argv = o.Wrap(argv)
	}
	d.cmd = exec.Command(argv[0], argv[1:]...)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.Env = append(os.Environ(), "TMPDIR="+dir)
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start buildkitd: %w", err)
	}
	d.PID = d.cmd.Process.Pid
	if err := d.wait(ctx); err != nil {
		return nil, errors.Join(err, d.Stop())
	}
	return d, nil
}

func (d *Daemon) addr() string { return "unix://" + filepath.Join(d.Dir, "buildkitd.sock") }

func (d *Daemon) wait(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		out, err := exec.CommandContext(ctx, filepath.Join(d.bin, "buildctl"), "--addr", d.addr(), "debug", "workers").CombinedOutput()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("start buildkitd: not ready after 30 s, see %s: %s", filepath.Join(d.Dir, "buildkitd.log"), out)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// Stop ends the daemon and removes its state, but for its log.
func (d *Daemon) Stop() error {
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	kill := time.AfterFunc(20*time.Second, func() { _ = d.cmd.Process.Kill() })
	defer kill.Stop()
	var exit *exec.ExitError
	if err := d.cmd.Wait(); err != nil && !errors.As(err, &exit) {
		return err
	}
	return os.RemoveAll(filepath.Join(d.Dir, "state"))
}

// Request is one build.
type Request struct {
	Context    string // directory
	Dockerfile string // in it; "" for Dockerfile
	Target     string
	Ref        string // pushed there
	NoCache    bool
	// CacheFrom and CacheTo are values of --import-cache and --export-cache; empty: none.
	CacheFrom, CacheTo string
	// Opts are the front end's: "build-arg:A=1", "label:a=b", "context:x=docker-image://…".
	Opts []string
	// Secrets, SSH and Allow are buildctl's options of these names.
	Secrets, SSH, Allow []string
}

// ErrBuild says that BuildKit ran and refused or failed the build.
var ErrBuild = errors.New("build failed")

// Build builds and pushes; it returns what buildctl printed.
func (d *Daemon) Build(ctx context.Context, r Request) (string, error) {
	args := []string{
		"--addr", d.addr(), "build", "--progress", "plain", "--frontend", "dockerfile.v0",
		"--local", "context=" + r.Context, "--local", "dockerfile=" + r.Context,
		"--output", "type=image,name=" + r.Ref + ",push=true,oci-mediatypes=true",
	}
	if r.Dockerfile != "" {
		args = append(args, "--opt", "filename="+r.Dockerfile)
	}
	if r.Target != "" {
		args = append(args, "--opt", "target="+r.Target)
	}
	if r.NoCache {
		args = append(args, "--no-cache")
	}
	if r.CacheFrom != "" {
		args = append(args, "--import-cache", r.CacheFrom)
	}
	if r.CacheTo != "" {
		args = append(args, "--export-cache", r.CacheTo)
	}
	for _, o := range r.Opts {
		args = append(args, "--opt", o)
	}
	for flag, values := range map[string][]string{"--secret": r.Secrets, "--ssh": r.SSH, "--allow": r.Allow} {
		for _, v := range values {
			args = append(args, flag, v)
		}
	}
	cmd := exec.CommandContext(ctx, filepath.Join(d.bin, "buildctl"), args...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, io.Writer(&out)
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && ctx.Err() == nil {
		return out.String(), fmt.Errorf("%w: %w", ErrBuild, err)
	}
	return out.String(), err
}
