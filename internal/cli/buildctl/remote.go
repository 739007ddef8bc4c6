package buildctl

import (
	"context"
	"encoding/csv"
	"os"
	"strings"

	"github.com/kiln-build/kiln/internal/buildkitd/ctl"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/registry/auth"
	"github.com/kiln-build/kiln/internal/secret"
	"github.com/kiln-build/kiln/internal/sshagent"
)

// remote has a server build.
func (b *builder) remote(ctx context.Context, c *ctl.Client, way string) error {
	r, err := b.remoteRequest()
	if err != nil {
		return err
	}
	var res *ctl.Result
	if err := b.show(func(rec *progress.Recorder) (err error) {
		rec.Note(way)
		res, err = c.Build(ctx, r, rec)
		return err
	}); err != nil {
		return err
	}
	if b.MetadataFile != "" {
		if err := writeMetadata(b.MetadataFile, res.Metadata); err != nil {
			return err
		}
	}
	return printAnswer(b.Out, res.Answer)
}

// remoteRequest translates the flags, all but those that the client itself obeys.
func (b *builder) remoteRequest() (ctl.Request, error) {
	f := b.buildFlags
	r := ctl.Request{
		Ref: b.ref, Frontend: f.Frontend, Allow: f.Allow, ProxyNetwork: f.ProxyNetwork, Keychain: auth.Default(), Stdout: b.Out,
	}
	if len(f.AuthTLS) > 0 {
		return r, diag.New(diag.ExitUsage, "--registry-auth-tlscontext is not supported with a server: it is the server that gets tokens").
			WithHint("Give the server the registry's certificates, in its buildkitd.toml.")
	}
	if len(f.Layouts) > 0 {
		return r, diag.New(diag.ExitUsage, "--oci-layout is not supported with a server").
			WithHint("Push the image to a registry, or build without a server.")
	}
	var err error
	if r.Locals, err = pairs("local", f.Locals); err != nil {
		return r, err
	}
	if r.Attrs, err = f.options(b.Getenv); err != nil {
		return r, err
	}
	if r.Definition, err = b.definition(); err != nil {
		return r, err
	}
	if f.NoCache && r.Definition == nil {
		r.Attrs["no-cache"] = ""
	}
	if err := b.lend(&r); err != nil {
		return r, err
	}
	if f.SourcePolicy != "" {
		if r.SourcePolicy, err = os.ReadFile(f.SourcePolicy); err != nil {
			return r, diag.New(diag.ExitUsage, "--source-policy-file: %w", err)
		}
	}
	for _, l := range []struct {
		flag   string
		values []string
		to     *[]ctl.Entry
	}{{"output", f.Outputs, &r.Outputs}, {"export-cache", f.CacheTo, &r.CacheTo}, {"import-cache", f.CacheFrom, &r.CacheFrom}} {
		for _, v := range l.values {
			e, err := entry(l.flag, v)
			if err != nil {
				return r, err
			}
			*l.to = append(*l.to, e)
		}
	}
	for i := range r.CacheTo {
		if a := r.CacheTo[i].Attrs; a["mode"] == "" {
			a["mode"] = "min"
		}
	}
	return r, nil
}

// lend opens the secrets and agents that are passed to steps.
func (b *builder) lend(r *ctl.Request) error {
	secrets, agents, err := b.sources()
	if err != nil {
		return err
	}
	lookup := func(name string) (string, bool) { v := b.Getenv(name); return v, v != "" }
	if len(secrets) > 0 {
		if r.Secrets, err = secret.Open(secrets, lookup); err != nil {
			return diag.New(diag.ExitUsage, "%w", err)
		}
	}
	if len(agents) > 0 {
		if r.SSH, err = sshagent.Open(agents, b.Getenv); err != nil {
			return diag.New(diag.ExitUsage, "%w", err)
		}
	}
	return nil
}

// entry reads type=TYPE,KEY=VALUE…; a cache may be the name of an image alone, as it could be once.
func entry(flag, s string) (ctl.Entry, error) {
	if flag != "output" && !strings.Contains(s, "type=") {
		return ctl.Entry{Type: "registry", Attrs: map[string]string{"ref": s}}, nil
	}
	fields, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return ctl.Entry{}, diag.New(diag.ExitUsage, "invalid --%s %q: %w", flag, s, err)
	}
	kv, err := pairs(flag, fields)
	if err != nil {
		return ctl.Entry{}, err
	}
	e := ctl.Entry{Type: kv["type"], Attrs: map[string]string{}}
	for k, v := range kv {
		if k = strings.ToLower(k); k != "type" {
			e.Attrs[k] = v
		}
	}
	if e.Type == "" {
		return e, diag.New(diag.ExitUsage, "invalid --%s %q: it needs type=TYPE", flag, s)
	}
	return e, nil
}

// definition is what comes on standard input when no front end is named; nil if one is.
func (b *builder) definition() (*frontend.Definition, error) {
	if b.Frontend != "" {
		return nil, nil
	}
	if f, ok := b.In.(*os.File); ok {
		if fi, err := f.Stat(); err == nil && fi.Mode()&os.ModeCharDevice != 0 {
			return nil, diag.New(diag.ExitUsage, "there is neither --frontend nor an LLB definition on standard input").
				WithHint("For a Dockerfile: --frontend dockerfile.v0")
		}
	}
	def, err := frontend.ReadDefinition(b.In, b.NoCache)
	if err != nil {
		return nil, diag.New(diag.ExitUsage, "%w", err).WithHint("For a Dockerfile: --frontend dockerfile.v0")
	}
	return def, nil
}
