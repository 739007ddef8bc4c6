package cli

import (
	"bufio"
	"fmt"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/spf13/cobra"
)

func newPruneCommand(app *App) *cobra.Command {
	var (
		all, force, dryRun bool
		keepFor            time.Duration
		keepSize           string
	)
	cmd := &cobra.Command{
		Use:   "prune [OPTIONS]",
		Short: "Remove from the store what no image needs",
		Long: `Remove from the store what neither an image with a name nor a running build needs:
layers of images that lost their names, and the results of steps that are kept to make
the next build quick. Builds may run meanwhile.`,
		Example: `  # What would be removed?
  kiln prune --dry-run

  # Keep what was used within a week, but no more than 20 GB
  kiln prune --keep-for 168h --keep-size 20GB

  # Remove everything, images too
  kiln prune --all --force`,
		Args: nargs(0, 0),
	}
	fl := cmd.Flags()
	fl.BoolVarP(&all, "all", "a", false, "remove all images too")
	fl.BoolVarP(&force, "force", "f", false, "do not ask before images are removed")
	fl.BoolVar(&dryRun, "dry-run", false, "only say what would be removed")
	fl.DurationVar(&keepFor, "keep-for", 0, "keep results of steps used within this time, such as 168h")
	fl.StringVar(&keepSize, "keep-size", "", "keep results of steps, the last used first, while the store is no larger, such as 20GB")
	root := app.StoreFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		opt := store.PruneOptions{KeepFor: keepFor, DryRun: dryRun}
		if keepFor < 0 {
			return usageError(cmd, "invalid --keep-for %q: it is negative", keepFor)
		}
		if keepSize != "" {
			n, err := units.FromHumanSize(keepSize)
			if err != nil || n <= 0 {
				return usageError(cmd, "invalid --keep-size %q: give a size such as 20GB", keepSize)
			}
			opt.KeepSize = n
		}
		if all && dryRun {
			return usageError(cmd, "--all and --dry-run cannot be used together")
		}
		st, err := app.OpenStore(*root)
		if err != nil {
			return err
		}
		if all {
			if ok, err := app.untagAll(st, force); !ok || err != nil {
				return err
			}
		}
		report, err := st.Prune(cmd.Context(), opt)
		if err != nil {
			return err
		}
		return app.printPrune(report, dryRun)
	}
	return cmd
}

// untagAll takes all names away, if the user means it.
func (a *App) untagAll(st *store.Store, force bool) (ok bool, err error) {
	tags, err := st.Tags()
	if err != nil || len(tags) == 0 {
		return err == nil, err
	}
	if !force {
		fmt.Fprintf(a.Err, "WARNING: this removes %d %s from the store %s.\nContinue? [y/N] ", len(tags), plural(len(tags), "image"), st.Root())
		answer, _ := bufio.NewReader(a.In).ReadString('\n')
		if s := strings.ToLower(strings.TrimSpace(answer)); s != "y" && s != "yes" {
			fmt.Fprintln(a.Err, "Nothing was removed.")
			return false, nil
		}
	}
	for _, t := range tags {
		if err := st.DeleteTag(t.Ref); err != nil && !notFound(err) {
			return false, err
		}
		fmt.Fprintln(a.Out, "Untagged:", familiar(t.Ref))
	}
	return true, nil
}

func (a *App) printPrune(r store.PruneReport, dryRun bool) error {
	verb, total := "Removed", "Total reclaimed space"
	if dryRun {
		verb, total = "Would remove", "Total space"
	}
	fmt.Fprintf(a.Out, "%s: %d %s, %d %s, %d %s, %d temporary %s\n", verb,
		r.Blobs, plural(r.Blobs, "blob"), r.Layers, plural(r.Layers, "layer"),
		r.Records, plural(r.Records, "record"), r.Temp, plural(r.Temp, "file"))
	if r.InUse > 0 {
		fmt.Fprintf(a.Out, "Kept for running builds: %s\n", humanSize(r.InUse))
	}
	if _, err := fmt.Fprintf(a.Out, "%s: %s\n", total, humanSize(r.Bytes)); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}
