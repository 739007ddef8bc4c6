package cli

import (
	"context"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/spf13/cobra"
)

// imageRow is one line of 'kiln images', with the fields that docker's has.
type imageRow struct {
	Repository, Tag, Digest, ID   string
	CreatedSince, CreatedAt, Size string
	labels                        map[string]string
	created                       time.Time
}

type imagesFlags struct {
	root, format        string
	quiet, noTrunc, dig bool
	filters             []string
}

func newImagesCommand(app *App) *cobra.Command {
	var f imagesFlags
	cmd := &cobra.Command{
		Use:   "images [OPTIONS] [REPOSITORY[:TAG]]",
		Short: "List the images in the store",
		Long: `List the images in the store, the newest first. REPOSITORY[:TAG] shows those of that
name only; it may have wildcards.

SIZE is what the unpacked layers take on disk; images share the layers that they have
in common.`,
		Example: `  kiln images
  kiln images 'registry.example/team/*'
  kiln images --format '{{.Repository}}:{{.Tag}} {{.Digest}}'`,
		Args:              nargs(0, 1),
		ValidArgsFunction: app.completeImages,
	}
	fl := cmd.Flags()
	fl.BoolP("all", "a", false, "show all images; there are no intermediate images, so this is always so")
	fl.BoolVar(&f.dig, "digests", false, "show digests")
	fl.StringArrayVarP(&f.filters, "filter", "f", nil, "show only images with reference=PATTERN or label=NAME[=VALUE]")
	fl.StringVar(&f.format, "format", "", formatHelp)
	fl.BoolVar(&f.noTrunc, "no-trunc", false, "show whole IDs")
	fl.BoolVarP(&f.quiet, "quiet", "q", false, "show only IDs")
	root := app.StoreFlag(cmd)
	completeFormats(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		f.root = *root
		for _, a := range args {
			f.filters = append(f.filters, "reference="+a)
		}
		return app.images(cmd, f)
	}
	return cmd
}

func (a *App) images(cmd *cobra.Command, f imagesFlags) error {
	keep, err := imageFilter(cmd, f.filters)
	if err != nil {
		return err
	}
	st, err := a.OpenStore(f.root)
	if err != nil {
		return err
	}
	tags, err := st.Tags()
	if err != nil {
		return err
	}
	var rows []imageRow
	for _, t := range tags {
		r, err := imageRowOf(cmd.Context(), st, t, f.noTrunc)
		if err != nil {
			fmt.Fprintf(a.Err, "WARNING: image %q cannot be read: %v\n", familiar(t.Ref), err)
			continue
		}
		if keep(r) {
			rows = append(rows, r)
		}
	}
	slices.SortStableFunc(rows, func(a, b imageRow) int { return b.created.Compare(a.created) })
	if f.quiet {
		return a.printIDs(rows)
	}
	l := listing{
		table: "{{.Repository}}\t{{.Tag}}\t{{.ID}}\t{{.CreatedSince}}\t{{.Size}}",
		headers: map[string]string{
			"Repository": "REPOSITORY", "Tag": "TAG", "Digest": "DIGEST", "ID": "IMAGE ID",
			"CreatedSince": "CREATED", "CreatedAt": "CREATED AT", "Size": "SIZE",
		},
	}
	if f.dig {
		l.table = "{{.Repository}}\t{{.Tag}}\t{{.Digest}}\t{{.ID}}\t{{.CreatedSince}}\t{{.Size}}"
	}
	return print(a.Out, l, f.format, rows)
}

func (a *App) printIDs(rows []imageRow) error {
	seen := map[string]bool{}
	for _, r := range rows {
		if !seen[r.ID] {
			seen[r.ID] = true
			if _, err := fmt.Fprintln(a.Out, r.ID); err != nil {
				return fmt.Errorf("write output: %w", err)
			}
		}
	}
	return nil
}

func imageRowOf(ctx context.Context, st *store.Store, t store.Tag, noTrunc bool) (imageRow, error) {
	img, err := anyImage(ctx, st, t.Descriptor)
	if err != nil {
		return imageRow{}, err
	}
	cfg, err := image.ParseConfig(img.RawConfig)
	if err != nil {
		return imageRow{}, err
	}
	r := imageRow{
		Digest: t.Descriptor.Digest.String(), ID: img.ID().String(),
		CreatedSince: "N/A", Size: humanSize(imageSize(st, img)), labels: cfg.Config.Labels,
	}
	r.Repository, r.Tag = splitRef(t.Ref)
	if !noTrunc {
		r.ID = shortID(img.ID())
	}
	if cfg.Created != nil {
		r.created = *cfg.Created
		r.CreatedAt = cfg.Created.Format(time.RFC3339)
		r.CreatedSince = since(*cfg.Created)
	}
	return r, nil
}

// imageSize is what the image's layers take when they are unpacked, as far as
// that is known.
func imageSize(st *store.Store, img *image.Image) int64 {
	var n int64
	for _, l := range img.Layers {
		n += layerSize(st, l)
	}
	return n
}

func layerSize(st *store.Store, l image.Layer) int64 {
	if fi, err := os.Stat(st.LayerPath(l.DiffID)); err == nil {
		return fi.Size()
	}
	return l.Blob.Size
}

// imageFilter reads the values of --filter.
func imageFilter(cmd *cobra.Command, filters []string) (func(imageRow) bool, error) {
	var all []func(imageRow) bool
	for _, f := range filters {
		key, value, _ := strings.Cut(f, "=")
		switch key {
		case "reference":
			if _, err := path.Match(value, ""); err != nil {
				return nil, usageError(cmd, "invalid pattern %q: %w", value, err)
			}
			all = append(all, func(r imageRow) bool { return matchesRef(value, r) })
		case "label":
			name, want, hasValue := strings.Cut(value, "=")
			all = append(all, func(r imageRow) bool {
				have, ok := r.labels[name]
				return ok && (!hasValue || have == want)
			})
		default:
			return nil, usageError(cmd, "unknown --filter %q: use reference=PATTERN or label=NAME[=VALUE]", f)
		}
	}
	return func(r imageRow) bool {
		return !slices.ContainsFunc(all, func(keep func(imageRow) bool) bool { return !keep(r) })
	}, nil
}

func matchesRef(pattern string, r imageRow) bool {
	for _, name := range []string{r.Repository, r.Repository + ":" + r.Tag} {
		for _, prefix := range []string{"", "docker.io/", "docker.io/library/"} {
			if ok, _ := path.Match(pattern, prefix+name); ok {
				return true
			}
		}
	}
	return false
}
