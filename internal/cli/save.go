package cli

import (
	"bufio"
	"context"
	"io"
	"os"
	"strings"

	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/store"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

func newSaveCommand(app *App) *cobra.Command {
	var output, platform string
	var insecure []string
	cmd := &cobra.Command{
		Use:   "save [OPTIONS] IMAGE...",
		Short: "Write images of the store into an archive",
		Long: `Write images of the store into one archive, which is an OCI layout and what 'docker load'
takes. The same images give the same bytes.`,
		Example: `  kiln save -o app.tar app:1.0
  kiln save app:1.0 | docker load`,
		Args:              nargs(1, -1),
		ValidArgsFunction: app.completeImages,
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "write to this file instead of standard output")
	cmd.Flags().StringVar(&platform, "platform", "", "platform of an image that has several, OS/ARCH[/VARIANT]")
	cmd.Flags().StringArrayVar(&insecure, "insecure-registry", nil, insecureHelp)
	root := app.StoreFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if out, ok := app.Out.(*os.File); output == "" && ok && term.IsTerminal(int(out.Fd())) {
			return usageError(cmd, "an archive cannot be written to a terminal").WithHint("Name a file with --output.")
		}
		p, err := parsePlatform(cmd, platform)
		if err != nil {
			return err
		}
		st, err := app.OpenStore(*root)
		if err != nil {
			return err
		}
		client, err := registry.New(registry.Options{Insecure: insecure})
		if err != nil {
			return err
		}
		opt := image.SaveOptions{Docker: true, Fetcher: client}
		if p != nil {
			opt.Platform = *p
		}
		return app.save(cmd.Context(), st, args, p, output, opt)
	}
	return cmd
}

func (a *App) save(ctx context.Context, st *store.Store, names []string, p *ocispec.Platform, output string, opt image.SaveOptions) error {
	release, err := st.Use(ctx)
	if err != nil {
		return err
	}
	defer release()
	var images []image.ToSave
	for _, name := range names {
		s, err := toSave(ctx, st, name, p)
		if err != nil {
			return err
		}
		images = append(images, s)
	}
	write := func(w io.Writer) error {
		b := bufio.NewWriterSize(w, 1<<20)
		if err := image.Save(ctx, st, b, images, opt); err != nil {
			return err
		}
		return b.Flush()
	}
	if output == "" {
		return write(a.Out)
	}
	return export.WriteFile(output, write)
}

// toSave is an image with the name that it was asked for by, or, if that is an
// ID, with none.
func toSave(ctx context.Context, st *store.Store, name string, p *ocispec.Platform) (image.ToSave, error) {
	found, err := find(st, name)
	if err != nil {
		return image.ToSave{}, err
	}
	s := image.ToSave{Descriptor: found.Desc}
	if ref, err := registry.NormalizeRef(name); err == nil {
		for _, t := range found.Tags {
			if t.Ref == ref && !strings.Contains(ref, "@") {
				s.Refs = []string{ref}
			}
		}
	}
	if p != nil {
		img, err := found.pick(ctx, p)
		if err != nil {
			return s, err
		}
		s.Descriptor = img.Manifest
	}
	return s, nil
}
