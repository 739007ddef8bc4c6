package conformance

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// kiln runs the builder under test in one store.
type kiln struct {
	bin    string
	unpriv string // the program that takes privileges away; "" when not root
	work   string // writable for it: store and nothing else
	host   string // registry
}

// build builds and pushes a case; it returns the output and the exit code.
func (k *kiln) build(ctx context.Context, c *Case, ctxDir, ref string) (string, int, error) {
	args := k.arguments(c, ctxDir)
	if c.Pre != "" {
		base := ref + "-base"
		pre := &Case{File: c.Pre}
		if out, code, err := k.run(ctx, append(k.arguments(pre, ctxDir), "-t", base, ctxDir)); err != nil || code != 0 {
			return "build of the base image: " + out, code, err
		}
		args = append(args, "--build-arg", "BASE="+base, "--pull")
	}
	return k.run(ctx, append(args, "-t", ref, ctxDir))
}

func (k *kiln) arguments(c *Case, ctxDir string) []string {
	args := []string{"build", "--progress", "plain", "--push", "--insecure-registry", k.host, "--build-arg", "REGISTRY=" + k.host}
	if c.File != "" {
		args = append(args, "-f", filepath.Join(ctxDir, c.File))
	}
	if c.Target != "" {
		args = append(args, "--target", c.Target)
	}
	for flag, values := range map[string][]string{"--build-arg": c.Args, "--label": c.Labels} {
		for _, v := range values {
			args = append(args, flag, v)
		}
	}
	for _, h := range c.Hosts {
		args = append(args, "--add-host", strings.Replace(h, "=", ":", 1))
	}
	for _, x := range c.Contexts {
		args = append(args, "--build-context", strings.ReplaceAll(x, "$REGISTRY", k.host))
	}
	if c.Platform != "" {
		args = append(args, "--platform", c.Platform)
	}
	if c.Network != "" {
		args = append(args, "--network", c.Network)
	}
	return args
}

func (k *kiln) run(ctx context.Context, args []string) (string, int, error) {
	args = append([]string{args[0], "--root", filepath.Join(k.work, "store")}, args[1:]...)
	var cmd *exec.Cmd
	if k.unpriv != "" {
		args = append([]string{"-ro", "-rw", k.work, "-dir", k.work, "--", k.bin}, args...)
		cmd = exec.CommandContext(ctx, k.unpriv, args...)
	} else {
		cmd = exec.CommandContext(ctx, k.bin, args...)
		cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && ctx.Err() == nil {
		return string(out), exit.ExitCode(), nil
	}
	return string(out), 0, err
}
