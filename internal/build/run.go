package build

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/go-units"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/engine/llb"
	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/secret"
	"github.com/kiln-build/kiln/internal/sshagent"
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
	env.note(req)
	var res *Result
	err = withPlan(ctx, env, req, func(b *Build, p *frontend.Plan) (err error) {
		res, err = b.Export(ctx, p, x)
		return err
	})
	env.Collect(ctx)
	if err != nil {
		return nil, diag.Ended(ctx, err)
	}
	return res, nil
}

// Collect keeps the store to its limit, after a build. A build does not fail for that.
func (e Env) Collect(ctx context.Context) {
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
		return nil, diag.Ended(ctx, err)
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

// note says what is asked for in a way that has no effect here.
func (e Env) note(req Request) {
	if req.Attrs["cgroup-parent"] != "" {
		e.Progress.Note("cgroup-parent has no meaning here: steps are in the builder's control group")
	}
}

// exports is what a request says of outputs.
func exports(req Request) (Export, error) {
	outs, err := outputs(req)
	x := Export{Outputs: outs, Compression: req.Compression, CacheTo: req.CacheTo, MountsTo: req.MountsTo}
	isInline := func(s cache.Spec) bool { return s.Type == cache.Inline }
	if on, _ := strconv.ParseBool(req.BuildArgs["BUILDKIT_INLINE_CACHE"]); on && !slices.ContainsFunc(x.CacheTo, isInline) {
		x.CacheTo = append(slices.Clip(x.CacheTo), cache.Spec{Type: cache.Inline, Mode: cache.Min})
	}
	return x, err
}

// withPlan opens the build that a request asks for, makes its plan, and calls f with both.
func withPlan(ctx context.Context, env Env, req Request, f func(*Build, *frontend.Plan) error) error {
	return withBuild(ctx, env, req, func(b *Build, in frontend.Input) error {
		plan, err := b.plan(ctx, req, in)
		if err != nil {
			return err
		}
		return f(b, plan)
	})
}

// withBuild opens the build that a request asks for, and calls f with it.
func withBuild(ctx context.Context, env Env, req Request, f func(*Build, frontend.Input) error) error {
	in := Inputs{Pull: req.Pull}
	if err := in.pass(env, req); err != nil {
		return err
	}
	c, err := openContexts(ctx, env, req)
	defer func() {
		if err := c.closers.close(); err != nil {
			env.Progress.Warn("close: " + err.Error())
		}
	}()
	if err != nil {
		return err
	}
	in.Contexts, in.Layouts, in.CacheFrom, in.MountsFrom = c.trees, c.layouts, req.CacheFrom, req.MountsFrom
	b, err := Open(ctx, env, in)
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

// pass opens the secrets and agents that a request passes to a build.
func (in *Inputs) pass(env Env, req Request) error {
	lookup := func(name string) (string, bool) {
		for _, kv := range slices.Backward(env.Environ) {
			if k, v, ok := strings.Cut(kv, "="); ok && k == name {
				return v, true
			}
		}
		return "", false
	}
	secrets, err := secret.Open(req.Secrets, lookup)
	if err != nil {
		return diag.New(diag.ExitUsage, "%w", err)
	}
	agents, err := sshagent.Open(req.SSH, func(name string) string { v, _ := lookup(name); return v })
	if err != nil {
		return diag.New(diag.ExitUsage, "%w", err)
	}
	in.Secrets, in.SSH = secrets, agents
	return nil
}

func (b *Build) plan(ctx context.Context, req Request, in frontend.Input) (*frontend.Plan, error) {
	if req.Definition != nil {
		res := &frontend.Result{Ref: req.Definition}
		return res.Plan()
	}
	res, err := b.Frontend(ctx, in)
	if err != nil {
		return nil, err
	}
	return res.Plan()
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
