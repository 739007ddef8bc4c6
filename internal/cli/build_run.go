package cli

import (
	"context"
	"fmt"
	"io"
	"maps"
	"strings"

	"github.com/containerd/platforms"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/cli/console"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/registry/auth"
)

// build carries out a build whose flags were checked.
func (a *App) build(ctx context.Context, f *buildFlags) error {
	req, err := a.request(f)
	if err != nil {
		return err
	}
	env, err := a.Env(f.Root, f.Insecure)
	if err != nil {
		return err
	}
	if f.Print == "plan" {
		text, err := build.Plan(ctx, env, req)
		if err != nil {
			return err
		}
		_, err = io.WriteString(a.Out, text)
		return err
	}
	mode := f.Progress
	if f.Quiet {
		mode = "quiet"
	}
	var res *build.Result
	err = a.WithProgress(mode, f.Debug, func(rec *progress.Recorder) (err error) {
		env.Progress = rec
		if res, err = build.Run(ctx, env, req); err != nil {
			return err
		}
		return nil
	})
	if err != nil {
		return err
	}
	return a.report(f, res)
}

// request translates flags.
func (a *App) request(f *buildFlags) (build.Request, error) {
	req := build.Request{
		Context: f.Context, Dockerfile: f.File, Stdin: a.In, Tags: f.Tags, Target: f.Target,
		BuildArgs: map[string]string{}, Labels: map[string]string{}, Contexts: map[string]string{},
		NoCache: f.NoCache, Pull: f.Pull, Network: f.Network, AddHosts: f.AddHosts, Timeout: f.Timeout,
		Compression: layer.Compression(f.Compression),
	}
	for _, p := range f.Platforms {
		pl, err := platforms.Parse(p)
		if err != nil {
			return req, diag.New(diag.ExitUsage, "platform %q: %w", p, err)
		}
		req.Platforms = append(req.Platforms, pl)
	}
	// As docker does it: proxies for RUN steps come from its config, never from
	// the builder's own environment, where they may have a password.
	proxies, err := auth.Proxies()
	if err != nil {
		return req, err
	}
	maps.Copy(req.BuildArgs, proxies)
	if v := a.Getenv("SOURCE_DATE_EPOCH"); v != "" {
		req.BuildArgs["SOURCE_DATE_EPOCH"] = v
	}
	for _, kv := range f.BuildArgs {
		k, v, ok := strings.Cut(kv, "=")
		if !ok {
			if v = a.Getenv(k); v == "" {
				continue // as docker: a name alone that is not set passes nothing
			}
		}
		req.BuildArgs[k] = v
	}
	for _, kv := range f.Labels {
		k, v, _ := strings.Cut(kv, "=")
		req.Labels[k] = v
	}
	for _, kv := range f.BuildContext {
		k, v, _ := strings.Cut(kv, "=")
		req.Contexts[k] = v
	}
	for _, o := range f.Outputs {
		sp, err := export.ParseSpec(o)
		if err != nil {
			return req, err
		}
		req.Outputs = append(req.Outputs, sp)
	}
	if f.Push {
		req.Outputs = append(req.Outputs, export.Spec{Type: export.Registry})
	}
	return req, nil
}

// report writes what a finished build is called to where it was asked for.
func (a *App) report(f *buildFlags, res *build.Result) error {
	if f.IIDFile != "" && res.ID != "" {
		if err := console.WriteText(f.IIDFile, res.ID.String()); err != nil {
			return fmt.Errorf("write --iidfile: %w", err)
		}
	}
	if f.MetadataFile != "" {
		if err := console.WriteMetadata(f.MetadataFile, res); err != nil {
			return err
		}
	}
	switch {
	case res.ID == "": // files alone
	case f.Quiet:
		fmt.Fprintln(a.Out, res.ID)
	default:
		for _, n := range res.Pushed {
			fmt.Fprintf(a.Err, "pushed %s\n", n)
		}
		fmt.Fprintf(a.Err, "image  %s\ndigest %s\n", res.ID, res.Digest)
	}
	return nil
}
