package cli

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/spf13/cobra"
)

// historyRow is one line of 'kiln history', with the fields that docker's has.
type historyRow struct {
	ID, CreatedSince, CreatedAt, CreatedBy, Size, Comment string
}

type historyFlags struct {
	format, platform      string
	quiet, noTrunc, human bool
}

func newHistoryCommand(app *App) *cobra.Command {
	var f historyFlags
	cmd := &cobra.Command{
		Use:   "history [OPTIONS] IMAGE",
		Short: "Show the steps that made an image in the store",
		Long: `Show the steps that made an image in the store, the last first, and the size of what
each added.`,
		Example:           "  kiln history --no-trunc app:1.0",
		Args:              nargs(1, 1),
		ValidArgsFunction: app.completeImages,
	}
	fl := cmd.Flags()
	fl.StringVar(&f.format, "format", "", formatHelp)
	fl.BoolVarP(&f.human, "human", "H", true, "show sizes and dates in readable form")
	fl.BoolVar(&f.noTrunc, "no-trunc", false, "show whole commands and IDs")
	fl.BoolVarP(&f.quiet, "quiet", "q", false, "show only IDs")
	fl.StringVar(&f.platform, "platform", "", "platform of an image that has several, OS/ARCH[/VARIANT]")
	root := app.StoreFlag(cmd)
	completeFormats(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		p, err := parsePlatform(cmd, f.platform)
		if err != nil {
			return err
		}
		st, err := app.OpenStore(*root)
		if err != nil {
			return err
		}
		found, err := find(st, args[0])
		if err != nil {
			return err
		}
		img, err := found.pick(cmd.Context(), p)
		if err != nil {
			return err
		}
		rows, err := historyRows(st, img, f)
		if err != nil {
			return err
		}
		return app.printHistory(rows, f)
	}
	return cmd
}

func (a *App) printHistory(rows []historyRow, f historyFlags) error {
	if f.quiet {
		for _, r := range rows {
			if _, err := fmt.Fprintln(a.Out, r.ID); err != nil {
				return fmt.Errorf("write output: %w", err)
			}
		}
		return nil
	}
	l := listing{
		table: "{{.ID}}\t{{.CreatedSince}}\t{{.CreatedBy}}\t{{.Size}}\t{{.Comment}}",
		headers: map[string]string{
			"ID": "IMAGE", "CreatedSince": "CREATED", "CreatedAt": "CREATED AT",
			"CreatedBy": "CREATED BY", "Size": "SIZE", "Comment": "COMMENT",
		},
	}
	if !f.human {
		l.table = "{{.ID}}\t{{.CreatedAt}}\t{{.CreatedBy}}\t{{.Size}}\t{{.Comment}}"
	}
	return print(a.Out, l, f.format, rows)
}

func historyRows(st *store.Store, img *image.Image, f historyFlags) ([]historyRow, error) {
	cfg, err := image.ParseConfig(img.RawConfig)
	if err != nil {
		return nil, err
	}
	var rows []historyRow
	layer := 0
	for _, h := range cfg.History {
		r := historyRow{ID: "<missing>", CreatedSince: "N/A", CreatedBy: strings.ReplaceAll(h.CreatedBy, "\t", " "), Comment: h.Comment}
		if !f.noTrunc {
			r.CreatedBy = ellipsis(r.CreatedBy, 45)
		}
		if h.Created != nil {
			r.CreatedAt = h.Created.Format(time.RFC3339)
			r.CreatedSince = since(*h.Created)
		}
		var size int64
		if !h.EmptyLayer && layer < len(img.Layers) {
			size = layerSize(st, img.Layers[layer])
			layer++
		}
		r.Size = humanSize(size)
		if !f.human {
			r.Size, r.CreatedSince = fmt.Sprint(size), r.CreatedAt
		}
		rows = append(rows, r)
	}
	slices.Reverse(rows)
	if len(rows) > 0 {
		rows[0].ID = shortID(img.ID())
		if f.noTrunc {
			rows[0].ID = img.ID().String()
		}
	}
	return rows, nil
}
