package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
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
	root := app.storeFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		p, err := parsePlatform(cmd, f.platform)
		if err != nil {
			return err
		}
		st, err := app.openStore(*root)
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
		ps := &pushing{store: st, client: client, platform: p}
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

func (a *App) push(ctx context.Context, ps *pushing, refs []string, mode string) error {
	release, err := ps.store.Use(ctx)
	if err != nil {
		return err
	}
	defer release()
	pushed := make([]ocispec.Descriptor, len(refs))
	err = a.withProgress(mode, func(rec *progress.Recorder) error {
		for i, ref := range refs {
			step := rec.Step("push "+familiar(ref), "")
			step.Start()
			pushed[i], err = ps.ref(ctx, ref, step)
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

// pushing pushes images of a store.
type pushing struct {
	store    *store.Store
	client   *registry.Client
	platform *ocispec.Platform
}

// ref pushes what a name means, all platforms unless one was asked for, and
// returns what the name means then in the registry.
func (p *pushing) ref(ctx context.Context, ref string, step *progress.Step) (desc ocispec.Descriptor, err error) {
	if desc, err = p.store.Tag(ref); err != nil {
		return desc, err
	}
	if p.platform != nil {
		img, err := image.Resolve(ctx, image.InStore(p.store), desc, *p.platform)
		if err != nil {
			return desc, err
		}
		desc = img.Manifest
	}
	to, err := p.client.Pusher(ctx, ref)
	if err != nil {
		return desc, err
	}
	raw, err := p.content(ctx, to, desc, step, 0)
	if err != nil {
		return desc, err
	}
	return desc, to.Tag(ctx, desc.MediaType, raw)
}

const maxNested = 4 // indexes in indexes

// content pushes everything that a manifest or index names, and returns it.
func (p *pushing) content(ctx context.Context, to *registry.Pusher, desc ocispec.Descriptor, step *progress.Step, depth int) ([]byte, error) {
	raw, err := p.store.ReadBlob(desc.Digest, image.MaxManifest)
	if err != nil {
		return nil, fmt.Errorf("read manifest %s: %w", desc.Digest, err)
	}
	if !image.IsIndex(desc.MediaType) {
		return raw, p.image(ctx, to, desc, raw, step)
	}
	idx, err := image.ParseIndex(raw, desc.MediaType)
	if err != nil {
		return nil, err
	}
	if depth == maxNested {
		return nil, diag.New(diag.ExitFailure, "index %s: too many indexes within each other", desc.Digest)
	}
	for _, m := range idx.Manifests {
		child, err := p.content(ctx, to, m, step, depth+1)
		if err != nil {
			return nil, err
		}
		if _, err := to.Manifest(ctx, m.MediaType, child); err != nil {
			return nil, err
		}
	}
	return raw, nil
}

// image pushes the layers and the config of one image, or of an attestation.
func (p *pushing) image(ctx context.Context, to *registry.Pusher, desc ocispec.Descriptor, raw []byte, step *progress.Step) error {
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return fmt.Errorf("read manifest %s: %w", desc.Digest, err)
	}
	origins := map[digest.Digest]string{}
	if img, err := image.FromStore(p.store, string(desc.Digest), ocispec.Platform{}); err == nil {
		for _, l := range img.Layers {
			origins[l.Blob.Digest] = l.Origin
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	seen := map[digest.Digest]bool{}
	for _, b := range append(m.Layers, m.Config) {
		if seen[b.Digest] || image.IsForeign(b.MediaType) {
			continue
		}
		seen[b.Digest] = true
		g.Go(func() error { return p.blob(gctx, to, b, origins[b.Digest], step) })
	}
	return g.Wait()
}

func (p *pushing) blob(ctx context.Context, to *registry.Pusher, b ocispec.Descriptor, origin string, step *progress.Step) error {
	open := func() (io.ReadCloser, error) {
		// A layer of the base image may never have been needed here.
		if err := image.Fetch(ctx, p.store, image.Layer{Blob: b, Origin: origin}, p.client); err != nil {
			return nil, err
		}
		return p.store.OpenBlob(b.Digest)
	}
	_, err := to.Blob(ctx, b, origin, open, func(sent int64) {
		step.Transfer(shortDigest(b.Digest), sent, b.Size)
	})
	return err
}
