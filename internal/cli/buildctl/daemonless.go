package buildctl

import (
	"cmp"
	"io"
	"os"
	"strings"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/buildkitd"
	"github.com/kiln-build/kiln/internal/cli/console"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/spf13/pflag"
)

// daemonFlags are those of $BUILDKITD_FLAGS, by which buildctl-daemonless.sh is told how to
// start its server.
type daemonFlags struct {
	Root, Config string
}

// parseDaemonFlags reads them as the shell does that has them unquoted. What would
// change a build and cannot be had is refused by name.
func parseDaemonFlags(s string) (daemonFlags, error) {
	var f daemonFlags
	fl := pflag.NewFlagSet("BUILDKITD_FLAGS", pflag.ContinueOnError)
	fl.SetOutput(io.Discard)
	fl.StringVar(&f.Root, "root", "", "")
	fl.StringVar(&f.Config, "config", "", "")
	allow := fl.StringArray("allow-insecure-entitlement", nil, "")
	containerd := fl.Bool("containerd-worker", false, "")
	for _, n := range []string{"debug", "rootless", "oci-worker", "oci-worker-rootless", "oci-worker-no-process-sandbox", "oci-worker-gc", "oci-worker-selinux"} {
		fl.Bool(n, false, "")
	}
	for _, n := range []string{
		"addr", "log-format", "group", "oci-worker-snapshotter", "oci-worker-labels", "oci-worker-platform", "oci-worker-net",
		"oci-worker-gc-keepstorage", "oci-worker-binary", "oci-worker-apparmor-profile", "oci-worker-proxy-snapshotter-path", "oci-cni-config-path",
		"oci-cni-binary-dir", "oci-max-parallelism",
	} {
		fl.StringArray(n, nil, "")
	}
	fail := func(format string, a ...any) (daemonFlags, error) {
		return f, diag.New(diag.ExitUsage, "BUILDKITD_FLAGS: "+format, a...).
			WithHint("There is no buildkitd here: the build runs in this process. Flags that mean something for a build are --root, --config and --allow-insecure-entitlement network.host.")
	}
	if err := fl.Parse(Arguments(strings.Fields(s))); err != nil {
		return fail("%w", err)
	}
	if fl.NArg() > 0 {
		return fail("%q is no flag", fl.Arg(0))
	}
	if *containerd {
		return fail("--containerd-worker is not supported")
	}
	for _, e := range *allow {
		// security.insecure is granted by many, and asked for by few: a step that does is refused.
		if e != "network.host" && e != "security.insecure" {
			return fail("--allow-insecure-entitlement %s cannot be granted", e)
		}
	}
	return f, nil
}

// config is what a server that were started for a command would be told, and where its store is; empty: where
// Kiln's is.
func (s *server) config() (c *buildkitd.Config, root string, err error) {
	var f daemonFlags
	if s.daemonless {
		if f, err = parseDaemonFlags(s.Getenv("BUILDKITD_FLAGS")); err != nil {
			return nil, "", err
		}
	}
	asked := f.Config != ""
	if !asked {
		f.Config = buildkitd.DefaultConfig(os.Geteuid(), s.Getenv)
	}
	if c, _, err = buildkitd.ReadConfig(f.Config, asked); err != nil {
		return nil, "", err
	}
	if asked {
		f.Root = cmp.Or(f.Root, c.Root)
	}
	return c, console.BelowRoot(f.Root), nil
}

// env is what a build in this process works with: as a server that were started for it would.
func (s *server) env(req *build.Request, certs map[string]registry.Certs) (build.Env, error) {
	c, root, err := s.config()
	if err != nil {
		return build.Env{}, err
	}
	o := registry.Options{Insecure: req.InsecureHosts(), Certs: certs}
	c.Registries(&o)
	env, err := s.EnvWith(root, "", o)
	env.Parallel = c.Worker.OCI.Parallelism
	return env, err
}
