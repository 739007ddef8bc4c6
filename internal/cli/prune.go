package cli

import (
	"bufio"
	"fmt"
	"strings"

	"github.com/docker/go-units"
	"github.com/kiln-build/kiln/internal/gc"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/spf13/cobra"
)

// pruneFlags are the options of kiln prune.
type pruneFlags struct {
	All, Force, DryRun, Verbose      bool
	Filters                          []string
	Keep, MaxUsed, Reserved, MinFree string // sizes
}

func newPruneCommand(app *App) *cobra.Command {
	var f pruneFlags
	cmd := &cobra.Command{
		Use:   "prune [OPTIONS]",
		Short: "Remove from the store what no image needs",
		Long: `Remove from the store what neither an image with a name nor a running build needs:
layers of images that lost their names, cache mounts, and the results of steps that are
kept to make the next build quick. What was used longest ago goes first. Builds may run
meanwhile.`,
		Example: `  # What would be removed?
  kiln prune --dry-run

  # Keep what was used within a week, but no more than 20 GB
  kiln prune --filter until=168h --max-used-space 20GB

  # Remove cache mounts alone
  kiln prune --filter type=exec.cachemount

  # Remove everything, images too
  kiln prune --all --force`,
		Args: nargs(0, 0),
	}
	fl := cmd.Flags()
	fl.BoolVarP(&f.All, "all", "a", false, "remove all images too")
	fl.BoolVarP(&f.Force, "force", "f", false, "do not ask before images are removed")
	fl.BoolVar(&f.DryRun, "dry-run", false, "only say what would be removed")
	fl.StringArrayVar(&f.Filters, "filter", nil, filterHelp)
	fl.StringVar(&f.MaxUsed, "max-used-space", "", "remove until the store is no larger, such as 20GB")
	fl.StringVar(&f.MinFree, "min-free-space", "", "remove until so much of the disk is free")
	fl.StringVar(&f.Reserved, "reserved-space", "", "do not make the store smaller")
	fl.StringVar(&f.Keep, "keep-storage", "", "docker's older name for --reserved-space")
	fl.BoolVar(&f.Verbose, "verbose", false, "say all that is known of what is removed")
	root := app.StoreFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		opt, err := f.options(cmd)
		if err != nil {
			return err
		}
		st, err := app.OpenStore(*root)
		if err != nil {
			return err
		}
		if f.All {
			if ok, err := app.untagAll(st, f.Force); !ok || err != nil {
				return err
			}
		}
		report, err := gc.Prune(cmd.Context(), st, opt)
		if err != nil {
			return err
		}
		return app.printPrune(report, f)
	}
	return cmd
}

func (f *pruneFlags) options(cmd *cobra.Command) (gc.Options, error) {
	opt := gc.Options{DryRun: f.DryRun}
	filter, err := parseFilters(cmd, f.Filters)
	if err != nil {
		return opt, err
	}
	opt.Filter, opt.KeepFor = filter.expressions, filter.until
	if f.Keep != "" && f.Reserved != "" {
		return opt, usageError(cmd, "--keep-storage and --reserved-space are one option")
	}
	for _, s := range []struct {
		flag, value string
		to          *int64
	}{
		{"keep-storage", f.Keep, &opt.Reserved},
		{"reserved-space", f.Reserved, &opt.Reserved},
		{"max-used-space", f.MaxUsed, &opt.MaxUsed},
		{"min-free-space", f.MinFree, &opt.MinFree},
	} {
		if s.value == "" {
			continue
		}
		n, err := units.FromHumanSize(s.value)
		if err != nil || n <= 0 {
			return opt, usageError(cmd, "invalid --%s %q: give a size such as 20GB", s.flag, s.value)
		}
		*s.to = n
	}
	if f.All && f.DryRun {
		return opt, usageError(cmd, "--all and --dry-run cannot be used together")
	}
	return opt, nil
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

// printPrune says what was removed, as docker does. The sum has the records too.
func (a *App) printPrune(r gc.Report, f pruneFlags) error {
	format := ""
	if f.Verbose {
		format = "pretty"
	}
	if len(r.Items) > 0 {
		if err := printItems(a.Out, r.Items, format, false); err != nil {
			return err
		}
	}
	if r.InUse > 0 {
		fmt.Fprintf(a.Out, "Kept for running builds:\t%s\n", humanSize(r.InUse))
	}
	total := "Total:"
	if f.DryRun {
		total = "Total that would be removed:"
	}
	if _, err := fmt.Fprintf(a.Out, "%s\t%s\n", total, humanSize(r.Bytes)); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}
