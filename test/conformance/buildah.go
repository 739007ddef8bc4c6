package conformance

import (
	"context"
	"errors"
	"fmt"

	"github.com/kiln-build/kiln/test/compare"
	"github.com/kiln-build/kiln/test/refbuild"
)

// buildah is the second opinion: another reading of the Dockerfile, by people
// who have never seen BuildKit's code.
type buildah struct {
	*refbuild.Buildah
	host string // registry
}

func (b *buildah) build(ctx context.Context, c *Case, ctxDir, ref string) (string, int, error) {
	flags := c.flags(b.host, ctxDir)
	if c.Pre != "" {
		base, pre := ref+"-base", &Case{File: c.Pre}
		if out, err := b.Build(ctx, ctxDir, base, pre.flags(b.host, ctxDir)...); err != nil {
			return out, 1, fmt.Errorf("build base with buildah: %w\n%s", err, out)
		}
		flags = append(flags, "--build-arg", "BASE="+base)
	}
	if c.Network == "" {
		flags = append(flags, "--network", "host") // as BuildKit and Kiln have it here
	}
	out, err := b.Build(ctx, ctxDir, ref, flags...)
	if errors.Is(err, refbuild.ErrBuild) {
		return out, 1, nil
	}
	return out, 0, err
}

// meaning is how Kiln's image is compared with buildah's: leaving out what is each
// builder's own choice, the cut into layers, the history and the times.
func (c *Case) meaning() compare.Options {
	return compare.Options{Ignore: append(refbuild.BuildahPlaces(), c.Compare.Ignore...), Meaning: true}
}
