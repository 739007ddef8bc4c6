package cli

import (
	"fmt"
	"strings"

	"github.com/kiln-build/kiln/internal/cli/console"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/spf13/cobra"
)

func newTagCommand(app *App) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "tag [OPTIONS] IMAGE NAME[:TAG]",
		Short: "Give an image in the store another name",
		Long: `Give an image in the store another name. If another image has the name, it loses
it. The image's name must begin with the registry's to be pushed there.`,
		Example:           "  kiln tag app:1.0 registry.example/team/app:1.0",
		Args:              nargs(2, 2),
		ValidArgsFunction: app.completeImages,
	}
	root := app.StoreFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		target, err := taggable(args[1])
		if err != nil {
			return err
		}
		st, err := app.OpenStore(*root)
		if err != nil {
			return err
		}
		release, err := st.Use(cmd.Context())
		if err != nil {
			return err
		}
		defer release()
		img, err := find(st, args[0])
		if err != nil {
			return err
		}
		return st.SetTag(target, img.Desc)
	}
	return cmd
}

func newRmiCommand(app *App) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "rmi [OPTIONS] IMAGE...",
		Short: "Remove names of images from the store",
		Long: `Remove names of images from the store. An image without a name is not listed any
more; what it consists of stays, because builds may need it, until 'kiln prune'.

An image that is given by its ID loses all its names; with --force also if it has more
than one.`,
		Example:           "  kiln rmi app:1.0 app:1.1",
		Args:              nargs(1, -1),
		ValidArgsFunction: app.completeImages,
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "remove all names of an image given by its ID; an image that is not there is no error")
	root := app.StoreFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		st, err := app.OpenStore(*root)
		if err != nil {
			return err
		}
		var failed error
		for _, name := range args {
			if err := app.rmi(cmd, st, name, force); err != nil {
				if failed != nil {
					console.PrintError(app.Err, failed)
				}
				failed = err
			}
		}
		return failed
	}
	return cmd
}

func (a *App) rmi(cmd *cobra.Command, st *store.Store, name string, force bool) error {
	refs, err := refsOf(cmd, st, name, force)
	if err != nil {
		return err
	}
	for _, ref := range refs {
		if err := st.DeleteTag(ref); err != nil && !notFound(err) {
			return err
		}
		if _, err := fmt.Fprintln(a.Out, "Untagged:", familiar(ref)); err != nil {
			return fmt.Errorf("write output: %w", err)
		}
	}
	return nil
}

// refsOf are the names that 'rmi name' removes.
func refsOf(cmd *cobra.Command, st *store.Store, name string, force bool) ([]string, error) {
	if nameless(name) {
		if _, err := st.Tag(name); err == nil {
			return []string{name}, nil
		}
	} else if ref, err := registry.NormalizeRef(name); err == nil {
		if _, err := st.Tag(ref); err == nil {
			return []string{ref}, nil
		}
	}
	img, err := find(st, name)
	if err != nil {
		if force && diag.ExitCode(err) == diag.ExitFailure {
			return nil, nil
		}
		return nil, err
	}
	if len(img.Tags) > 1 && !force {
		var names []string
		for _, t := range img.Tags {
			names = append(names, familiar(t.Ref))
		}
		return nil, diag.New(diag.ExitFailure, "image %q has %d names: %s", name, len(names), strings.Join(names, ", ")).
			WithHint("Remove them one by one, or all with --force.")
	}
	var refs []string
	for _, t := range img.Tags {
		refs = append(refs, t.Ref)
	}
	return refs, nil
}
