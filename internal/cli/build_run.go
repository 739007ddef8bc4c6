package cli

import (
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
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
	if err := a.settle(f); err != nil {
		return err
	}
	req, err := a.request(f)
	if err != nil {
		return err
	}
	env, err := a.Env(f.Root, f.StoreLimit, append(req.InsecureHosts(), f.Insecure...))
	if err != nil {
		return err
	}
	switch {
	case f.Print == "plan":
		text, err := build.Plan(ctx, env, req)
		if err != nil {
			return err
		}
		_, err = io.WriteString(a.Out, text)
		return err
	case f.call.question != "":
		return a.ask(ctx, f, env, req)
	}
	if err := removeStale(f.IIDFile); err != nil {
		return err
	}
	var (
		res   *build.Result
		found []progress.Finding
	)
	err = a.WithProgress(f.mode, f.Debug, func(rec *progress.Recorder) (err error) {
		env.Progress = rec
		f.say(rec)
		res, err = build.Run(ctx, env, req)
		found = rec.Findings()
		return err
	})
	if err != nil {
		return err
	}
	return a.report(f, res, found)
}

// settle finds out what depends on the environment.
func (a *App) settle(f *buildFlags) (err error) {
	if f.mode, err = progress.Mode(f.Progress, a.Getenv); err != nil {
		return diag.New(diag.ExitUsage, "%w", err)
	}
	f.Quiet = f.Quiet || f.Progress == "quiet"
	if f.Quiet {
		f.mode = "quiet"
	}
	if v := a.Getenv("DOCKER_DEFAULT_PLATFORM"); v != "" && len(f.Platforms) == 0 {
		f.Platforms = strings.Split(v, ",")
	}
	const policy = "EXPERIMENTAL_BUILDKIT_SOURCE_POLICY"
	if v := a.Getenv(policy); v != "" {
		return diag.New(diag.ExitUsage, "%s=%s is not supported: policies of sources are not", policy, v).
			WithHint("Unset it, and name base images by digest.")
	}
	return nil
}

// say says of options what there is to say.
func (f *buildFlags) say(rec *progress.Recorder) {
	for _, n := range f.notes {
		rec.Note(n)
	}
}

// removeStale removes what an earlier build wrote: whoever does not look at the exit code must not find it.
func removeStale(file string) error {
	fi, err := os.Lstat(file)
	if file == "" || err != nil || !fi.Mode().IsRegular() {
		return nil
	}
	if err := os.Remove(file); err != nil {
		return fmt.Errorf("remove the old --iidfile: %w", err)
	}
	return nil
}

// request translates flags.
func (a *App) request(f *buildFlags) (build.Request, error) {
	req := build.Request{
		Context: f.Context, Dockerfile: f.File, Stdin: a.In, Tags: f.Tags, Target: f.Target,
		BuildArgs: map[string]string{}, Labels: map[string]string{}, Contexts: map[string]string{},
		NoCache: f.NoCache, NoCacheFilter: f.NoCacheOf, Pull: f.Pull, Network: f.Network, AddHosts: f.AddHosts, Timeout: f.Timeout,
		Compression: layer.Compression(f.Compression),
	}
	if err := f.stepFlags.apply(&req); err != nil {
		return req, err
	}
	for _, p := range f.Platforms {
		pl := platforms.DefaultSpec()
		if p != "local" {
			var err error
			if pl, err = platforms.Parse(p); err != nil {
				return req, diag.New(diag.ExitUsage, "platform %q: %w", p, err)
			}
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
	for _, s := range f.Annotations {
		as, err := export.ParseAnnotation(s)
		if err != nil {
			return req, err
		}
		req.Annotations = append(req.Annotations, as...)
	}
	if req.CacheFrom, req.CacheTo, err = caches(f.CacheFrom, f.CacheTo); err != nil {
		return req, err
	}
	if req.MountsFrom, req.MountsTo, err = caches(f.MountsFrom, f.MountsTo); err != nil {
		return req, err
	}
	req.Outputs, err = f.outputs()
	return req, err
}

// outputs are those of --output, --push and --load. As with buildx, --push makes an
// image that is an output anyway go to registries, too.
func (f *buildFlags) outputs() (all []export.Spec, err error) {
	pushed, loaded := false, false
	for _, o := range f.Outputs {
		sp, err := export.ParseSpec(o)
		if err != nil {
			return nil, err
		}
		if sp.Type == export.Image && f.Push {
			sp.Push = true
		}
		pushed = pushed || sp.ToRegistry()
		loaded = loaded || sp.ToStore()
		all = append(all, sp)
	}
	if f.Push && !pushed {
		all = append(all, export.Spec{Type: export.Registry})
	}
	if f.Load && !loaded {
		all = append(all, export.Spec{Type: export.Docker})
	}
	return all, nil
}

// report writes what a finished build is called to where it was asked for.
func (a *App) report(f *buildFlags, res *build.Result, found []progress.Finding) error {
	if f.IIDFile != "" && res.ID != "" {
		if err := console.WriteText(f.IIDFile, res.ID.String()); err != nil {
			return fmt.Errorf("write --iidfile: %w", err)
		}
	}
	if f.MetadataFile != "" {
		if on, _ := strconv.ParseBool(a.Getenv("BUILDX_METADATA_WARNINGS")); !on {
			found = nil
		}
		if err := console.WriteMetadata(f.MetadataFile, res, found); err != nil {
			return err
		}
	}
	switch {
	case res.ID == "", slices.Contains([]string{"json", "rawjson", "none"}, f.mode): // files alone, or who reads it looks elsewhere
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
