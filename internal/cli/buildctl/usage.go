package buildctl

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"text/template"
	"time"

	"github.com/containerd/platforms"
	"github.com/docker/go-units"
	"github.com/kiln-build/kiln/internal/buildkitd/ctl"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/spf13/cobra"
)

const formatHelp = "Go template for the output, or json"

// parseFormat makes the template that --format gives; nil: there is none.
func parseFormat(format string) (*template.Template, error) {
	switch format {
	case "":
		return nil, nil
	case "json":
		format = "{{json .}}"
	}
	t, err := template.New("").Funcs(template.FuncMap{"json": func(v any) (string, error) {
		var b strings.Builder
		enc := json.NewEncoder(&b)
		enc.SetEscapeHTML(false)
		err := enc.Encode(v)
		return strings.TrimSpace(b.String()), err
	}}).Parse(format)
	if err != nil {
		return nil, diag.New(diag.ExitUsage, "invalid --format: %w", err)
	}
	return t, nil
}

// execute writes v by a template, as a line.
func execute(w io.Writer, t *template.Template, v any) error {
	if err := t.Execute(w, v); err != nil {
		return diag.New(diag.ExitUsage, "--format: %w", err)
	}
	_, err := fmt.Fprintln(w)
	return err
}

// table aligns columns as BuildKit's buildctl does.
func table(w io.Writer) *tabwriter.Writer { return tabwriter.NewWriter(w, 1, 8, 1, '\t', 0) }

func size(n int64) string { return sizeAs("%.2f%s", n) }

// sizeAs is a size in decimal units, by a format for a number and a unit.
func sizeAs(format string, n int64) string {
	return units.CustomSize(format, float64(n), 1000, []string{"B", "kB", "MB", "GB", "TB", "PB"})
}

func newDiskUsage(s *server) *cobra.Command {
	var (
		filters []string
		verbose bool
		format  string
	)
	cmd := &cobra.Command{Use: "du", Short: "Show what builds have left in the server, or in the store here", Args: cobra.NoArgs}
	fl := cmd.Flags()
	fl.StringArrayVarP(&filters, "filter", "f", nil, "what is shown, in containerd's language for filters")
	fl.BoolVarP(&verbose, "verbose", "v", false, "show all that is known")
	fl.StringVar(&format, "format", "", formatHelp)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		t, err := parseFormat(format)
		if err != nil {
			return err
		}
		c, err := s.keeper(cmd.Context())
		if err != nil {
			return err
		}
		defer c.Close()
		all, err := c.DiskUsage(cmd.Context(), filters)
		slices.SortFunc(all, func(a, b *ctl.Usage) int { return cmp.Or(cmp.Compare(a.Size, b.Size), cmp.Compare(a.ID, b.ID)) })
		switch {
		case err != nil:
			return err
		case t != nil:
			return execute(s.Out, t, all)
		}
		tw := table(s.Out)
		if !verbose {
			fmt.Fprintln(tw, usageHeader)
		}
		for _, u := range all {
			printUsage(tw, u, verbose)
		}
		if err := tw.Flush(); err != nil || len(filters) > 0 {
			return err
		}
		return printTotals(s.Out, all)
	}
	return cmd
}

const usageHeader = "ID\tRECLAIMABLE\tSIZE\tLAST ACCESSED"

func printUsage(w io.Writer, u *ctl.Usage, verbose bool) {
	if !verbose {
		id, bytes := u.ID, size(u.Size)
		if u.Mutable {
			id += "*"
		}
		if u.Shared {
			bytes += "*"
		}
		fmt.Fprintf(w, "%-71s\t%-11v\t%s\t\n", id, !u.InUse, bytes)
		return
	}
	row := func(k string, v any, known bool) {
		if known {
			fmt.Fprintf(w, "%s:\t%v\n", k, v)
		}
	}
	row("ID", u.ID, true)
	row("Parents", strings.Join(u.Parents, ";"), len(u.Parents) > 0)
	row("Created at", u.CreatedAt, true)
	row("Mutable", u.Mutable, true)
	row("Reclaimable", !u.InUse, true)
	row("Shared", u.Shared, true)
	row("Size", size(u.Size), true)
	row("Description", u.Description, u.Description != "")
	row("Usage count", u.UsageCount, true)
	row("Last used", u.LastUsedAt, u.LastUsedAt != nil)
	row("Type", u.RecordType, u.RecordType != "")
	fmt.Fprintln(w)
}

func printTotals(w io.Writer, all []*ctl.Usage) error {
	var total, reclaimable, shared int64
	for _, u := range all {
		total += max(u.Size, 0)
		if !u.InUse {
			reclaimable += max(u.Size, 0)
		}
		if u.Shared {
			shared += u.Size
		}
	}
	tw := table(w)
	if shared > 0 {
		fmt.Fprintf(tw, "Shared:\t%s\nPrivate:\t%s\n", size(shared), size(total-shared))
	}
	fmt.Fprintf(tw, "Reclaimable:\t%s\nTotal:\t%s\n", size(reclaimable), size(total))
	return tw.Flush()
}

func newPrune(s *server) *cobra.Command {
	var (
		o                  ctl.PruneOptions
		keep, minKeep, min float64 // MB
		verbose            bool
		format             string
	)
	cmd := &cobra.Command{Use: "prune", Short: "Remove what the server, or the store here, need not keep", Args: cobra.NoArgs}
	fl := cmd.Flags()
	fl.SortFlags = false
	fl.DurationVar(&o.KeepDuration, "keep-duration", 0, "keep what was used within this time")
	fl.Float64Var(&keep, "keep-storage", 0, "keep this much, in MB")
	fl.Float64Var(&minKeep, "keep-storage-min", 0, "keep at least this much, in MB")
	fl.Float64Var(&min, "free-storage", 0, "remove until this much is free, in MB")
	fl.StringArrayVarP(&o.Filter, "filter", "f", nil, "what may go, in containerd's language for filters")
	fl.BoolVar(&o.All, "all", false, "also what the server keeps for itself")
	fl.BoolVarP(&verbose, "verbose", "v", false, "show all that is known of what is gone")
	fl.StringVar(&format, "format", "", formatHelp)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		t, err := parseFormat(format)
		if err != nil {
			return err
		}
		c, err := s.keeper(cmd.Context())
		if err != nil {
			return err
		}
		defer c.Close()
		const mb = 1e6
		o.MaxUsedSpace, o.ReservedSpace, o.MinFreeSpace = int64(keep*mb), int64(minKeep*mb), int64(min*mb)
		total, tw := int64(0), table(s.Out)
		err = c.Prune(cmd.Context(), o, func(u *ctl.Usage) error {
			if t != nil {
				return execute(s.Out, t, u)
			}
			if total == 0 && !verbose {
				fmt.Fprintln(tw, usageHeader)
			}
			total += u.Size
			printUsage(tw, u, verbose)
			return tw.Flush()
		})
		if err != nil || t != nil {
			return err
		}
		fmt.Fprintf(tw, "Total:\t%s\n", size(total))
		return tw.Flush()
	}
	return cmd
}

func newWorkers(s *server) *cobra.Command {
	var (
		filters []string
		verbose bool
		format  string
	)
	cmd := &cobra.Command{Use: "workers", Short: "List a server's workers", Args: cobra.NoArgs}
	fl := cmd.Flags()
	fl.StringArrayVarP(&filters, "filter", "f", nil, "what is shown, in containerd's language for filters")
	fl.BoolVarP(&verbose, "verbose", "v", false, "show all that is known")
	fl.StringVar(&format, "format", "", formatHelp)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		t, err := parseFormat(format)
		if err != nil {
			return err
		}
		c, err := s.need(cmd.Context(), cmd, hintInfo)
		if err != nil {
			return err
		}
		defer c.Close()
		all, err := c.Workers(cmd.Context(), filters)
		switch {
		case err != nil:
			return err
		case t != nil:
			return execute(s.Out, t, all)
		}
		tw := table(s.Out)
		if !verbose {
			fmt.Fprintln(tw, "ID\tPLATFORMS")
		}
		for _, w := range all {
			printWorker(tw, w, verbose)
		}
		return tw.Flush()
	}
	return cmd
}

const hintInfo = "What builds in this process, 'kiln info' says."

func printWorker(w io.Writer, i *ctl.Worker, verbose bool) {
	var names []string
	for _, p := range i.Platforms {
		names = append(names, platforms.Format(platforms.Normalize(p)))
	}
	if !verbose {
		fmt.Fprintf(w, "%s\t%s\n", i.ID, strings.Join(names, ","))
		return
	}
	fmt.Fprintf(w, "ID:\t%s\nPlatforms:\t%s\n", i.ID, strings.Join(names, ","))
	printVersion(w, i.BuildkitVersion)
	fmt.Fprintln(w, "Labels:")
	for _, k := range slices.Sorted(maps.Keys(i.Labels)) {
		fmt.Fprintf(w, "\t%s:\t%s\n", k, i.Labels[k])
	}
	for n, p := range i.GCPolicy {
		fmt.Fprintf(w, "GC Policy rule#%d:\n\tAll:\t%v\n", n, p.All)
		if len(p.Filter) > 0 {
			fmt.Fprintf(w, "\tFilters:\t%s\n", strings.Join(p.Filter, " "))
		}
		if p.KeepDuration > 0 {
			fmt.Fprintf(w, "\tKeep duration:\t%s\n", p.KeepDuration)
		}
		for _, l := range []struct {
			name  string
			bytes int64
		}{{"Reserved space", p.ReservedSpace}, {"Minimum free space", p.MinFreeSpace}, {"Maximum used space", p.MaxUsedSpace}} {
			if l.bytes > 0 {
				fmt.Fprintf(w, "\t%s:\t%s\n", l.name, sizeAs("%g%s", l.bytes))
			}
		}
	}
	fmt.Fprintln(w)
}

func printVersion(w io.Writer, v ctl.Version) {
	fmt.Fprintf(w, "BuildKit:\t%s %s %s\n", v.Package, v.Version, v.Revision)
	if v.DockerfileVersion != "" {
		fmt.Fprintf(w, "Dockerfile:\t%s\n", v.DockerfileVersion)
	}
}

func newInfo(s *server) *cobra.Command {
	var format string
	cmd := &cobra.Command{Use: "info", Short: "Show what a server is", Args: cobra.NoArgs}
	cmd.Flags().StringVar(&format, "format", "", formatHelp)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		t, err := parseFormat(format)
		if err != nil {
			return err
		}
		c, err := s.need(cmd.Context(), cmd, hintInfo)
		if err != nil {
			return err
		}
		defer c.Close()
		info, err := c.Info(cmd.Context())
		switch {
		case err != nil:
			return err
		case t != nil:
			return execute(s.Out, t, info)
		}
		tw := tabwriter.NewWriter(s.Out, 0, 0, 1, ' ', 0)
		printVersion(tw, info.BuildkitVersion)
		return tw.Flush()
	}
	return cmd
}

// localTime is a time of a record, as people read it.
func localTime(t interface {
	IsValid() bool
	AsTime() time.Time
},
) string {
	if !t.IsValid() {
		return ""
	}
	return t.AsTime().Local().Format(time.RFC3339)
}
