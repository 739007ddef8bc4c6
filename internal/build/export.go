package build

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/image"
)

// export writes the finished images to all outputs: archives and directories
// first, the tags of registries last.
func (j *job) export(ctx context.Context, built []*image.Image) (*Result, error) {
	res := &Result{Tags: j.tags}
	if j.needsImage() {
		if err := j.describe(res, built); err != nil {
			return nil, err
		}
	}
	for _, o := range j.outputs {
		if o.ToRegistry() && !o.ToStore() {
			continue
		}
		if err := j.output(ctx, o, res, built); err != nil {
			return nil, fmt.Errorf("output %s: %w", o, err)
		}
	}
	if len(j.pushRefs()) == 0 {
		return res, nil
	}
	ps, err := j.openPushes(ctx)
	if err != nil {
		return nil, err
	}
	for _, p := range ps {
		if err := p.Manifests(ctx, built, j.index != nil); err != nil {
			return nil, err
		}
	}
	// Tags only now: a registry that refuses leaves none behind in another.
	for _, p := range ps {
		if err := p.Tag(ctx, res.Descriptor, j.top(built)); err != nil {
			return nil, err
		}
		res.Pushed = append(res.Pushed, p.Refs...)
	}
	return res, nil
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

func (j *job) output(ctx context.Context, o export.Spec, res *Result, built []*image.Image) error {
	names := append(append([]string{}, j.tags...), o.Names...)
	if o.ToStore() {
		return j.keep(names, res, built)
	}
	if len(built) != 1 && !o.NeedsImage() {
		return diag.New(diag.ExitUsage, "several platforms cannot go to one %s", o.Type)
	}
	step := j.Progress.Step("exporting to "+string(o.Type), "")
	step.Start()
	err := j.write(ctx, o, names, res, built)
	step.Done(err)
	return err
}

func (j *job) write(ctx context.Context, o export.Spec, names []string, res *Result, built []*image.Image) error {
	if o.Type == export.Local {
		t, closeTree, err := export.OpenTree(ctx, j.Store, j.images, built[0].Layers)
		if err != nil {
			return err
		}
		defer closeTree()
		skipped, err := export.WriteDir(ctx, t, o.Dest)
		if len(skipped) > 0 {
			j.Progress.Warn(fmt.Sprintf("%d devices and FIFOs were left out of %s, %s among them", len(skipped), o.Dest, skipped[0]))
		}
		return err
	}
	return j.toFile(o.Dest, func(w io.Writer) error {
		if o.Type == export.Tar {
			t, closeTree, err := export.OpenTree(ctx, j.Store, j.images, built[0].Layers)
			if err != nil {
				return err
			}
			defer closeTree()
			return export.WriteTar(ctx, t, w)
		}
		if err := j.describeInStore(built); err != nil {
			return err
		}
		return image.Save(ctx, j.Store, w, []image.ToSave{{Descriptor: res.Descriptor, Refs: names}},
			image.SaveOptions{Docker: o.Type == export.Docker, Fetcher: j.images})
	})
}

// toFile writes a file that appears only when it is whole; "-" is standard output.
func (j *job) toFile(dest string, write func(io.Writer) error) error {
	if dest == "-" {
		return write(j.Stdout)
	}
	f, err := os.CreateTemp(filepath.Dir(dest), ".kiln-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if err := write(f); err != nil {
		f.Close()
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), dest)
}

// keep puts the images into the local store under names.
func (j *job) keep(names []string, res *Result, built []*image.Image) error {
	if err := j.describeInStore(built); err != nil {
		return err
	}
	return image.Tag(j.Store, res.Descriptor, names...)
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
