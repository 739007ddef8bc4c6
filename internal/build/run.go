package build

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/engine/llb"
	"github.com/kiln-build/kiln/internal/frontend"
)

// Run builds. It either does all that the request asks for, or returns an
// error and has given no tag to anything.
func Run(ctx context.Context, env Env, req Request) (*Result, error) {
	if req.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, req.Timeout,
			diag.New(diag.ExitTimeout, "the build took longer than --timeout %s", req.Timeout))
		defer cancel()
	}
	res, err := run(ctx, env, req)
	if err != nil {
		return nil, because(ctx, err)
	}
	return res, nil
}

func run(ctx context.Context, env Env, req Request) (*Result, error) {
	x, err := exports(req) // first: what is wrong with it costs nothing
	if err != nil {
		return nil, err
	}
	var res *Result
	err = withPlan(ctx, env, req, func(b *Build, p *frontend.Plan) (err error) {
		res, err = b.Export(ctx, p, x)
		return err
	})
	return res, err
}

// exports is what a request says of outputs.
func exports(req Request) (Export, error) {
	outs, err := outputs(req)
	return Export{Outputs: outs, Compression: req.Compression}, err
}

// withPlan opens the build that a request asks for, and calls f with it.
func withPlan(ctx context.Context, env Env, req Request, f func(*Build, *frontend.Plan) error) error {
	c, err := openContexts(ctx, env, req)
	defer func() {
		if err := c.closers.close(); err != nil {
			env.Progress.Warn("close: " + err.Error())
		}
	}()
	if err != nil {
		return err
	}
	b, err := Open(ctx, env, Inputs{Contexts: c.trees, Layouts: c.layouts, Pull: req.Pull})
	if err != nil {
		return err
	}
	defer func() {
		if err := b.Close(); err != nil {
			env.Progress.Warn("close: " + err.Error())
		}
	}()
	plan, err := b.plan(ctx, c.input)
	if err != nil {
		return err
	}
	return f(b, plan)
}

func (b *Build) plan(ctx context.Context, in frontend.Input) (*frontend.Plan, error) {
	res, err := b.Frontend(ctx, in)
	if err != nil {
		return nil, err
	}
	return res.Plan()
}

// because prefers the reason why a context ended to what that led to. A time
// that is over keeps the place in the Dockerfile where it was.
func because(ctx context.Context, err error) error {
	c := context.Cause(ctx)
	if c == nil {
		return err
	}
	var have *diag.Error
	if !errors.Is(c, context.Canceled) && errors.As(err, &have) && have.At != nil {
		return &diag.Error{Err: c, At: have.At, Code: diag.ExitCode(c)}
	}
	return c
}

// Plan makes the plan of a build and describes it, without building.
func Plan(ctx context.Context, env Env, req Request) (string, error) {
	var s strings.Builder
	if _, err := exports(req); err != nil {
		return "", err
	}
	err := withPlan(ctx, env, req, func(_ *Build, plan *frontend.Plan) error {
		for _, p := range plan.Platforms {
			g, err := llb.Decode(p.Definition)
			if err != nil {
				return err
			}
			fmt.Fprintf(&s, "platform %s/%s\n", p.Platform.OS, p.Platform.Architecture)
			g.Print(&s)
		}
		return nil
	})
	return s.String(), err
}
