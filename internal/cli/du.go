package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/kiln-build/kiln/internal/gc"
	"github.com/spf13/cobra"
)

// duRow is one line of 'kiln du', with the fields that docker's has.
type duRow struct {
	ID, CreatedAt, Size, Description, LastUsedAt, Type string
	Parents                                            []string
	Mutable, Reclaimable, Shared                       bool

	item gc.Item
}

// MarshalJSON is as buildx writes it: a size is a number of bytes, as text.
func (r duRow) MarshalJSON() ([]byte, error) {
	parents := r.item.Parents
	if parents == nil {
		parents = []string{}
	}
	return json.Marshal(map[string]any{
		"ID": r.item.ID, "Parents": parents, "CreatedAt": r.item.Created.UTC().Format(time.RFC3339), "Mutable": r.item.Mutable,
		"Reclaimable": !r.item.InUse, "Shared": r.item.Shared, "Size": strconv.FormatInt(r.item.Size, 10), "Description": r.item.Description,
		"LastUsedAt": r.item.Used.UTC().Format(time.RFC3339), "Type": r.item.Type,
	})
}

// duRowOf describes an item. In a table a star says that it can change, and that an
// image has it too.
func duRowOf(i gc.Item, table bool) duRow {
	r := duRow{
		ID: i.ID, CreatedAt: i.Created.String(), Size: humanSize(i.Size), Description: i.Description, LastUsedAt: since(i.Used), Type: i.Type,
		Parents: i.Parents, Mutable: i.Mutable, Reclaimable: !i.InUse, Shared: i.Shared, item: i,
	}
	if table && i.Mutable {
		r.ID += "*"
	}
	if table && i.Shared {
		r.Size += "*"
	}
	return r
}

const duTable = "{{.ID}}\t{{.Reclaimable}}\t{{.Size}}\t{{.LastUsedAt}}"

// duPretty is buildx's, but for the number of uses, which nobody counts here.
const duPretty = `ID:           {{.ID}}
{{- if .Parents}}
Parents:
{{- range .Parents}}
 - {{.}}
{{- end}}
{{- end}}
Created at:   {{.CreatedAt}}
Mutable:      {{.Mutable}}
Reclaimable:  {{.Reclaimable}}
Shared:       {{.Shared}}
Size:         {{.Size}}
{{- if .Description}}
Description:  {{.Description}}
{{- end}}
Last used:    {{.LastUsedAt}}
Type:         {{.Type}}
`

func newDuCommand(app *App) *cobra.Command {
	var (
		filters []string
		verbose bool
		format  string
	)
	cmd := &cobra.Command{
		Use:   "du [OPTIONS]",
		Short: "Show what takes room in the store",
		Long: `Show what takes room in the store: the layers of images and of steps' results, and
cache mounts, the largest first. A star after an ID says that the next build may change
it, one after a size that an image with a name has it too, so that prune leaves it.`,
		Example: `  kiln du
  kiln du --verbose --filter type=exec.cachemount
  kiln du --format json | jq -s 'map(.Size | tonumber) | add'`,
		Args: nargs(0, 0),
	}
	fl := cmd.Flags()
	fl.StringArrayVar(&filters, "filter", nil, filterHelp)
	fl.StringVar(&format, "format", "", `format of the output: "table", "table TEMPLATE", "pretty", "json" or a Go template`)
	fl.BoolVar(&verbose, "verbose", false, "say all that is known of each (short for --format=pretty)")
	root := app.StoreFlag(cmd)
	completeFormats(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if verbose && format != "" {
			return usageError(cmd, "--verbose and --format cannot be used together")
		}
		if verbose {
			format = "pretty"
		}
		f, err := parseFilters(cmd, filters)
		if err != nil {
			return err
		}
		st, err := app.OpenStore(*root)
		if err != nil {
			return err
		}
		items, err := gc.List(cmd.Context(), st, f.expressions...)
		if err != nil {
			return err
		}
		items = slices.DeleteFunc(items, func(i gc.Item) bool { return time.Since(i.Used) < f.until })
		return printItems(app.Out, items, format, len(filters) == 0)
	}
	return cmd
}

// printItems prints items in a format; whole: with a sum, where it has one.
func printItems(w io.Writer, items []gc.Item, format string, whole bool) error {
	table := format == "" || format == "table" || strings.HasPrefix(format, "table ")
	var rows []duRow
	for _, i := range items {
		rows = append(rows, duRowOf(i, table))
	}
	l := listing{table: duTable, headers: map[string]string{
		"ID": "ID", "Parents": "PARENTS", "CreatedAt": "CREATED AT", "Mutable": "MUTABLE", "Reclaimable": "RECLAIMABLE", "Shared": "SHARED",
		"Size": "SIZE", "Description": "DESCRIPTION", "LastUsedAt": "LAST ACCESSED", "Type": "TYPE",
	}}
	pretty := format == "pretty"
	if pretty {
		format = duPretty
	}
	if err := print(w, l, format, rows); err != nil {
		return err
	}
	if !whole || !pretty && format != "" && format != "table" {
		return nil
	}
	return printSum(w, items)
}

// printSum is the end of docker's list.
func printSum(w io.Writer, items []gc.Item) error {
	var total, reclaimable, shared int64
	for _, i := range items {
		total += i.Size
		if !i.InUse {
			reclaimable += i.Size
		}
		if i.Shared {
			shared += i.Size
		}
	}
	tw := tabwriter.NewWriter(w, 1, 8, 1, '\t', 0)
	if shared > 0 {
		fmt.Fprintf(tw, "Shared:\t%s\nPrivate:\t%s\n", humanSize(shared), humanSize(total-shared))
	}
	fmt.Fprintf(tw, "Reclaimable:\t%s\nTotal:\t%s\n", humanSize(reclaimable), humanSize(total))
	return tw.Flush()
}

const filterHelp = "only what fits: until=24h, type=regular|exec.cachemount|internal, id=ID, description~=REGEXP, parents=ID, inuse, shared, private, mutable, immutable; " +
	"of several, what fits all"

// itemFilter is what --filter says.
type itemFilter struct {
	until       time.Duration // not used for so long; 0: whenever
	expressions []string      // of containerd's language
}

// parseFilters reads --filter as buildx does: KEY=VALUE, KEY!=VALUE, KEY~=VALUE or KEY.
func parseFilters(cmd *cobra.Command, values []string) (itemFilter, error) {
	var f itemFilter
	var all []string
	for _, v := range values {
		key, value, has := strings.Cut(v, "=")
		op := "=="
		if strings.HasSuffix(key, "!") || strings.HasSuffix(key, "~") {
			key, op = key[:len(key)-1], key[len(key)-1:]+"="
		}
		if key == "until" || key == "unused-for" {
			d, err := time.ParseDuration(value)
			if err != nil || d < 0 || op != "==" || f.until != 0 {
				return f, usageError(cmd, "invalid --filter %q: %s takes one duration, such as 24h", v, key)
			}
			f.until = d
			continue
		}
		if !slices.Contains([]string{"id", "parents", "description", "inuse", "mutable", "immutable", "type", "shared", "private"}, key) {
			return f, usageError(cmd, "unknown --filter %q: use until, type, id, parents, description, inuse, shared, private, mutable or immutable", v)
		}
		if key == "id" && op == "==" {
			op = "~="
		}
		if !has {
			all = append(all, key)
			continue
		}
		if _, err := regexp.Compile(value); op == "~=" && err != nil {
			return f, usageError(cmd, "invalid --filter %q: %w", v, err)
		}
		all = append(all, key+op+strconv.Quote(value))
	}
	if len(all) > 0 {
		f.expressions = []string{strings.Join(all, ",")}
	}
	return f, nil
}
