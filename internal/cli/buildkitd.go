package cli

import (
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/user"
	"strconv"
	"strings"
	"time"

	"github.com/kiln-build/kiln/internal/buildkitd"
	"github.com/kiln-build/kiln/internal/cli/console"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/sandbox/gvisor"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/spf13/cobra"
)

// buildkitdFlags are the options of the server.
type buildkitdFlags struct {
	Addrs           []string
	Root            string
	Config          string
	TLS             struct{ Cert, Key, CA string }
	Group           string
	Entitlements    []string
	Insecure        []string
	Grace           time.Duration
	Debug           bool
	WorkerLabels    []string // K=V
	OCI, Containerd bool
	GC              bool
	StoreLimit      string
	Parallelism     int

	config *buildkitd.Config // what was read of Config
}

const buildkitdLong = `Serve BuildKit's API until it is interrupted, so that buildctl, docker buildx and
programs that use BuildKit's client build with Kiln, without privilege and without a
change to them.

Whoever can connect can build, and use what a build can reach: by default that is the
user alone. docs/buildkit-api.md says what is supported and what is refused. Options of
buildkitd about its workers are accepted where they change nothing; there is one worker,
which is Kiln.`

const buildkitdExample = `  kiln buildkitd --addr unix:///tmp/buildkitd.sock &
  buildctl --addr unix:///tmp/buildkitd.sock build --frontend dockerfile.v0 \
    --local context=. --local dockerfile=. \
    --output type=image,name=registry.example/app,push=true

  docker buildx create --name kiln --driver remote unix:///tmp/buildkitd.sock
  docker buildx build --builder kiln -t registry.example/app --push .

  # For other machines: clients need a certificate of the CA
  kiln buildkitd --addr tcp://0.0.0.0:1234 \
    --tlscert server.pem --tlskey server-key.pem --tlscacert ca.pem`

func newBuildkitdCommand(app *App) *cobra.Command {
	f := &buildkitdFlags{}
	cmd := &cobra.Command{
		Use: "buildkitd [OPTIONS]", Short: "Serve BuildKit's API, for buildctl and docker buildx",
		Long: buildkitdLong, Example: buildkitdExample, Args: nargs(0, 0),
	}
	fl := cmd.Flags()
	fl.StringArrayVar(&f.Addrs, "addr", nil, "address to listen on, unix://PATH or tcp://HOST:PORT; may be given more than once (default the socket that BuildKit's clients expect)")
	fl.StringVar(&f.Root, "root", "", "directory of the local store, or of other things besides, among which it gets the directory kiln (default $KILN_ROOT, or kiln in the user's data directory)")
	fl.StringVar(&f.StoreLimit, "store-limit", "", "how large the store may be after a build, 20GB, 60% of its disk or none (default the configuration file's, $KILN_STORE_LIMIT, or 80% up to 100GB, with 20% of the disk free)")
	fl.StringVar(&f.Config, "config", "", "buildkitd.toml; settings in it that have no effect are named in the log (default BuildKit's place for it)")
	fl.StringVar(&f.TLS.Cert, "tlscert", "", "certificate of the server, for tcp addresses")
	fl.StringVar(&f.TLS.Key, "tlskey", "", "key of the certificate")
	fl.StringVar(&f.TLS.CA, "tlscacert", "", "certificates of the CA that clients must have theirs from")
	fl.StringVar(&f.Group, "group", "", "group whose members may use Unix sockets, by name or id (default the user alone)")
	fl.StringArrayVar(&f.Entitlements, "allow-insecure-entitlement", nil, "entitlement that clients may be granted: network.host")
	fl.StringArrayVar(&f.Insecure, "insecure-registry", nil, insecureHelp)
	fl.DurationVar(&f.Grace, "grace", 10*time.Second, "how long builds may go on after SIGTERM")
	fl.BoolVar(&f.Debug, "debug", false, "log requests that fail")
	fl.StringSliceVar(&f.WorkerLabels, "oci-worker-labels", nil, "labels of the worker, KEY=VALUE")
	fl.IntVar(&f.Parallelism, "oci-max-parallelism", 0, "how many RUN steps of a build run at the same time (default the number of processors)")
	fl.BoolVar(&f.OCI, "oci-worker", true, "accepted for BuildKit's sake; there is no other worker")
	fl.BoolVar(&f.Containerd, "containerd-worker", false, "accepted for BuildKit's sake, if false")
	fl.BoolVar(&f.GC, "oci-worker-gc", true, "keep the store to its limit")
	for _, n := range []string{"oci-worker-rootless", "oci-worker-no-process-sandbox", "rootless"} {
		fl.Bool(n, false, "accepted for BuildKit's sake")
		_ = fl.MarkHidden(n)
	}
	for _, n := range []string{"oci-worker-snapshotter", "oci-worker-net", "log-format", "log-level"} {
		fl.String(n, "", "accepted for BuildKit's sake")
		_ = fl.MarkHidden(n)
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		o, err := app.buildkitdOptions(cmd, f)
		if err != nil {
			return err
		}
		return app.buildkitd(cmd.Context(), f, o)
	}
	return cmd
}

// buildkitdOptions completes flags by the configuration file, and makes options of them.
func (a *App) buildkitdOptions(cmd *cobra.Command, f *buildkitdFlags) (o buildkitd.Options, err error) {
	asked := f.Config != ""
	if !asked {
		f.Config = buildkitd.DefaultConfig(os.Geteuid(), a.Getenv)
	}
	c, ignored, err := buildkitd.ReadConfig(f.Config, asked)
	if err != nil {
		return o, err
	}
	f.complete(c)
	f.config = c
	o.Log = newLog(a.Err, f.Debug)
	for _, name := range ignored {
		o.Log.Warn("this setting of the configuration has no effect", "setting", name, "file", f.Config)
	}
	if !f.OCI || f.Containerd {
		return o, usageError(cmd, "there is one worker, which --oci-worker=false or --containerd-worker would do without")
	}
	for _, e := range f.Entitlements {
		switch e {
		case "network.host":
		case "security.insecure", "device":
			return o, usageError(cmd, "--allow-insecure-entitlement %s cannot be granted: there is no privilege to give", e)
		default:
			return o, usageError(cmd, "invalid --allow-insecure-entitlement %q: use network.host", e)
		}
	}
	o.Labels = c.Worker.OCI.Labels
	for _, l := range f.WorkerLabels {
		k, v, ok := strings.Cut(l, "=")
		if !ok || k == "" {
			return o, usageError(cmd, "invalid --oci-worker-labels %q: it is not of the form KEY=VALUE", l)
		}
		if o.Labels == nil {
			o.Labels = map[string]string{}
		}
		o.Labels[k] = v
	}
	o.Registry = registry.Options{Insecure: f.Insecure, Logger: o.Log}
	o.Entitlements, o.Parallel = f.Entitlements, f.Parallelism
	o.History = c.History.MaxEntries
	c.Registries(&o.Registry)
	return o, nil
}

// complete takes from a configuration what no flag says.
func (f *buildkitdFlags) complete(c *buildkitd.Config) {
	if len(f.Addrs) == 0 {
		f.Addrs = c.GRPC.Address
	}
	if f.Group == "" && c.GRPC.GID != nil {
		f.Group = strconv.Itoa(*c.GRPC.GID)
	}
	if len(f.Entitlements) == 0 {
		f.Entitlements = c.Entitlements
	}
	f.Root = cmp.Or(f.Root, c.Root)
	f.TLS.Cert, f.TLS.Key, f.TLS.CA = cmp.Or(f.TLS.Cert, c.GRPC.TLS.Cert), cmp.Or(f.TLS.Key, c.GRPC.TLS.Key), cmp.Or(f.TLS.CA, c.GRPC.TLS.CA)
	f.Debug = f.Debug || c.Debug || c.Log.Level == "debug" || c.Log.Level == "trace"
	f.Parallelism = cmp.Or(f.Parallelism, c.Worker.OCI.Parallelism)
	if e := c.Worker.OCI.Enabled; e != nil && !*e {
		f.OCI = false
	}
}

func newLog(w io.Writer, debug bool) *slog.Logger {
	level := slog.LevelInfo
	if debug {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}

// buildkitd serves until ctx ends.
func (a *App) buildkitd(ctx context.Context, f *buildkitdFlags, o buildkitd.Options) (err error) {
	lo := buildkitd.ListenOptions{GID: -1}
	if f.TLS.Cert+f.TLS.Key+f.TLS.CA != "" {
		if lo.TLS, err = buildkitd.ServerTLS(f.TLS.Cert, f.TLS.Key, f.TLS.CA); err != nil {
			return err
		}
	}
	if f.Group != "" {
		if lo.GID, err = groupID(f.Group); err != nil {
			return err
		}
	}
	if o.Store, err = a.OpenStore(console.BelowRoot(f.Root)); err != nil {
		return err
	}
	if o.Limit, err = f.limit(o.Store, a.Getenv); err != nil {
		return err
	}
	o.Sandbox, o.Environ, o.Version = gvisor.New(gvisor.Options{}), os.Environ(), buildVersion().Revision
	s, err := buildkitd.New(o)
	if err != nil {
		return err
	}
	if len(f.Addrs) == 0 {
		f.Addrs = []string{buildkitd.DefaultAddr(os.Geteuid(), a.Getenv)}
	}
	var ls []net.Listener
	for _, addr := range f.Addrs {
		l, err := buildkitd.Listen(addr, lo)
		if err != nil {
			for _, l := range ls {
				l.Close()
			}
			return err
		}
		ls = append(ls, l)
		a.announce(o.Log, l, lo.TLS)
	}
	return s.Serve(ctx, f.Grace, ls...)
}

// limit is how large the store may become: what a flag says goes before the configuration, and that before the environment.
func (f *buildkitdFlags) limit(st *store.Store, getenv func(string) string) (store.Limit, error) {
	if !f.GC {
		return store.Limit{}, nil
	}
	if f.StoreLimit == "" {
		if l, ok, err := f.config.Limit(st); ok || err != nil {
			return l, err
		}
	}
	return st.ParseLimit(cmp.Or(f.StoreLimit, getenv("KILN_STORE_LIMIT")))
}

// announce says where the server listens, and who may use it.
func (a *App) announce(log *slog.Logger, l net.Listener, t *tls.Config) {
	fmt.Fprintf(a.Out, "Listening on %s://%s\n", l.Addr().Network(), l.Addr())
	if !buildkitd.Open(l) {
		return
	}
	switch {
	case t == nil:
		log.Warn("anyone who can reach this address can build here, and read and change what others send: use --tlscert, --tlskey and --tlscacert", "addr", l.Addr())
	case t.ClientCAs == nil:
		log.Warn("anyone who can reach this address can build here: with --tlscacert, those who have a certificate alone", "addr", l.Addr())
	}
}

// groupID is the id of a group, which may be given as it is.
func groupID(s string) (int, error) {
	if n, err := strconv.Atoi(s); err == nil && n >= 0 {
		return n, nil
	}
	g, err := user.LookupGroup(s)
	if err != nil {
		return 0, diag.New(diag.ExitUsage, "--group: %w", err)
	}
	return strconv.Atoi(g.Gid)
}
