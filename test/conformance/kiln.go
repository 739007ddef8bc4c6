package conformance

import (
	"context"
	"path/filepath"
	"strings"

	"github.com/kiln-build/kiln/test/kilnrun"
)

// kiln runs the builder under test in one store.
type kiln struct {
	*kilnrun.Runner
	host string // registry
}

// build builds and pushes a case; it returns the output and the exit code.
func (k *kiln) build(ctx context.Context, c *Case, ctxDir, ref string) (string, int, error) {
	args := k.arguments(c, ctxDir)
	if c.Pre != "" {
		base := ref + "-base"
		pre := &Case{File: c.Pre}
		if out, code, err := k.Run(ctx, append(k.arguments(pre, ctxDir), "-t", base, ctxDir)...); err != nil || code != 0 {
			return "build of the base image: " + out, code, err
		}
		args = append(args, "--build-arg", "BASE="+base, "--pull")
	}
	return k.Run(ctx, append(args, "-t", ref, ctxDir)...)
}

func (k *kiln) arguments(c *Case, ctxDir string) []string {
	args := []string{"build", "--progress", "plain", "--push", "--insecure-registry", k.host}
	return append(args, c.flags(k.host, ctxDir)...)
}

// flags is what a case asks for on a command line like docker build's.
func (c *Case) flags(host, ctxDir string) []string {
	args := []string{"--build-arg", "REGISTRY=" + host}
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
		args = append(args, "--build-context", strings.ReplaceAll(x, "$REGISTRY", host))
	}
	if c.Platform != "" {
		args = append(args, "--platform", c.Platform)
	}
	if c.Network != "" {
		args = append(args, "--network", c.Network)
	}
	return args
}
