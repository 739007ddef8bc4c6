package build

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/registry"
)

// variant is the image as some of the outputs want it: all of one compression, with
// the same annotations, and so on.
type variant struct {
	export.ImageOptions
	epoch   export.Epoch
	outputs []Output
	numbers []int // of the outputs

	opening sync.Once
	pushes  []*export.Push
	openErr error

	built []*image.Image // for each platform
	index []byte         // if the result is one
	desc  ocispec.Descriptor
}

// variants groups the outputs that are an image by what it is to be like.
func variants(outs []Output) (all []*variant) {
	byKey := map[string]*variant{}
	for i, o := range outs {
		if !o.NeedsImage() {
			continue
		}
		key := export.Spec{Type: export.Image, ImageOptions: o.ImageOptions, Epoch: o.Epoch}.String()
		v := byKey[key]
		if v == nil {
			v = &variant{ImageOptions: o.ImageOptions, epoch: o.Epoch}
			byKey[key] = v
			all = append(all, v)
		}
		v.outputs, v.numbers = append(v.outputs, o), append(v.numbers, i)
	}
	return all
}

// assemble makes the image of a platform's layers, which have their blobs.
// extra are further fields of its config.
func (v *variant) assemble(p frontend.PlatformPlan, layers []image.Layer, extra map[string]json.RawMessage) (*image.Image, error) {
	opt := image.AssembleOptions{
		Config: p.Config, BaseConfig: p.BaseConfig, Epoch: v.epoch.Of(p.Epoch), Rewritten: !v.KeepTimes, DockerTypes: v.DockerTypes,
		Annotations: v.Annotations.Of(export.ToManifest, &p.Platform), Extra: extra,
	}
	for _, l := range layers {
		n := image.NewLayer{Layer: l}
		if l.Built() {
			n.Created = &l.Created
		}
		opt.Layers = append(opt.Layers, n)
	}
	img, err := image.Assemble(opt)
	if err != nil {
		return nil, err
	}
	platform := p.Platform
	img.Manifest.Platform = &platform
	img.Manifest.Annotations = v.Annotations.Of(export.ToManifestDescriptor, &platform)
	return img, nil
}

// describe fills in what the variant is called: one manifest, or an index.
func (v *variant) describe(index bool) (err error) {
	if !index {
		v.desc = v.built[0].Manifest
		return nil
	}
	opt := image.IndexOptions{DockerTypes: v.DockerTypes, Annotations: v.Annotations.Of(export.ToIndex, nil)}
	for _, b := range v.built {
		opt.Manifests = append(opt.Manifests, b.Manifest)
	}
	v.index, v.desc, err = image.AssembleIndex(opt)
	v.desc.Annotations = v.Annotations.Of(export.ToIndexDescriptor, nil)
	return err
}

// tell says what the variant's image is, in BuildKit's words.
func (v *variant) tell(step *progress.Step) {
	for _, b := range v.built {
		step.Part("exporting manifest " + b.Manifest.Digest.String())
		step.Part("exporting config " + b.ID().String())
	}
	if v.index != nil {
		step.Part("exporting manifest list " + v.desc.Digest.String())
	}
}

// top is the document that a tag names.
func (v *variant) top() []byte {
	if v.index != nil {
		return v.index
	}
	return v.built[0].RawManifest
}

// stays reports whether the image, or an archive of it, is kept on this machine.
func (v *variant) stays() bool {
	return slices.ContainsFunc(v.outputs, func(o Output) bool { return o.ToStore() || !o.ToRegistry() })
}

// names are those that outputs of a kind give the image.
func (v *variant) names(kind func(export.Spec) bool) (all []string) {
	for _, o := range v.outputs {
		for _, n := range o.Names {
			if kind(o.Spec) && !slices.Contains(all, n) {
				all = append(all, n)
			}
		}
	}
	return all
}

// storeNames are the names that the variant gets in the local store; stored is false
// if it does not go there.
func (v *variant) storeNames() (names []string, stored bool) {
	names = v.names(export.Spec.ToStore)
	for _, o := range v.outputs {
		if !o.ToStore() {
			continue
		}
		stored = true
		if o.NameCanonical {
			for _, n := range o.Names {
				names = append(names, withDigest(n, v.desc.Digest))
			}
		}
		if o.Dangling != "" && (!o.DanglingEmptyOnly || len(o.Names) == 0) {
			names = append(names, o.Dangling+"@"+v.desc.Digest.String())
		}
	}
	return names, stored
}

// withDigest is a normalised name with a digest instead of its tag.
func withDigest(ref string, d digest.Digest) string {
	if i := strings.LastIndexByte(ref, ':'); i > strings.LastIndexByte(ref, '/') {
		ref = ref[:i]
	}
	return ref + "@" + d.String()
}

// openPushes opens one push for each repository that the variant goes to, once.
func (e *exporting) openPushes(ctx context.Context, v *variant) ([]*export.Push, error) {
	v.opening.Do(func() { v.pushes, v.openErr = e.openRepositories(ctx, v) })
	return v.pushes, v.openErr
}

func (e *exporting) openRepositories(ctx context.Context, v *variant) ([]*export.Push, error) {
	var all []*export.Push
	seen := map[string]*export.Push{}
	for _, o := range v.outputs {
		if !o.ToRegistry() {
			continue
		}
		for _, ref := range o.Names {
			repo, err := registry.Repository(ref)
			if err != nil {
				return nil, err
			}
			key := fmt.Sprint(repo, o.ByDigest)
			p := seen[key]
			if p == nil {
				if p, err = export.OpenPush(ctx, e.Registry, e.Store, e.images, ref, e.Progress); err != nil {
					return nil, err
				}
				p.ByDigest = o.ByDigest
				seen[key] = p
				all = append(all, p)
			} else if !slices.Contains(p.Refs, ref) {
				p.Refs = append(p.Refs, ref)
			}
		}
	}
	return all, nil
}
