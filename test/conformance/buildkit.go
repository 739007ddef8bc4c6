package conformance

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/kiln-build/kiln/test/refbuild"
)

// buildkit is the reference: a case's image is what BuildKit makes of it.
type buildkit struct {
	daemon *refbuild.Daemon
	host   string // registry
}

func (o *buildkit) build(ctx context.Context, c *Case, ctxDir, ref string) (string, int, error) {
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

func (o *buildkit) options(c *Case) []string {
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
