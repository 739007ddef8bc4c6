package cli

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/kiln-build/kiln/internal/cli/console"
	"github.com/kiln-build/kiln/internal/registryserver"
	"github.com/spf13/cobra"
)

func newRegistryCommand(app *App) *cobra.Command {
	var addr, root string
	var quiet bool
	cmd := &cobra.Command{
		Use:   "registry [OPTIONS]",
		Short: "Run a registry on this machine",
		Long: `Run a registry on this machine until it is interrupted, so that images can be pushed and
pulled with nothing else installed. It keeps what it is given across restarts.

It has no users and no TLS, so it listens on loopback unless told otherwise: whoever can
reach its address can read and replace every image.`,
		Example: `  kiln registry &
  kiln build -t localhost:5000/app --push .

  # On a free port, with its content in a directory of its own
  kiln registry --addr 127.0.0.1:0 --root /srv/registry`,
		Args: nargs(0, 0),
	}
	cmd.Flags().StringVar(&addr, "addr", registryserver.DefaultAddr, "HOST:PORT to listen on; port 0: any free one")
	cmd.Flags().StringVar(&root, "root", "", "directory of what is pushed (default beside the local store, its name with -registry)")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "do not show requests")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if root == "" {
			dir, err := console.StoreRoot("", app.Getenv)
			if err != nil {
				return err
			}
			root = dir + "-registry"
		}
		dir, err := filepath.Abs(root)
		if err != nil {
			return fmt.Errorf("find directory %q: %w", root, err)
		}
		o := registryserver.Options{Root: dir, Addr: addr}
		if !quiet {
			o.AccessLog = app.Err
		}
		return app.registry(cmd.Context(), o)
	}
	return cmd
}

func (a *App) registry(ctx context.Context, o registryserver.Options) error {
	s, err := registryserver.Start(o)
	if err != nil {
		return err
	}
	fmt.Fprintf(a.Out, "Registry on %s, content in %s\n", s.Addr(), o.Root)
	<-ctx.Done()
	return s.Close()
}
