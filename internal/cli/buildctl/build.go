package buildctl

import (
	"crypto/rand"
	"encoding/csv"
	"encoding/hex"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/secret"
	"github.com/kiln-build/kiln/internal/sshagent"
	"github.com/spf13/cobra"
)

// buildFlags are buildctl build's.
type buildFlags struct {
	Outputs      []string
	Progress     string
	Locals       []string // NAME=DIR
	Layouts      []string // NAME=DIR
	Frontend     string
	Opts         []string // K=V
	NoCache      bool
	Secrets      []string
	SSH          []string
	Allow        []string
	ExportCache  []string
	ImportCache  []string
	MetadataFile string
	RefFile      string
}

func newBuildFlags(cmd *cobra.Command) *buildFlags {
	f := &buildFlags{}
	fl := cmd.Flags()
	fl.StringArrayVarP(&f.Outputs, "output", "o", nil, "where the result goes, such as type=image,name=docker.io/username/image,push=true")
	fl.StringVar(&f.Progress, "progress", "auto", "how to show progress: auto, plain, tty, rawjson, quiet")
	fl.StringArrayVar(&f.Locals, "local", nil, "let the build read a directory, NAME=DIR")
	fl.StringArrayVar(&f.Layouts, "oci-layout", nil, "let the build read an OCI layout, NAME=DIR")
	fl.StringVar(&f.Frontend, "frontend", "", "front end of the build: dockerfile.v0, or gateway.v0 with --opt source=docker/dockerfile")
	fl.StringArrayVar(&f.Opts, "opt", nil, "option of the front end, such as target=foo or build-arg:foo=bar")
	fl.BoolVar(&f.NoCache, "no-cache", false, "run every step, use no cached result")
	fl.StringArrayVar(&f.Secrets, "secret", nil, "secret for steps that mount it, id=ID[,src=FILE|,env=VARIABLE]")
	fl.StringArrayVar(&f.SSH, "ssh", nil, "SSH agent for steps that mount it, default|ID[=SOCKET|KEYFILE[,KEYFILE]]")
	fl.StringArrayVar(&f.Allow, "allow", nil, "accepted: network.host needs no permission, security.insecure cannot be had")
	fl.StringArrayVar(&f.ExportCache, "export-cache", nil, "write the cache, such as type=registry,ref=example.com/foo/bar or type=local,dest=path/to/dir")
	fl.StringArrayVar(&f.ImportCache, "import-cache", nil, "read a cache, such as type=registry,ref=example.com/foo/bar or type=local,src=path/to/dir")
	fl.StringVar(&f.MetadataFile, "metadata-file", "", "write what is known of the result to this file, as JSON")
	fl.StringVar(&f.RefFile, "ref-file", "", "write the build's reference to this file")
	return f
}

// request translates the flags. getenv gives the values of build arguments that have none.
func (f *buildFlags) request(getenv func(string) string) (build.Request, error) {
	req := build.Request{
		BuildArgs: map[string]string{}, Labels: map[string]string{}, NoCache: f.NoCache, Compression: layer.Gzip,
	}
	var err error
	if req.Locals, err = pairs("local", f.Locals); err != nil {
		return req, err
	}
	if req.Layouts, err = pairs("oci-layout", f.Layouts); err != nil {
		return req, err
	}
	if err := f.passed(&req); err != nil {
		return req, err
	}
	opts, err := pairs("opt", withValues(f.Opts, getenv))
	if err != nil {
		return req, err
	}
	if v := getenv("SOURCE_DATE_EPOCH"); v != "" {
		req.BuildArgs["SOURCE_DATE_EPOCH"] = v
	}
	if err := f.frontend(opts); err != nil {
		return req, err
	}
	if err := take(&req, opts); err != nil {
		return req, err
	}
	for _, s := range f.ImportCache {
		sp, err := cache.ParseFrom(s)
		if err != nil {
			return req, err
		}
		req.CacheFrom = append(req.CacheFrom, sp...)
	}
	for _, s := range f.ExportCache {
		sp, err := cache.ParseTo(s)
		if err != nil {
			return req, err
		}
		req.CacheTo = append(req.CacheTo, sp)
	}
	for _, o := range f.Outputs {
		sp, err := parseOutput(o)
		if err != nil {
			return req, err
		}
		req.Outputs = append(req.Outputs, sp)
	}
	return req, nil
}

// passed translates what is passed to steps.
func (f *buildFlags) passed(req *build.Request) error {
	for _, v := range f.Secrets {
		s, err := secret.Parse(v)
		if err != nil {
			return diag.New(diag.ExitUsage, "invalid --secret: %w", err)
		}
		req.Secrets = append(req.Secrets, s)
	}
	for _, v := range f.SSH {
		s, err := sshagent.Parse(v)
		if err != nil {
			return diag.New(diag.ExitUsage, "invalid --ssh %q: %w", v, err)
		}
		req.SSH = append(req.SSH, s)
	}
	for _, a := range f.Allow {
		if a != "network.host" && a != "security.insecure" {
			return diag.New(diag.ExitUsage, "invalid --allow %q: there are network.host and security.insecure", a)
		}
	}
	return nil
}

// frontend checks that it is the one that is built in.
func (f *buildFlags) frontend(opts map[string]string) error {
	switch f.Frontend {
	case "dockerfile.v0":
		return nil
	case "gateway.v0":
		src := opts["source"]
		if src == "" {
			return diag.New(diag.ExitUsage, "--frontend gateway.v0 needs the front end's image: --opt source=docker/dockerfile")
		}
		// Whether it is the one that is built in is checked where # syntax= is.
		opts["build-arg:BUILDKIT_SYNTAX"] = src
		for _, k := range []string{"source", "cmdline"} {
			delete(opts, k)
		}
		return nil
	}
	return diag.New(diag.ExitUsage, "front end %q is not supported", f.Frontend).WithHint("There is dockerfile.v0.")
}

// take moves the options that a request has fields for into them; the rest stays as it is.
func take(req *build.Request, opts map[string]string) error {
	req.Attrs = map[string]string{}
	for k, v := range opts {
		if name, ok := strings.CutPrefix(k, "build-arg:"); ok {
			req.BuildArgs[name] = v
			continue
		}
		if name, ok := strings.CutPrefix(k, "label:"); ok {
			req.Labels[name] = v
			continue
		}
		switch k {
		case "target":
			req.Target = v
		case "platform":
			for p := range strings.SplitSeq(v, ",") {
				pl, err := platforms.Parse(p)
				if err != nil {
					return diag.New(diag.ExitUsage, "--opt platform=%s: %w", v, err)
				}
				req.Platforms = append(req.Platforms, pl)
			}
		case "image-resolve-mode":
			req.Pull = v == "pull"
		default:
			req.Attrs[k] = v
		}
	}
	return nil
}

// withValues gives build arguments that have no value the environment's, and leaves out those without one there.
func withValues(opts []string, getenv func(string) string) (out []string) {
	for _, o := range opts {
		if name, ok := strings.CutPrefix(o, "build-arg:"); ok && name != "" && !strings.Contains(name, "=") {
			v := getenv(name)
			if v == "" {
				continue
			}
			o += "=" + v
		}
		out = append(out, o)
	}
	return out
}

// pairs reads K=V; of two for one K the last counts.
func pairs(flag string, values []string) (map[string]string, error) {
	m := map[string]string{}
	for _, v := range values {
		k, val, ok := strings.Cut(v, "=")
		if !ok || k == "" {
			return nil, diag.New(diag.ExitUsage, "invalid --%s %q: it is not of the form NAME=VALUE", flag, v)
		}
		m[k] = val
	}
	return m, nil
}

// parseOutput reads --output: as kiln build does it, but archives go to
// standard output if they have nowhere else to go.
func parseOutput(s string) (sp export.Spec, err error) {
	fields, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return sp, diag.New(diag.ExitUsage, "invalid --output %q: %w", s, err)
	}
	kv, err := pairs("output", fields)
	if err != nil {
		return sp, err
	}
	switch kv["type"] {
	case "":
		return sp, diag.New(diag.ExitUsage, "invalid --output %q: it needs type=TYPE", s)
	case "oci", "docker", "tar":
		if kv["dest"] == "" && kv["tar"] != "false" {
			fields = append(slices.DeleteFunc(fields, func(f string) bool { return f == "dest=" }), "dest=-")
		}
	}
	var b strings.Builder
	w := csv.NewWriter(&b)
	_ = w.Write(fields) // to memory, which does not fail
	w.Flush()
	return export.ParseSpec(strings.TrimSuffix(b.String(), "\n"))
}

// newRef is a name for a build that no other has.
func newRef() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}
