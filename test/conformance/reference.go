package conformance

import (
	"context"
	"fmt"

	"github.com/kiln-build/kiln/test/compare"
	"github.com/kiln-build/kiln/test/refbuild"
)

// builder builds a case from a written context and pushes it to ref. It returns
// its output and exit code; an error means that it could not be run.
type builder interface {
	build(ctx context.Context, c *Case, ctxDir, ref string) (out string, code int, err error)
}

// reference is what a builder, that Kiln is compared with, makes of the cases.
type reference struct {
	name    string // the builder's
	salt    string // what all answers depend on: the builder's version, base images
	answers refbuild.Answers
}

// kept returns an answer of an earlier run, or nil.
func (r *reference) kept(c *Case) (*refbuild.Answer, error) { return r.answers.Kept(r.key(c)) }

func (r *reference) key(c *Case) string { return c.Name + "-" + c.key(r.salt)[:16] }

// ask lets b build a case from ctxDir, by way of ref, and keeps the answer.
func (r *reference) ask(ctx context.Context, b builder, c *Case, ctxDir, ref string) error {
	out, code, err := b.build(ctx, c, ctxDir, ref)
	if err != nil {
		return fmt.Errorf("ask %s for %s: %w", r.name, c.Name, err)
	}
	a := refbuild.Answer{Log: out}
	if code == 0 {
		if a.Image, err = compare.Open(ref); err != nil {
			return err
		}
	}
	return r.answers.Keep(r.key(c), a)
}
