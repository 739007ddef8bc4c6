package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/cli/templates"
	"github.com/docker/go-units"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/spf13/cobra"
)

const formatHelp = `format of the output: "table", "table TEMPLATE", "json" or a Go template`

// listing prints rows as docker's --format has it.
type listing struct {
	// table is the template of the table that is printed if no format is given.
	table string
	// headers of the table's columns, by the field of the row.
	headers map[string]string
}

// print writes rows, structs with fields of type string, in a format.
func print[Row any](w io.Writer, l listing, format string, rows []Row) error {
	switch {
	case format == "json":
		enc := json.NewEncoder(w)
		enc.SetEscapeHTML(false)
		for _, r := range rows {
			if err := enc.Encode(r); err != nil {
				return fmt.Errorf("write output: %w", err)
			}
		}
		return nil
	case format == "" || format == "table":
		return printTable(w, l, l.table, rows)
	case strings.HasPrefix(format, "table "):
		return printTable(w, l, unescape(format[len("table "):]), rows)
	}
	return printTemplate(w, unescape(format), rows)
}

// unescape knows the \t and \n that are hard to type in a shell.
func unescape(format string) string {
	return strings.NewReplacer(`\t`, "\t", `\n`, "\n").Replace(strings.TrimSpace(format))
}

func printTable[Row any](w io.Writer, l listing, format string, rows []Row) error {
	tw := tabwriter.NewWriter(w, 10, 1, 3, ' ', 0)
	head, err := templates.New("").Funcs(templates.HeaderFunctions).Parse(format)
	if err != nil {
		return badTemplate(err)
	}
	if err := head.Execute(tw, l.headers); err != nil {
		return badTemplate(err)
	}
	fmt.Fprintln(tw)
	if err := printTemplate(tw, format, rows); err != nil {
		return err
	}
	return tw.Flush()
}

func printTemplate[Row any](w io.Writer, format string, rows []Row) error {
	t, err := templates.Parse(format)
	if err != nil {
		return badTemplate(err)
	}
	for _, r := range rows {
		if err := t.Execute(w, r); err != nil {
			return badTemplate(err)
		}
		fmt.Fprintln(w)
	}
	return nil
}

func badTemplate(err error) error {
	return diag.New(diag.ExitUsage, "use the template of --format: %w", err).
		WithHint("--format takes table, json or a Go template such as '{{json .}}'.")
}

// completeFormats is the completion of --format.
func completeFormats(cmd *cobra.Command) {
	_ = cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"json", "table"}, cobra.ShellCompDirectiveNoFileComp))
}

func humanSize(n int64) string { return units.HumanSizeWithPrecision(float64(n), 3) }

// since tells how long ago t was, as docker does.
func since(t time.Time) string {
	if t.Year() < 2000 { // images with a fixed date say 1970, or nothing
		return "N/A"
	}
	return units.HumanDuration(time.Since(t)) + " ago"
}

// ellipsis is the beginning of s, one line of at most n characters.
func ellipsis(s string, n int) string {
	s = progress.Clean(s)
	r := []rune(s)
	if len(r) <= n {
		return s
	}
	return string(r[:n-1]) + "…"
}

func itoa(n int) string { return strconv.Itoa(n) }

func plural(n int, word string) string {
	if n == 1 {
		return word
	}
	return word + "s"
}
