package cli

import (
	"context"
	"fmt"

	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

// transferFlags are what pull and push have in common.
type transferFlags struct {
	platform, progress string
	quiet              bool
	insecure           []string
}

func (f *transferFlags) define(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.platform, "platform", "", "platform of an image that has several, OS/ARCH[/VARIANT]")
	fl.StringVar(&f.progress, "progress", "auto", "how to show progress: auto, tty, plain, json, quiet")
	fl.BoolVarP(&f.quiet, "quiet", "q", false, "show no progress")
	fl.StringArrayVar(&f.insecure, "insecure-registry", nil, insecureHelp)
	_ = cmd.RegisterFlagCompletionFunc("progress", cobra.FixedCompletions(progress.Modes(), cobra.ShellCompDirectiveNoFileComp))
}

// mode is the progress mode.
func (f *transferFlags) mode() string {
	if f.quiet {
		return "quiet"
	}
	return f.progress
}

func newPullCommand(app *App) *cobra.Command {
	var f transferFlags
	cmd := &cobra.Command{
		Use:   "pull [OPTIONS] NAME[:TAG|@DIGEST]",
		Short: "Get an image from a registry into the store",
		Long: `Get an image from a registry into the store. Of an image for several platforms, the one
for this machine's, or --platform's, is taken. Layers that the store has are not fetched.`,
		Example: `  kiln pull debian:bookworm
  kiln pull --platform linux/arm64 registry.example/team/app:1.0`,
		Args:              nargs(1, 1),
		ValidArgsFunction: app.completeImages,
	}
	f.define(cmd)
	root := app.StoreFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ref, err := registry.NormalizeRef(args[0])
		if err != nil {
			return err
		}
		p, err := parsePlatform(cmd, f.platform)
		if err != nil {
			return err
		}
		st, err := app.OpenStore(*root)
		if err != nil {
			return err
		}
		client, err := registry.New(registry.Options{Insecure: f.insecure})
		if err != nil {
			return err
		}
		return app.pull(cmd.Context(), st, client, ref, p, f.mode())
	}
	return cmd
}

func (a *App) pull(ctx context.Context, st *store.Store, client *registry.Client, ref string, p *ocispec.Platform, mode string) error {
	release, err := st.Use(ctx)
	if err != nil {
		return err
	}
	defer release()
	before, _ := st.Tag(ref)
	var desc ocispec.Descriptor
	err = a.WithProgress(mode, false, func(rec *progress.Recorder) error {
		step := rec.Step("pull "+familiar(ref), "")
		step.Start()
		desc, err = pullInto(ctx, st, client, ref, p, step)
		step.Done(err)
		return err
	})
	if err != nil {
		return err
	}
	if mode == "quiet" {
		_, err = fmt.Fprintln(a.Out, ref)
		return err
	}
	status := "Downloaded newer image for"
	if before.Digest == desc.Digest {
		status = "Image is up to date for"
	}
	_, err = fmt.Fprintf(a.Out, "Digest: %s\nStatus: %s %s\n%s\n", desc.Digest, status, familiar(ref), ref)
	return err
}

func pullInto(ctx context.Context, st *store.Store, client *registry.Client, ref string, p *ocispec.Platform, step *progress.Step) (desc ocispec.Descriptor, err error) {
	if p == nil {
		p = &ocispec.Platform{}
	}
	img, err := client.Resolve(ctx, ref, *p)
	if err != nil {
		return desc, err
	}
	_, err = image.UnpackAll(ctx, st, img.Layers, client, func(i int, current int64) {
		b := img.Layers[i].Blob
		step.Transfer(shortDigest(b.Digest), current, b.Size)
	})
	if err != nil {
		return desc, err
	}
	if desc, err = image.Keep(st, img); err != nil {
		return desc, err
	}
	return desc, image.Tag(st, desc, ref)
}

// shortDigest is the form in which progress shows a digest.
func shortDigest(d digest.Digest) string { return "sha256:" + shortID(d) }
