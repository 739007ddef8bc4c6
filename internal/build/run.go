package build

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/docker/go-units"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/engine/llb"
	"github.com/kiln-build/kiln/internal/frontend"
)

// Run builds. It either does all that the request asks for, or returns an
// error and has given no tag to anything.
func Run(ctx context.Context, env Env, req Request) (*Result, error) {
	ctx, cancel := limited(ctx, req)
	defer cancel()
	x, err := exports(req) // first: what is wrong with it costs nothing
	if err != nil {
		return nil, err
	}
	var res *Result
	err = withPlan(ctx, env, req, func(b *Build, p *frontend.Plan) (err error) {
		res, err = b.Export(ctx, p, x)
		return err
	})
	env.collect(ctx)
	if err != nil {
		return nil, because(ctx, err)
	}
	return res, nil
}

// collect keeps the store to its limit. A build does not fail for that.
func (e Env) collect(ctx context.Context) {
	if ctx.Err() != nil {
		return // somebody waits for the end
	}
	rep, err := e.Store.Collect(ctx, e.Limit)
	switch {
	case err != nil:
		e.Progress.Warn("keep the store to its limit: " + err.Error())
	case rep.Bytes > 0:
		e.Progress.Note(fmt.Sprintf("removed %s of what was used longest ago from the store, to keep it to its limit", units.HumanSize(float64(rep.Bytes))))
	}
}

// Ask asks the front end about the Dockerfile, and builds nothing.
func Ask(ctx context.Context, env Env, req Request, q frontend.Question) (*frontend.Answer, error) {
	ctx, cancel := limited(ctx, req)
	defer cancel()
	var a *frontend.Answer
	err := withBuild(ctx, env, req, func(b *Build, in frontend.Input) (err error) {
		in.Files = b
		a, err = frontend.Ask(ctx, in, q, b, b.Progress)
		return err
	})
	if err != nil {
		return nil, because(ctx, err)
	}
	return a, nil
}

// limited ends when the request's time is over.
func limited(ctx context.Context, req Request) (context.Context, context.CancelFunc) {
	if req.Timeout <= 0 {
		return ctx, func() {}
	}
	return context.WithTimeoutCause(ctx, req.Timeout,
		diag.New(diag.ExitTimeout, "the build took longer than --timeout %s", req.Timeout))
}

// exports is what a request says of outputs.
func exports(req Request) (Export, error) {
	outs, err := outputs(req)
	return Export{Outputs: outs, Compression: req.Compression, CacheTo: req.CacheTo, MountsTo: req.MountsTo}, err
}

// withPlan opens the build that a request asks for, makes its plan, and calls f with both.
func withPlan(ctx context.Context, env Env, req Request, f func(*Build, *frontend.Plan) error) error {
	return withBuild(ctx, env, req, func(b *Build, in frontend.Input) error {
		plan, err := b.plan(ctx, in)
		if err != nil {
			return err
		}
		return f(b, plan)
	})
}

// withBuild opens the build that a request asks for, and calls f with it.
func withBuild(ctx context.Context, env Env, req Request, f func(*Build, frontend.Input) error) error {
	c, err := openContexts(ctx, env, req)
	defer func() {
		if err := c.closers.close(); err != nil {
			env.Progress.Warn("close: " + err.Error())
		}
	}()
	if err != nil {
		return err
	}
	b, err := Open(ctx, env, Inputs{Contexts: c.trees, Layouts: c.layouts, Pull: req.Pull, CacheFrom: req.CacheFrom, MountsFrom: req.MountsFrom})
	if err != nil {
		return err
	}
	defer func() {
		if err := b.Close(); err != nil {
			env.Progress.Warn("close: " + err.Error())
		}
	}()
	return f(b, c.input)
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
