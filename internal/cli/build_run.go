package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/registry/auth"
	"github.com/kiln-build/kiln/internal/sandbox/gvisor"
)

// build carries out a build whose flags were checked.
func (a *App) build(ctx context.Context, f *buildFlags) error {
	req, err := a.request(f)
	if err != nil {
		return err
	}
	st, err := a.openStore(f.Root)
	if err != nil {
		return err
	}
	reg, err := registry.New(registry.Options{Insecure: f.Insecure})
	if err != nil {
		return err
	}
	env := build.Env{Store: st, Registry: reg, Sandbox: gvisor.New(gvisor.Options{}), Stdout: a.Out, Environ: os.Environ()}
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
	err = a.withProgress(mode, func(rec *progress.Recorder) (err error) {
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
	if req.CacheFrom, req.CacheTo, err = f.caches(); err != nil {
		return req, err
	}
	// As docker does it, for those who cannot change the command.
	if inline, _ := strconv.ParseBool(req.BuildArgs["BUILDKIT_INLINE_CACHE"]); inline {
		req.CacheTo = append(req.CacheTo, cache.Spec{Type: cache.Inline, Mode: cache.Min})
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
		if err := export.WriteFile(f.IIDFile, text(res.ID.String())); err != nil {
			return fmt.Errorf("write --iidfile: %w", err)
		}
	}
	if f.MetadataFile != "" {
		b, err := metadata(res)
		if err != nil {
			return err
		}
		if err := export.WriteFile(f.MetadataFile, text(string(b))); err != nil {
			return fmt.Errorf("write --metadata-file: %w", err)
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

// metadata is what buildx writes into --metadata-file.
func metadata(res *build.Result) ([]byte, error) {
	m := map[string]any{}
	if res.ID != "" {
		m["containerimage.config.digest"] = res.ID
		m["containerimage.digest"] = res.Digest
		m["containerimage.descriptor"] = ocispec.Descriptor{
			MediaType: res.Descriptor.MediaType, Digest: res.Descriptor.Digest, Size: res.Descriptor.Size, Platform: res.Descriptor.Platform,
		}
	}
	if len(res.Tags) > 0 {
		m["image.name"] = strings.Join(res.Tags, ",")
	}
	b, err := json.MarshalIndent(m, "", "  ")
	return append(b, '\n'), err
}

func text(s string) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := io.WriteString(w, s)
		return err
	}
}
