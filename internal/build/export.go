package build

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
)

// Export says what becomes of a plan.
type Export struct {
	Outputs     []Output
	Compression layer.Compression // of new layers; empty: gzip
	// Epoch is SOURCE_DATE_EPOCH: the image says of nothing in it that it is younger. Nil: none.
	Epoch *time.Time
}

// exporting is a plan on its way to its outputs.
type exporting struct {
	*Build
	Export
	opening sync.Once
	pushes  []*export.Push
	openErr error
	index   []byte // for several platforms
}

// Export computes a plan and writes the result to all outputs. If it fails, no tag was given.
func (b *Build) Export(ctx context.Context, plan *frontend.Plan, x Export) (*Result, error) {
	x.Compression = cmp.Or(x.Compression, layer.Gzip)
	e := &exporting{Build: b, Export: x}
	var built []*image.Image
	for _, p := range plan.Platforms {
		img, err := e.platform(ctx, p)
		if err != nil {
			return nil, err
		}
		built = append(built, img)
	}
	return e.export(ctx, built)
}

// platform builds one platform's image. Without need for more, it has layers alone.
func (e *exporting) platform(ctx context.Context, p frontend.PlatformPlan) (*image.Image, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	up := newUploads(e, cancel)
	defer up.wait()
	defer cancel(nil)
	res, err := e.solve(ctx, p.Definition, func(ls []image.Layer) { up.begin(ctx, ls) })
	if err != nil {
		return nil, err
	}
	layers, err := e.solver.Layers(ctx, res)
	if err != nil {
		return nil, err
	}
	if !e.needsImage() {
		platform := p.Platform
		return &image.Image{Layers: layers, Manifest: ocispec.Descriptor{Platform: &platform}}, nil
	}
	up.begin(ctx, layers)
	if layers, err = up.finish(); err != nil {
		return nil, err
	}
	opt := image.AssembleOptions{Config: p.Config, BaseConfig: p.BaseConfig, Epoch: e.Epoch}
	for _, l := range layers {
		n := image.NewLayer{Layer: l}
		if !l.Created.IsZero() {
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
	return img, nil
}

// export writes the finished images to all outputs: files first, then what
// registries have without a name, then names. So a failing output leaves no tag.
func (e *exporting) export(ctx context.Context, built []*image.Image) (*Result, error) {
	all := func(export.Spec) bool { return true }
	res := &Result{Tags: e.names(all)}
	if e.needsImage() {
		if err := e.describe(res, built); err != nil {
			return nil, err
		}
	}
	for _, o := range e.Outputs {
		if o.ToRegistry() || o.ToStore() {
			continue
		}
		if err := e.output(ctx, o, res, built); err != nil {
			return nil, fmt.Errorf("output %s: %w", o, err)
		}
	}
	if err := e.push(ctx, res, built); err != nil {
		return nil, err
	}
	if slices.ContainsFunc(e.Outputs, func(o Output) bool { return o.ToStore() }) {
		if err := e.describeInStore(built); err != nil {
			return nil, err
		}
		return res, image.Tag(e.Store, res.Descriptor, e.names(export.Spec.ToStore)...)
	}
	return res, nil
}

// push sends what the layers' uploads have left to be sent.
func (e *exporting) push(ctx context.Context, res *Result, built []*image.Image) error {
	ps, err := e.openPushes(ctx)
	if err != nil {
		return err
	}
	for _, p := range ps {
		if err := p.Manifests(ctx, built, e.index != nil); err != nil {
			return err
		}
	}
	// Tags only now: a registry that refuses leaves none behind in another.
	for _, p := range ps {
		if err := p.Tag(ctx, res.Descriptor, e.top(built)); err != nil {
			return err
		}
		res.Pushed = append(res.Pushed, p.Refs...)
	}
	return nil
}

// describe fills in what the result is called: one manifest, or an index of several.
func (e *exporting) describe(res *Result, built []*image.Image) (err error) {
	if len(built) == 1 {
		res.ID, res.Descriptor = built[0].ID(), built[0].Manifest
		res.Digest = res.Descriptor.Digest
		return nil
	}
	var opt image.IndexOptions
	for _, b := range built {
		opt.Manifests = append(opt.Manifests, b.Manifest)
	}
	e.index, res.Descriptor, err = image.AssembleIndex(opt)
	res.Digest, res.ID = res.Descriptor.Digest, res.Descriptor.Digest
	return err
}

// top is the document that a tag names.
func (e *exporting) top(built []*image.Image) []byte {
	if e.index != nil {
		return e.index
	}
	return built[0].RawManifest
}

func (e *exporting) output(ctx context.Context, o Output, res *Result, built []*image.Image) error {
	step := e.Progress.Step("exporting to "+string(o.Type), "")
	step.Start()
	var err error
	if o.NeedsImage() {
		err = e.writeImage(ctx, o, res, built)
	} else {
		err = e.writeFiles(ctx, o, res, built)
	}
	step.Done(err)
	return err
}

// writeImage writes an archive or layout.
func (e *exporting) writeImage(ctx context.Context, o Output, res *Result, built []*image.Image) error {
	if err := e.describeInStore(built); err != nil {
		return err
	}
	images := []image.ToSave{{Descriptor: res.Descriptor, Refs: o.Names}}
	opt := image.SaveOptions{Docker: o.Type == export.Docker, Fetcher: e.images, Platform: *built[0].Manifest.Platform}
	if o.Dir {
		return image.SaveLayout(ctx, e.Store, o.Dest, images, opt)
	}
	return e.toFile(ctx, o, res, func(w io.Writer) error { return image.Save(ctx, e.Store, w, images, opt) })
}

// writeFiles writes the root file system, those of several platforms into a directory each.
func (e *exporting) writeFiles(ctx context.Context, o Output, res *Result, built []*image.Image) error {
	var dirs []export.Dir
	for _, b := range built {
		t, closeTree, err := export.OpenTree(ctx, e.Store, e.images, b.Layers)
		if err != nil {
			return err
		}
		defer closeTree()
		name := strings.ReplaceAll(platforms.FormatAll(*b.Manifest.Platform), "/", "_")
		dirs = append(dirs, export.Dir{Name: name, Tree: export.Clamp(t, e.Epoch)})
	}
	t := dirs[0].Tree
	if len(dirs) > 1 {
		t = export.Dirs(dirs)
	}
	if o.Type == export.Tar {
		return e.toFile(ctx, o, res, func(w io.Writer) error { return export.WriteTar(ctx, t, w) })
	}
	if o.To != nil {
		return o.To.Tree(ctx, t)
	}
	skipped, err := export.WriteDir(ctx, t, o.Dest)
	if len(skipped) > 0 {
		e.Progress.Warn(fmt.Sprintf("%d devices and FIFOs were left out of %s, %s among them", len(skipped), o.Dest, skipped[0]))
	}
	return err
}

// toFile writes an output's one file. One on this machine appears only when it is whole;
// "-" is standard output.
func (e *exporting) toFile(ctx context.Context, o Output, res *Result, write func(io.Writer) error) error {
	to := func(w io.Writer) error {
		b := bufio.NewWriterSize(w, 1<<20)
		if err := write(b); err != nil {
			return err
		}
		return b.Flush()
	}
	switch {
	case o.To != nil:
		meta, err := res.Metadata()
		if err != nil {
			return err
		}
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		w, err := o.To.File(ctx, meta)
		if err != nil {
			return err
		}
		if err := to(w); err != nil {
			cancel() // or what there is would be taken for all of it
			_ = w.Close()
			return err
		}
		return w.Close()
	case o.Dest == "-":
		return to(e.Stdout)
	}
	return export.WriteFile(o.Dest, to)
}

// describeInStore stores the images without a name. Layers that came from a
// registry and were not needed here stay there until they are.
func (e *exporting) describeInStore(built []*image.Image) error {
	for _, b := range built {
		if _, err := image.Keep(e.Store, b); err != nil {
			return err
		}
	}
	if e.index == nil {
		return nil
	}
	_, err := e.Store.PutBlob(e.index)
	return err
}

// names are those that the image gets, of outputs of a kind.
func (e *exporting) names(kind func(export.Spec) bool) (all []string) {
	for _, o := range e.Outputs {
		for _, n := range o.Names {
			if kind(o.Spec) && !slices.Contains(all, n) {
				all = append(all, n)
			}
		}
	}
	return all
}

func (e *exporting) needsImage() bool {
	return slices.ContainsFunc(e.Outputs, func(o Output) bool { return o.NeedsImage() })
}
