package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

// inspected is an image as 'docker image inspect' shows it.
type inspected struct {
	ID           string `json:"Id"`
	RepoTags     []string
	RepoDigests  []string
	Comment      string `json:",omitempty"`
	Created      string `json:",omitempty"`
	Author       string `json:",omitempty"`
	Config       any
	Architecture string
	Variant      string `json:",omitempty"`
	Os           string
	OsVersion    string `json:",omitempty"`
	Size         int64
	RootFS       inspectedRootFS
	Metadata     inspectedMetadata
	Descriptor   ocispec.Descriptor
}

type inspectedRootFS struct {
	Type   string
	Layers []digest.Digest
}

type inspectedMetadata struct{ LastTagTime time.Time }

func newInspectCommand(app *App) *cobra.Command {
	var format, platform string
	cmd := &cobra.Command{
		Use:   "inspect [OPTIONS] IMAGE...",
		Short: "Show everything about images in the store, as JSON",
		Long:  "Show everything about images in the store: one JSON array, or what a Go template makes of each.",
		Example: `  kiln inspect app:1.0
  kiln inspect --format '{{json .Config.Env}}' app:1.0`,
		Args:              nargs(1, -1),
		ValidArgsFunction: app.completeImages,
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", "format of the output: json (the default) or a Go template")
	cmd.Flags().StringVar(&platform, "platform", "", "platform of an image that has several, OS/ARCH[/VARIANT]")
	root := app.StoreFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		p, err := parsePlatform(cmd, platform)
		if err != nil {
			return err
		}
		st, err := app.OpenStore(*root)
		if err != nil {
			return err
		}
		images := []*inspected{}
		for _, name := range args {
			i, err := inspect(cmd.Context(), st, name, p)
			if err != nil {
				return err
			}
			images = append(images, i)
		}
		if format != "" && format != "json" {
			return app.printInspected(unescape(format), images)
		}
		enc := json.NewEncoder(app.Out)
		enc.SetEscapeHTML(false)
		if format == "" {
			enc.SetIndent("", "    ")
		}
		if err := enc.Encode(images); err != nil {
			return fmt.Errorf("write output: %w", err)
		}
		return nil
	}
	return cmd
}

// printInspected prints images by a template whose fields are named as in the
// JSON, as docker's are, or as in the type: {{.Id}} and {{.ID}}.
func (a *App) printInspected(format string, images []*inspected) error {
	var typed bytes.Buffer
	typedErr := printTemplate(&typed, format, images)
	if typedErr == nil {
		_, err := typed.WriteTo(a.Out)
		return err
	}
	b, err := json.Marshal(images)
	if err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	var raw []map[string]any
	if err := json.Unmarshal(b, &raw); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	var out bytes.Buffer
	if printTemplate(&out, format, raw) != nil || strings.Contains(out.String(), "<no value>") {
		return typedErr
	}
	_, err = out.WriteTo(a.Out)
	return err
}

// parsePlatform reads the value of --platform; nil: none was given.
func parsePlatform(cmd *cobra.Command, s string) (*ocispec.Platform, error) {
	if s == "" {
		return nil, nil
	}
	p, err := platforms.Parse(s)
	if err != nil {
		return nil, usageError(cmd, "invalid --platform %q: %w", s, err)
	}
	return &p, nil
}

// pick is the image that a name means: for platform p, or if that is nil for
// this machine's or else the first that the store has.
func (s *stored) pick(ctx context.Context, p *ocispec.Platform) (*image.Image, error) {
	if p != nil {
		return image.Resolve(ctx, image.InStore(s.store), s.Desc, *p)
	}
	return anyImage(ctx, s.store, s.Desc)
}

func anyImage(ctx context.Context, st *store.Store, d ocispec.Descriptor) (*image.Image, error) {
	get := image.InStore(st)
	img, err := image.Resolve(ctx, get, d, ocispec.Platform{})
	if err == nil || !image.IsIndex(d.MediaType) {
		return img, err
	}
	raw, e := get(ctx, d)
	if e != nil {
		return nil, err
	}
	idx, e := image.ParseIndex(raw, d.MediaType)
	if e != nil {
		return nil, err
	}
	for _, m := range idx.Manifests {
		if other, e := image.Resolve(ctx, get, m, ocispec.Platform{}); e == nil {
			return other, nil
		}
	}
	return nil, err
}

func inspect(ctx context.Context, st *store.Store, name string, p *ocispec.Platform) (*inspected, error) {
	found, err := find(st, name)
	if err != nil {
		return nil, err
	}
	img, err := found.pick(ctx, p)
	if err != nil {
		return nil, err
	}
	cfg, err := image.ParseConfig(img.RawConfig)
	if err != nil {
		return nil, err
	}
	i := &inspected{
		ID: img.ID().String(), RepoTags: []string{}, RepoDigests: []string{},
		Author: cfg.Author, Config: cfg.Config,
		Architecture: cfg.Architecture, Variant: cfg.Variant, Os: cfg.OS, OsVersion: cfg.OSVersion,
		Size:       imageSize(st, img),
		RootFS:     inspectedRootFS{Type: cfg.RootFS.Type, Layers: cfg.RootFS.DiffIDs},
		Descriptor: found.Desc,
	}
	if n := len(cfg.History); n > 0 {
		i.Comment = cfg.History[n-1].Comment
	}
	if cfg.Created != nil {
		i.Created = cfg.Created.Format(time.RFC3339Nano)
	}
	seen := map[string]bool{}
	for _, t := range found.Tags {
		if t.Time.After(i.Metadata.LastTagTime) {
			i.Metadata.LastTagTime = t.Time
		}
		if nameless(t.Ref) {
			continue
		}
		if !strings.Contains(t.Ref, "@") {
			i.RepoTags = append(i.RepoTags, familiar(t.Ref))
		}
		if n, err := reference.ParseNormalizedNamed(t.Ref); err == nil && !seen[n.Name()] {
			seen[n.Name()] = true
			i.RepoDigests = append(i.RepoDigests, reference.FamiliarName(n)+"@"+found.Desc.Digest.String())
		}
	}
	return i, nil
}

// shortID is the form in which tables show an ID.
func shortID(d digest.Digest) string { return d.Encoded()[:12] }
