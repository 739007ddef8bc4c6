// Package kilnrun runs the builder under test as its users do: as a command,
// and when the tests run as root, as an ordinary user without any privilege and
// with a read-only view of the machine (package unpriv). It also gives the tests
// a registry that holds the base images.
package kilnrun

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/test/baseimages"
	"github.com/kiln-build/kiln/test/testenv"
)

// Nobody is the uid and gid that Kiln runs as when the tests run as root.
const Nobody = 65532

// Runner runs one binary.
type Runner struct {
	// Bin is where any user can start it from.
	Bin string
	// Work is the one directory that it can write. Its store is below.
	Work string
	// Env is its whole environment but for PATH.
	Env []string

	// Deadly makes any attempt at a namespace, mount or chroot kill the process that makes it.
	Deadly bool
	// Etc, if not empty, is a directory whose files it sees over those of /etc; only as root.
	Etc string

	unpriv string // the program that takes privileges away; "" when not root
}

// New prepares a runner with dir as its work directory, which must not be there
// yet; other users must be able to reach it.
func New(ctx context.Context, dir string) (*Runner, error) {
	bin, err := testenv.Kiln(ctx)
	if err != nil {
		return nil, err
	}
	r := &Runner{Bin: bin, Work: dir}
	if os.Geteuid() != 0 {
		return r, os.Mkdir(dir, 0o755)
	}
	if r.unpriv, err = testenv.Tool(ctx, "unpriv"); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(bin) // the repository may be where another user cannot go
	if err != nil {
		return nil, err
	}
	r.Bin = dir + "-kiln"
	if err := os.WriteFile(r.Bin, data, 0o755); err != nil {
		return nil, err
	}
	return r.At(dir)
}

// At returns a runner of the same program with a work directory, and so a
// store, of its own; it must not be there yet.
func (r *Runner) At(dir string) (*Runner, error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	other := &Runner{Bin: r.Bin, Work: dir, unpriv: r.unpriv}
	if r.unpriv == "" {
		return other, nil
	}
	return other, os.Chown(dir, Nobody, Nobody)
}

// Store is the directory of the runner's store.
func (r *Runner) Store() string { return filepath.Join(r.Work, "store") }

// Command is the verb with its arguments, ready to start; --root is put in
// behind the verb. Its Stdin and outputs are the caller's to set.
func (r *Runner) Command(ctx context.Context, args ...string) *exec.Cmd {
	return r.command(ctx, append([]string{r.Bin, args[0], "--root", r.Store()}, args[1:]...), r.Env)
}

// As is Command for a program of another name, by which Kiln has the command line of another builder.
// The store is the same.
func (r *Runner) As(ctx context.Context, program string, args ...string) (*exec.Cmd, error) {
	dir := r.Bin + "-as"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	link := filepath.Join(dir, program)
	if err := os.Symlink(r.Bin, link); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	return r.command(ctx, append([]string{link}, args...), append(slices.Clip(r.Env), "KILN_ROOT="+r.Store())), nil
}

func (r *Runner) command(ctx context.Context, argv, env []string) *exec.Cmd {
	if r.unpriv != "" {
		pre := []string{r.unpriv, "-ro", "-rw", r.Work, "-dir", r.Work}
		if r.Deadly {
			pre = append(pre, "-deadly")
		}
		if r.Etc != "" {
			pre = append(pre, "-etc", r.Etc)
		}
		for _, e := range env {
			pre = append(pre, "-env", e)
		}
		argv = append(append(pre, "--"), argv...)
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = r.Work
	if r.unpriv == "" {
		cmd.Env = append([]string{"PATH=" + os.Getenv("PATH")}, env...)
	}
	return cmd
}

// Run runs it to its end; it returns what it printed and its exit code. An error
// means that it could not be run, not that it failed.
func (r *Runner) Run(ctx context.Context, args ...string) (string, int, error) {
	cmd := r.Command(ctx, args...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && ctx.Err() == nil {
		return string(out), exit.ExitCode(), nil
	}
	return string(out), 0, err
}

// Own gives a context to the user that Kiln runs as.
func Own(dir string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	return filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(p, Nobody, Nobody)
	})
}

// Bed is what a test of builds needs.
type Bed struct {
	*Runner
	// Dir is thrown away at the test's end; other users can reach it.
	Dir string
	// Host is a registry, "127.0.0.1:PORT", that has the base images.
	Host string
}

// Open makes a bed whose registry holds the base images named. A base image
// that this machine cannot make skips the test, and says so.
func Open(t *testing.T, bases ...string) *Bed {
	t.Helper()
	dir, err := os.MkdirTemp("", "kiln-test-*") // t.TempDir is closed to other users
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cache, err := testenv.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	set := baseimages.Open(cache, os.Stderr)
	if err := set.Ensure(t.Context()); err != nil && !errors.Is(err, baseimages.ErrMissing) {
		t.Fatal(err)
	}
	have := set.Names()
	for _, b := range bases {
		if !slices.Contains(have, b) {
			t.Skipf("there is no base image %s, and it cannot be made here: scripts/base-images.sh as root", b)
		}
	}
	reg, err := testenv.StartRegistry("127.0.0.1:0", filepath.Join(dir, "registry"), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { reg.Close() })
	if err := set.Push(t.Context(), reg.Host, bases...); err != nil {
		t.Fatal(err)
	}
	r, err := New(t.Context(), filepath.Join(dir, "kiln"))
	if err != nil {
		t.Fatal(err)
	}
	return &Bed{Runner: r, Dir: dir, Host: reg.Host}
}

// Build builds a context with REGISTRY set and pushes it as name; it returns
// the reference and what was printed. A failure fails the test.
func (b *Bed) Build(t *testing.T, context, name string, args ...string) (ref, out string) {
	t.Helper()
	ref, out, code := b.TryBuild(t, context, name, args...)
	if code != 0 {
		t.Fatalf("kiln build exits with %d:\n%s", code, out)
	}
	return ref, out
}

// TryBuild is Build for builds that may fail; it returns the exit code.
func (b *Bed) TryBuild(t *testing.T, context, name string, args ...string) (ref, out string, code int) {
	t.Helper()
	ref = b.Host + "/" + strings.ToLower(name)
	all := append([]string{
		"build", "--progress", "plain", "--push", "--insecure-registry", b.Host, "--build-arg", "REGISTRY=" + b.Host, "-t", ref,
	}, args...)
	start := time.Now()
	out, code, err := b.Run(t.Context(), append(all, context)...)
	if err != nil {
		t.Fatalf("run kiln: %v\n%s", err, out)
	}
	t.Logf("built %s in %.2f s", name, time.Since(start).Seconds())
	return ref, out, code
}
