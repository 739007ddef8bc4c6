package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/store"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

func newPushCommand(app *App) *cobra.Command {
	var f transferFlags
	var all bool
	cmd := &cobra.Command{
		Use:   "push [OPTIONS] NAME[:TAG]",
		Short: "Push an image of the store to a registry",
		Long: `Push an image of the store to the registry that its name begins with. What the registry
has is not sent; the name is set last, when everything else is there.`,
		Example: `  kiln tag app:1.0 registry.example/team/app:1.0
  kiln push registry.example/team/app:1.0`,
		Args:              nargs(1, 1),
		ValidArgsFunction: app.completeImages,
	}
	f.define(cmd)
	cmd.Flags().BoolVarP(&all, "all-tags", "a", false, "push all tags of the repository NAME")
	root := app.StoreFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		p, err := parsePlatform(cmd, f.platform)
		if err != nil {
			return err
		}
		st, err := app.OpenStore(*root)
		if err != nil {
			return err
		}
		refs, err := pushRefs(cmd, st, args[0], all)
		if err != nil {
			return err
		}
		client, err := registry.New(registry.Options{Insecure: f.insecure})
		if err != nil {
			return err
		}
		ps := &export.StoredPush{Store: st, Registry: client, Platform: p}
		return app.push(cmd.Context(), ps, refs, f.mode())
	}
	return cmd
}

// pushRefs are the names to push, normalised.
func pushRefs(cmd *cobra.Command, st *store.Store, name string, all bool) ([]string, error) {
	ref, err := taggable(name)
	if err != nil {
		return nil, err
	}
	if !all {
		if _, err := st.Tag(ref); notFound(err) {
			return nil, diag.New(diag.ExitFailure, "no image in the store is called %q", familiar(ref)).
				WithHint("'kiln images' lists the images, 'kiln tag' gives one another name.")
		}
		return []string{ref}, nil
	}
	repository, _, _ := strings.Cut(familiar(ref), ":")
	if familiar(ref) != name+":latest" {
		return nil, usageError(cmd, "--all-tags takes a name without a tag, not %q", name)
	}
	want, err := registry.Repository(ref)
	if err != nil {
		return nil, err
	}
	tags, err := st.Tags()
	if err != nil {
		return nil, err
	}
	var refs []string
	for _, t := range tags {
		if have, err := registry.Repository(t.Ref); err == nil && have == want && !strings.Contains(t.Ref, "@") {
			refs = append(refs, t.Ref)
		}
	}
	if len(refs) == 0 {
		return nil, diag.New(diag.ExitFailure, "no image in the store is called %q", repository)
	}
	return refs, nil
}

func (a *App) push(ctx context.Context, ps *export.StoredPush, refs []string, mode string) error {
	release, err := ps.Store.Use(ctx)
	if err != nil {
		return err
	}
	defer release()
	pushed := make([]ocispec.Descriptor, len(refs))
	err = a.WithProgress(mode, false, func(rec *progress.Recorder) error {
		for i, ref := range refs {
			step := rec.Step("push "+familiar(ref), "")
			step.Start()
			pushed[i], err = ps.Push(ctx, ref, step)
			step.Done(err)
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for i, ref := range refs {
		text := ref
		if mode != "quiet" {
			_, tag := splitRef(ref)
			text = fmt.Sprintf("%s: digest: %s size: %d", tag, pushed[i].Digest, pushed[i].Size)
		}
		if _, err := fmt.Fprintln(a.Out, text); err != nil {
			return fmt.Errorf("write output: %w", err)
		}
	}
	return nil
}
