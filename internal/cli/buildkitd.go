package cli

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/user"
	"strconv"
	"time"

	"github.com/kiln-build/kiln/internal/buildkitd"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/sandbox/gvisor"
	"github.com/spf13/cobra"
)

// buildkitdFlags are the options of the server.
type buildkitdFlags struct {
	Addrs         []string
	Root          string
	Cert, Key, CA string
	Group         string
	Entitlements  []string
	Insecure      []string
	Grace         time.Duration
	Debug         bool
}

func newBuildkitdCommand(app *App) *cobra.Command {
	f := &buildkitdFlags{}
	cmd := &cobra.Command{
		Use:   "buildkitd [OPTIONS]",
		Short: "Serve BuildKit's API, for buildctl and docker buildx",
		Long: `Serve BuildKit's API until it is interrupted, so that buildctl, docker buildx and
programs that use BuildKit's client build with Kiln, without privilege and without a
change to them.

Whoever can connect can build, and use what a build can reach: by default that is the
user alone. docs/buildkit-api.md says what is supported and what is refused.`,
		Example: `  kiln buildkitd --addr unix:///tmp/buildkitd.sock &
  buildctl --addr unix:///tmp/buildkitd.sock build --frontend dockerfile.v0 \
    --local context=. --local dockerfile=. \
    --output type=image,name=registry.example/app,push=true

  docker buildx create --name kiln --driver remote unix:///tmp/buildkitd.sock
  docker buildx build --builder kiln -t registry.example/app --push .

  # For other machines: clients need a certificate of the CA
  kiln buildkitd --addr tcp://0.0.0.0:1234 \
    --tlscert server.pem --tlskey server-key.pem --tlscacert ca.pem`,
		Args: nargs(0, 0),
	}
	fl := cmd.Flags()
	fl.StringArrayVar(&f.Addrs, "addr", nil, "address to listen on, unix://PATH or tcp://HOST:PORT; may be given more than once (default the socket that BuildKit's clients expect)")
	fl.StringVar(&f.Root, "root", "", "directory of the local store (default $KILN_ROOT, or kiln in the user's data directory)")
	fl.StringVar(&f.Cert, "tlscert", "", "certificate of the server, for tcp addresses")
	fl.StringVar(&f.Key, "tlskey", "", "key of the certificate")
	fl.StringVar(&f.CA, "tlscacert", "", "certificates of the CA that clients must have theirs from")
	fl.StringVar(&f.Group, "group", "", "group whose members may use Unix sockets, by name or id (default the user alone)")
	fl.StringArrayVar(&f.Entitlements, "allow-insecure-entitlement", nil, "entitlement that clients may be granted: network.host")
	fl.StringArrayVar(&f.Insecure, "insecure-registry", nil, insecureHelp)
	fl.DurationVar(&f.Grace, "grace", 10*time.Second, "how long builds may go on after SIGTERM")
	fl.BoolVar(&f.Debug, "debug", false, "log requests that fail")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		for _, e := range f.Entitlements {
			switch e {
			case "network.host":
			case "security.insecure", "device":
				return usageError(cmd, "--allow-insecure-entitlement %s cannot be granted: there is no privilege to give", e)
			default:
				return usageError(cmd, "invalid --allow-insecure-entitlement %q: use network.host", e)
			}
		}
		return app.buildkitd(cmd.Context(), f)
	}
	return cmd
}

func (a *App) buildkitd(ctx context.Context, f *buildkitdFlags) error {
	level := slog.LevelInfo
	if f.Debug {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(a.Err, &slog.HandlerOptions{Level: level}))
	lo := buildkitd.ListenOptions{GID: -1}
	var err error
	if f.Cert+f.Key+f.CA != "" {
		if lo.TLS, err = buildkitd.ServerTLS(f.Cert, f.Key, f.CA); err != nil {
			return err
		}
	}
	if f.Group != "" {
		if lo.GID, err = groupID(f.Group); err != nil {
			return err
		}
	}
	st, err := a.OpenStore(f.Root)
	if err != nil {
		return err
	}
	s, err := buildkitd.New(buildkitd.Options{
		Store: st, Sandbox: gvisor.New(gvisor.Options{}), Registry: registry.Options{Insecure: f.Insecure, Logger: log},
		Environ: os.Environ(), Version: buildVersion().Revision, Log: log, Entitlements: f.Entitlements,
	})
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
		a.announce(log, addr, l, lo.TLS)
	}
	return s.Serve(ctx, f.Grace, ls...)
}

// announce says where the server listens, and who may use it.
func (a *App) announce(log *slog.Logger, addr string, l net.Listener, t *tls.Config) {
	fmt.Fprintf(a.Out, "Listening on %s://%s\n", l.Addr().Network(), l.Addr())
	if !buildkitd.Open(l) {
		return
	}
	switch {
	case t == nil:
		log.Warn("anyone who can reach this address can build here, read what builds read, and sees what clients send: use --tlscert, --tlskey and --tlscacert", "addr", addr)
	case t.ClientCAs == nil:
		log.Warn("anyone who can reach this address can build here: use --tlscacert to let in those with a certificate alone", "addr", addr)
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
