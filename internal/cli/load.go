package cli

import (
	"context"
	"fmt"
	"os"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

func newLoadCommand(app *App) *cobra.Command {
	var input string
	var quiet bool
	cmd := &cobra.Command{
		Use:   "load [OPTIONS]",
		Short: "Put the images of an archive into the store",
		Long: `Put the images of an archive into the store, under the names that they have there:
archives of 'docker save', podman, buildah, skopeo and kiln, compressed or not, and
directories with an OCI layout.`,
		Example: `  kiln load -i app.tar
  docker save app:1.0 | kiln load`,
		Args: nargs(0, 0),
	}
	cmd.Flags().StringVarP(&input, "input", "i", "", "read from this file, or OCI layout directory, instead of standard input")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print nothing")
	root := app.StoreFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if in, ok := app.In.(*os.File); input == "" && ok && term.IsTerminal(int(in.Fd())) {
			return usageError(cmd, "nothing to load: standard input is a terminal").WithHint("Name a file with --input.")
		}
		loaded, err := app.load(cmd.Context(), *root, input)
		if err != nil || quiet {
			return err
		}
		for _, l := range loaded {
			text := "Loaded image: " + familiar(l.Ref)
			if l.Ref == "" {
				text = "Loaded image ID: " + l.ID.String()
			}
			if _, err := fmt.Fprintln(app.Out, text); err != nil {
				return fmt.Errorf("write output: %w", err)
			}
		}
		return nil
	}
	return cmd
}

func (a *App) load(ctx context.Context, root, input string) ([]image.Loaded, error) {
	if input != "" {
		if _, err := os.Stat(input); err != nil {
			return nil, diag.New(diag.ExitFailure, "load images: %w", err)
		}
	}
	st, err := a.OpenStore(root)
	if err != nil {
		return nil, err
	}
	release, err := st.Use(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	if input != "" {
		return image.LoadPath(ctx, st, input)
	}
	return image.Load(ctx, st, a.In)
}
