package build

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/image"
)

// export writes the finished images to all outputs: files first, then what
// registries have without a name, then names. So a failing output leaves no tag.
func (j *job) export(ctx context.Context, built []*image.Image) (*Result, error) {
	all := func(export.Spec) bool { return true }
	res := &Result{Tags: j.names(all)}
	if j.needsImage() {
		if err := j.describe(res, built); err != nil {
			return nil, err
		}
	}
	for _, o := range j.outputs {
		if o.ToRegistry() || o.ToStore() {
			continue
		}
		if err := j.output(ctx, o, res, built); err != nil {
			return nil, fmt.Errorf("output %s: %w", o, err)
		}
	}
	if err := j.push(ctx, res, built); err != nil {
		return nil, err
	}
	if slices.ContainsFunc(j.outputs, func(o output) bool { return o.ToStore() }) {
		if err := j.describeInStore(built); err != nil {
			return nil, err
		}
		return res, image.Tag(j.Store, res.Descriptor, j.names(export.Spec.ToStore)...)
	}
	return res, nil
}

// push sends what the layers' uploads have left to be sent.
func (j *job) push(ctx context.Context, res *Result, built []*image.Image) error {
	ps, err := j.openPushes(ctx)
	if err != nil {
		return err
	}
	for _, p := range ps {
		if err := p.Manifests(ctx, built, j.index != nil); err != nil {
			return err
		}
	}
	// Tags only now: a registry that refuses leaves none behind in another.
	for _, p := range ps {
		if err := p.Tag(ctx, res.Descriptor, j.top(built)); err != nil {
			return err
		}
		res.Pushed = append(res.Pushed, p.Refs...)
	}
	return nil
}

// describe fills in what the result is called: one manifest, or an index of several.
func (j *job) describe(res *Result, built []*image.Image) (err error) {
	if len(built) == 1 {
		res.ID, res.Descriptor = built[0].ID(), built[0].Manifest
		res.Digest = res.Descriptor.Digest
		return nil
	}
	var opt image.IndexOptions
	for _, b := range built {
		opt.Manifests = append(opt.Manifests, b.Manifest)
	}
	j.index, res.Descriptor, err = image.AssembleIndex(opt)
	res.Digest, res.ID = res.Descriptor.Digest, res.Descriptor.Digest
	return err
}

// top is the document that a tag names.
func (j *job) top(built []*image.Image) []byte {
	if j.index != nil {
		return j.index
	}
	return built[0].RawManifest
}

func (j *job) output(ctx context.Context, o output, res *Result, built []*image.Image) error {
	step := j.Progress.Step("exporting to "+string(o.Type), "")
	step.Start()
	var err error
	if o.NeedsImage() {
		err = j.writeImage(ctx, o, res, built)
	} else {
		err = j.writeFiles(ctx, o, built)
	}
	step.Done(err)
	return err
}

// writeImage writes an archive or layout.
func (j *job) writeImage(ctx context.Context, o output, res *Result, built []*image.Image) error {
	if err := j.describeInStore(built); err != nil {
		return err
	}
	images := []image.ToSave{{Descriptor: res.Descriptor, Refs: o.names}}
	opt := image.SaveOptions{Docker: o.Type == export.Docker, Fetcher: j.images, Platform: *built[0].Manifest.Platform}
	if o.Dir {
		return image.SaveLayout(ctx, j.Store, o.Dest, images, opt)
	}
	return j.toFile(o.Dest, func(w io.Writer) error { return image.Save(ctx, j.Store, w, images, opt) })
}

// writeFiles writes the root file system.
func (j *job) writeFiles(ctx context.Context, o output, built []*image.Image) error {
	if len(built) != 1 {
		return diag.New(diag.ExitUsage, "several platforms cannot go to one output of type %s", o.Type)
	}
	t, closeTree, err := export.OpenTree(ctx, j.Store, j.images, built[0].Layers)
	if err != nil {
		return err
	}
	defer closeTree()
	t = export.Clamp(t, j.epoch)
	if o.Type == export.Tar {
		return j.toFile(o.Dest, func(w io.Writer) error { return export.WriteTar(ctx, t, w) })
	}
	skipped, err := export.WriteDir(ctx, t, o.Dest)
	if len(skipped) > 0 {
		j.Progress.Warn(fmt.Sprintf("%d devices and FIFOs were left out of %s, %s among them", len(skipped), o.Dest, skipped[0]))
	}
	return err
}

// toFile writes a file that appears only when it is whole; "-" is standard output.
func (j *job) toFile(dest string, write func(io.Writer) error) error {
	to := func(w io.Writer) error {
		b := bufio.NewWriterSize(w, 1<<20)
		if err := write(b); err != nil {
			return err
		}
		return b.Flush()
	}
	if dest == "-" {
		return to(j.Stdout)
	}
	return export.WriteFile(dest, to)
}

// describeInStore stores the images without a name. Layers that came from a
// registry and were not needed here stay there until they are.
func (j *job) describeInStore(built []*image.Image) error {
	for _, b := range built {
		if _, err := image.Keep(j.Store, b); err != nil {
			return err
		}
	}
	if j.index == nil {
		return nil
	}
	_, err := j.Store.PutBlob(j.index)
	return err
}
