package buildctl

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/kiln-build/kiln/internal/buildkitd"
	"github.com/kiln-build/kiln/internal/buildkitd/ctl"
	"github.com/kiln-build/kiln/internal/cli/console"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/spf13/cobra"
)

// server are the options of all commands: which server is meant, if any.
type server struct {
	*console.Console
	ctl.Address
	Seconds    int // of Address.Timeout
	LogFormat  string
	Debug      bool
	daemonless bool // whatever else is said
}

func (s *server) flags(cmd *cobra.Command) {
	fl := cmd.PersistentFlags()
	fl.SortFlags = false
	fl.StringVar(&s.Addr, "addr", "", "address of a BuildKit server that is to build, unix://PATH or tcp://HOST:PORT (default $BUILDKIT_HOST)")
	fl.StringVar(&s.ServerName, "tlsservername", "", "name in the server's certificate (default the host in the address)")
	fl.StringVar(&s.CA, "tlscacert", "", "certificate of the CA that the server's is from")
	fl.StringVar(&s.Cert, "tlscert", "", "certificate of the client")
	fl.StringVar(&s.Key, "tlskey", "", "key of that certificate")
	fl.StringVar(&s.Dir, "tlsdir", "", "directory with all three: ca.pem, cert.pem and key.pem, or ca.crt, tls.crt and tls.key")
	fl.IntVar(&s.Seconds, "timeout", 5, "seconds to wait for the server's first answer")
	fl.BoolVar(&s.Wait, "wait", false, "wait for a server that is not up yet")
	fl.BoolVar(&s.Debug, "debug", false, "show all that is known of warnings")
	fl.StringVar(&s.LogFormat, "log-format", "text", "accepted for BuildKit's sake: there is no log")
}

func (s *server) check() error {
	if s.LogFormat != "json" && s.LogFormat != "text" && s.LogFormat != "" {
		return diag.New(diag.ExitUsage, "invalid --log-format %q: there are json and text", s.LogFormat)
	}
	if s.Seconds < 0 {
		return diag.New(diag.ExitUsage, "invalid --timeout %d: it is a number of seconds", s.Seconds)
	}
	return nil
}

// connect connects to the server that is meant: the one that is named, or one that answers where BuildKit's
// own is by default. Without one the client is nil. way says in a line which it is.
func (s *server) connect(ctx context.Context) (c *ctl.Client, way string, err error) {
	if err := s.check(); err != nil {
		return nil, "", err
	}
	const here = "building in this process"
	if s.daemonless {
		return nil, here, nil
	}
	a := s.Address
	a.Timeout = time.Duration(s.Seconds) * time.Second
	if a.Addr == "" {
		a.Addr = s.Getenv("BUILDKIT_HOST")
	}
	if a.Addr == "" {
		a.Addr = buildkitd.DefaultAddr(os.Geteuid(), s.Getenv)
		if !listens(a.Addr) {
			return nil, fmt.Sprintf("%s: no server is named (--addr, BUILDKIT_HOST), and none listens at %s", here, a.Addr), nil
		}
	}
	c, err = ctl.Dial(ctx, a)
	return c, "building with the server at " + a.Addr, err
}

// need is connect for what cannot be done without a server.
func (s *server) need(ctx context.Context, cmd *cobra.Command, hint string) (*ctl.Client, error) {
	c, _, err := s.connect(ctx)
	if err == nil && c == nil {
		err = diag.New(diag.ExitUsage, "'%s' needs a BuildKit server, and there is none here", cmd.CommandPath()).WithHint("%s", hint)
	}
	return c, err
}

// listens reports whether there is somebody at a Unix socket.
func listens(addr string) bool {
	path, ok := strings.CutPrefix(addr, "unix://")
	if !ok {
		return false
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err != nil {
		return false
	}
	c.Close()
	return true
}
