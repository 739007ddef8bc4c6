package conformance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"

	"github.com/kiln-build/kiln/test/compare"
	"github.com/kiln-build/kiln/test/refbuild"
)

// oracle knows what BuildKit makes of a case, from earlier runs or by asking it.
type oracle struct {
	dir    string // of the kept answers
	salt   string // what all cases depend on: BuildKit's version, base images
	host   string // registry
	daemon *refbuild.Daemon
}

// answer is BuildKit's: an image, or a failure with its output.
type answer struct {
	image v1.Image
	log   string
}

func (o *oracle) path(c *Case) string { return filepath.Join(o.dir, c.Name+"-"+c.key(o.salt)[:16]) }

// kept returns an answer of an earlier run, or nil.
func (o *oracle) kept(c *Case) (*answer, error) {
	dir := o.path(c)
	log, err := os.ReadFile(filepath.Join(dir, "log"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	a := &answer{log: string(log)}
	if _, err := os.Stat(filepath.Join(dir, "failed")); err == nil {
		return a, nil
	}
	if a.image, err = compare.Open("oci:" + dir); err != nil {
		return nil, err
	}
	return a, nil
}

// ask builds a case in ctxDir with BuildKit and keeps the answer.
func (o *oracle) ask(ctx context.Context, c *Case, ctxDir string) (*answer, error) {
	ref := o.host + "/oracle/" + c.Name
	out, code, err := o.build(ctx, c, ctxDir, ref)
	if err != nil {
		return nil, err
	}
	a := &answer{log: out}
	if code == 0 {
		if a.image, err = compare.Open(ref); err != nil {
			return nil, err
		}
	}
	return a, o.keep(c, a)
}

// build builds and pushes a case; it returns the output, and 1 if the build failed.
func (o *oracle) build(ctx context.Context, c *Case, ctxDir, ref string) (string, int, error) {
	req := refbuild.Request{Context: ctxDir, Dockerfile: c.File, Target: c.Target, NoCache: true, Ref: ref, Opts: o.options(c)}
	if c.Pre != "" {
		base := req
		base.Dockerfile, base.Target, base.Ref = c.Pre, "", req.Ref+"-base"
		if out, err := o.daemon.Build(ctx, base); err != nil {
			return out, 1, fmt.Errorf("build base with BuildKit: %w\n%s", err, out)
		}
		req.Opts = append(req.Opts, "build-arg:BASE="+base.Ref)
	}
	out, err := o.daemon.Build(ctx, req)
	if errors.Is(err, refbuild.ErrBuild) {
		return out, 1, nil
	}
	return out, 0, err
}

func (o *oracle) options(c *Case) []string {
	opts := []string{"build-arg:REGISTRY=" + o.host}
	for _, a := range c.Args {
		opts = append(opts, "build-arg:"+a)
	}
	for _, l := range c.Labels {
		opts = append(opts, "label:"+l)
	}
	for _, x := range c.Contexts {
		opts = append(opts, "context:"+strings.ReplaceAll(x, "$REGISTRY", o.host))
	}
	if c.Platform != "" {
		opts = append(opts, "platform="+c.Platform)
	}
	if c.Network != "" {
		opts = append(opts, "force-network-mode="+c.Network)
	}
	if len(c.Hosts) > 0 {
		opts = append(opts, "add-hosts="+strings.Join(c.Hosts, ","))
	}
	return opts
}

// keep writes an answer whole or not at all.
func (o *oracle) keep(c *Case, a *answer) error {
	if err := os.MkdirAll(o.dir, 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(o.dir, ".new-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	if a.image == nil {
		err = os.WriteFile(filepath.Join(tmp, "failed"), nil, 0o644)
	} else {
		var p layout.Path
		if p, err = layout.Write(tmp, empty.Index); err == nil {
			err = p.AppendImage(a.image)
		}
	}
	if err != nil {
		return fmt.Errorf("keep BuildKit's answer: %w", err)
	}
	if err := os.WriteFile(filepath.Join(tmp, "log"), []byte(a.log), 0o644); err != nil {
		return err
	}
	if err := os.RemoveAll(o.path(c)); err != nil {
		return err
	}
	return os.Rename(tmp, o.path(c))
}
