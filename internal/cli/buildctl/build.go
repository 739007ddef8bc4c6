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
	CacheTo      []string
	CacheFrom    []string
	AuthTLS      []string // host=HOST[,ca=FILE][,cert=FILE,key=FILE]
	SourcePolicy string
	ProxyNetwork bool
	MetadataFile string
	RefFile      string
	Trace        string
	CacheMetrics string
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
	fl.StringArrayVar(&f.Allow, "allow", nil, "permissions that a server is asked for, network.host or security.insecure; without one nothing needs network.host, and the other cannot be had")
	fl.StringArrayVar(&f.CacheTo, "export-cache", nil, "cache to write, such as type=registry,ref=REF")
	fl.StringArrayVar(&f.CacheFrom, "import-cache", nil, "cache to read, such as type=registry,ref=REF")
	fl.StringArrayVar(&f.AuthTLS, "registry-auth-tlscontext", nil, "certificates for a registry, host=HOST[,ca=FILE][,cert=FILE,key=FILE]")
	fl.StringVar(&f.SourcePolicy, "source-policy-file", "", "policy of sources, as JSON; for a server")
	fl.BoolVar(&f.ProxyNetwork, "proxy-network", false, "let steps reach the network by a proxy only; for a server")
	fl.StringVar(&f.Trace, "trace", "", "append to this file what --progress=rawjson would show")
	fl.StringVar(&f.CacheMetrics, "debug-json-cache-metrics", "", "not supported")
	_ = fl.MarkHidden("debug-json-cache-metrics")
	fl.StringVar(&f.MetadataFile, "metadata-file", "", "write what is known of the result to this file, as JSON")
	fl.StringVar(&f.RefFile, "ref-file", "", "write the build's reference to this file")
	return f
}

// check refuses what no build has here.
func (f *buildFlags) check() error {
	if f.CacheMetrics != "" {
		return diag.New(diag.ExitUsage, "--debug-json-cache-metrics is not supported").
			WithHint("--trace FILE has what each step took, and which came from a cache.")
	}
	for _, a := range f.Allow {
		if a != "network.host" && a != "security.insecure" && a != "device" && !strings.HasPrefix(a, "device=") {
			return diag.New(diag.ExitUsage, "invalid --allow %q: there are network.host, security.insecure and device", a)
		}
	}
	return nil
}

// options are those of the front end. getenv gives the values of build arguments that have none.
func (f *buildFlags) options(getenv func(string) string) (map[string]string, error) {
	opts, err := pairs("opt", withValues(f.Opts, getenv))
	if err != nil {
		return nil, err
	}
	const epoch = "SOURCE_DATE_EPOCH"
	if v := getenv(epoch); v != "" && opts["build-arg:"+epoch] == "" {
		opts["build-arg:"+epoch] = v
	}
	return opts, nil
}

// request translates the flags for a build in this process, all but those that are about
// where it runs.
func (f *buildFlags) request(getenv func(string) string) (build.Request, error) {
	req := build.Request{
		BuildArgs: map[string]string{}, Labels: map[string]string{}, NoCache: f.NoCache, Compression: layer.Gzip,
	}
	if err := f.here(); err != nil {
		return req, err
	}
	var err error
	if req.Locals, err = pairs("local", f.Locals); err != nil {
		return req, err
	}
	if req.Layouts, err = pairs("oci-layout", f.Layouts); err != nil {
		return req, err
	}
	if req.Secrets, req.SSH, err = f.sources(); err != nil {
		return req, err
	}
	opts, err := f.options(getenv)
	if err != nil {
		return req, err
	}
	if f.Frontend != "" {
		if err := f.frontend(opts); err != nil {
			return req, err
		}
	}
	if err := take(&req, opts); err != nil {
		return req, err
	}
	if err := f.caches(&req); err != nil {
		return req, err
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

// caches are those that are to be read and written.
func (f *buildFlags) caches(req *build.Request) error {
	for _, v := range f.CacheFrom {
		specs, err := cache.ParseFrom(v)
		if err != nil {
			return err
		}
		req.CacheFrom = append(req.CacheFrom, specs...)
	}
	for _, v := range f.CacheTo {
		spec, err := cache.ParseTo(v)
		if err != nil {
			return err
		}
		req.CacheTo = append(req.CacheTo, spec)
	}
	return nil
}

// here refuses what only a server could do.
func (f *buildFlags) here() error {
	refused := func(flag, why string) *diag.Error {
		return diag.New(diag.ExitUsage, "--%s is not supported: %s", flag, why)
	}
	switch {
	case f.SourcePolicy != "":
		return refused("source-policy-file", "policies of sources are not").WithHint("Name base images by digest.")
	case f.ProxyNetwork:
		return refused("proxy-network", "steps reach the network, or with --network=none they do not")
	}
	for _, a := range f.Allow {
		if strings.HasPrefix(a, "device") {
			return refused("allow "+a, "there are no devices to give")
		}
	}
	return nil
}

// sources are the secrets and agents that are passed to steps.
func (f *buildFlags) sources() (secrets []secret.Source, agents []sshagent.Source, err error) {
	for _, v := range f.Secrets {
		s, err := secret.Parse(v)
		if err != nil {
			return nil, nil, diag.New(diag.ExitUsage, "invalid --secret: %w", err)
		}
		secrets = append(secrets, s)
	}
	for _, v := range f.SSH {
		s, err := sshagent.Parse(v)
		if err != nil {
			return nil, nil, diag.New(diag.ExitUsage, "invalid --ssh %q: %w", v, err)
		}
		agents = append(agents, s)
	}
	return secrets, agents, nil
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
