package build

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/cache/remote"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/engine"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/tree"
)

// Export says what becomes of a plan.
type Export struct {
	Outputs     []Output
	Compression layer.Compression // of new layers, where an output does not say; empty: gzip
	// CacheTo are the caches that are written.
	CacheTo []cache.Spec
	// MountsTo is the cache that the cache mounts are written to which steps used.
	MountsTo []cache.Spec
}

// exporting is a plan on its way to its outputs.
type exporting struct {
	*Build
	Export
	variants []*variant
	packing  *semaphore.Weighted // compression uses all CPUs: one layer at a time
	writing  writing
}

// files is the root file system that was built for a platform.
type files struct {
	id       string // of the platform, as the front end calls it
	platform ocispec.Platform
	epoch    *time.Time // SOURCE_DATE_EPOCH
	layers   []image.Layer
}

// Export computes a plan and writes the result to all outputs. If it fails, no tag was given.
func (b *Build) Export(ctx context.Context, plan *frontend.Plan, x Export) (*Result, error) {
	x.Outputs = slices.Clone(x.Outputs)
	var ps []ocispec.Platform
	for _, p := range plan.Platforms {
		ps = append(ps, p.Platform)
	}
	for i := range x.Outputs {
		o := &x.Outputs[i]
		if o.NeedsImage() {
			o.Compression = cmp.Or(o.Compression, x.Compression, layer.Gzip)
		}
		if err := o.check(ps, plan.Multi); err != nil {
			return nil, err
		}
	}
	x.Compression = cmp.Or(x.Compression, layer.Gzip)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	e := &exporting{Build: b, Export: x, variants: variants(x.Outputs), packing: semaphore.NewWeighted(1)}
	err := checkMountsTo(x.MountsTo)
	if err != nil {
		return nil, err
	}
	if e.writing, err = b.write(ctx, x, e.variants, cancel); err != nil {
		return nil, err
	}
	res, err := e.run(ctx, plan)
	if err != nil {
		return nil, diag.Ended(ctx, err) // maybe a cache that could not be written
	}
	return res, nil
}

// run computes a plan and writes what comes of it.
func (e *exporting) run(ctx context.Context, plan *frontend.Plan) (*Result, error) {
	var built []files
	for _, p := range plan.Platforms {
		f, err := e.platform(ctx, p)
		if err != nil {
			return nil, err
		}
		built = append(built, f)
	}
	// Before there is any name for the result: a build that fails has given none.
	if err := e.exportMounts(ctx); err != nil {
		return nil, err
	}
	if err := e.writing.flush(ctx); err != nil {
		return nil, err
	}
	return e.export(ctx, built, plan.Multi)
}

// platform builds for one platform: the root file system, and of it each variant's image.
// Layers that a cache promised and that cannot be had are built in another attempt.
func (e *exporting) platform(ctx context.Context, p frontend.PlatformPlan) (files, error) {
	var built files
	var images []*image.Image
	err := e.again(ctx, func() (err error) {
		built, images, err = e.attempt(ctx, p)
		return err
	})
	if err != nil {
		return built, err
	}
	for i, v := range e.variants {
		v.built = append(v.built, images[i])
	}
	return built, nil
}

// attempt is platform, if no cache fails.
func (e *exporting) attempt(whole context.Context, p frontend.PlatformPlan) (files, []*image.Image, error) {
	built := files{id: p.ID, platform: p.Platform, epoch: p.Epoch}
	ctx, cancel := context.WithCancelCause(whole)
	var ups []*uploads
	for _, v := range e.variants {
		up := newUploads(e, v, p.Epoch, cancel)
		up.pushes = func() ([]*export.Push, error) { return e.openPushes(whole, v) }
		defer up.wait()
		ups = append(ups, up)
	}
	defer cancel(nil)
	begin := func(ls []image.Layer) {
		for _, up := range ups {
			up.begin(ctx, ls)
		}
	}
	var results results
	w := engine.Watch{Layers: begin}
	if e.writing.any() {
		w.Record = func(r engine.Recorded) {
			e.writing.keep(r)
			results.add(r)
		}
	}
	res, err := e.solve(ctx, p.Definition, w)
	if err != nil {
		return built, nil, err
	}
	if built.layers, err = e.solver.Layers(ctx, res); err != nil {
		return built, nil, err
	}
	begin(built.layers)
	var images []*image.Image
	for i, v := range e.variants {
		layers, err := ups[i].finish()
		if err == nil && v.stays() {
			layers, err = e.bring(ctx, layers, true)
		}
		if err != nil {
			return built, nil, err
		}
		img, err := e.assemble(v, p, layers, built.layers, results.all)
		if err != nil {
			return built, nil, err
		}
		images = append(images, img)
	}
	if slices.ContainsFunc(e.Outputs, func(o Output) bool { return o.Files() }) {
		built.layers, err = e.bring(ctx, built.layers, false)
	}
	return built, images, err
}

// assemble makes a variant's image, with the records of its own layers if that was asked for.
func (e *exporting) assemble(v *variant, p frontend.PlatformPlan, layers, computed []image.Layer, results []remote.InlineResult) (*image.Image, error) {
	if !e.writing.inline {
		return v.assemble(p, layers, nil)
	}
	records, err := remote.EncodeInline(results, computed, layers, v.epoch.Of(p.Epoch))
	if err != nil {
		return nil, err
	}
	return v.assemble(p, layers, map[string]json.RawMessage{remote.InlineField: records})
}

// export writes the finished images to all outputs: files first, then what
// registries have without a name, then names. So a failing output leaves no tag.
func (e *exporting) export(ctx context.Context, built []files, index bool) (*Result, error) {
	res := &Result{Images: map[int]ocispec.Descriptor{}}
	for _, v := range e.variants {
		if err := v.describe(index); err != nil {
			return nil, err
		}
		res.add(v)
		for _, n := range v.numbers {
			res.Images[n] = v.desc
		}
	}
	if err := e.write(ctx, built, index); err != nil {
		return nil, err
	}
	return res, e.publish(ctx, res)
}

// publish gives the images their names, in registries and then in the store.
func (e *exporting) publish(ctx context.Context, res *Result) (err error) {
	if !slices.ContainsFunc(e.Outputs, func(o Output) bool { return o.ToRegistry() || o.ToStore() }) {
		return nil
	}
	step := e.Progress.Step("exporting to image", "")
	step.Start()
	defer func() { step.Done(err) }()
	for _, v := range e.variants {
		v.tell(step)
	}
	if err := e.push(ctx, res, step); err != nil {
		return err
	}
	for _, v := range e.variants {
		names, stored := v.storeNames()
		if !stored {
			continue
		}
		if err := e.describeInStore(v); err != nil {
			return err
		}
		for _, n := range names {
			step.Part("naming to " + n)
		}
		if err := image.Tag(e.Store, v.desc, names...); err != nil {
			return err
		}
	}
	return nil
}

// add says what the result is called: as its first variant is, with the names of all.
func (r *Result) add(v *variant) {
	for _, n := range v.names(func(export.Spec) bool { return true }) {
		if !slices.Contains(r.Tags, n) {
			r.Tags = append(r.Tags, n)
		}
	}
	if r.Digest != "" {
		return
	}
	r.Descriptor, r.Digest, r.ID = v.desc, v.desc.Digest, v.desc.Digest
	if v.index == nil {
		r.ID = v.built[0].ID()
	}
}

// write writes archives, layouts and files.
func (e *exporting) write(ctx context.Context, built []files, index bool) error {
	for _, v := range e.variants {
		for _, o := range v.outputs {
			if o.Type == export.OCI || o.Type == export.Docker && !o.ToStore() {
				if err := e.output(o, func() error { return e.writeImage(ctx, o, v) }); err != nil {
					return err
				}
			}
		}
	}
	for _, o := range e.Outputs {
		if o.Files() {
			if err := e.output(o, func() error { return e.writeFiles(ctx, o, built, index) }); err != nil {
				return err
			}
		}
	}
	return nil
}

// output is the step that writing one output is.
func (e *exporting) output(o Output, write func() error) error {
	step := e.Progress.Step("exporting to "+string(o.Type), "")
	step.Start()
	err := write()
	step.Done(err)
	if err != nil {
		return fmt.Errorf("output %s: %w", o, err)
	}
	return nil
}

// push sends what the layers' uploads have left to be sent.
func (e *exporting) push(ctx context.Context, res *Result, step *progress.Step) error {
	for _, v := range e.variants {
		ps, err := e.openPushes(ctx, v)
		if err != nil {
			return err
		}
		for _, p := range ps {
			p.Step = step
			done := step.Part("pushing layers")
			if err := p.Manifests(ctx, v.built, v.index != nil); err != nil {
				return err
			}
			done()
		}
	}
	// Tags only now: a registry that refuses leaves none behind in another.
	for _, v := range e.variants {
		for _, p := range v.pushes {
			refs, err := p.Tag(ctx, v.desc, v.top())
			if err != nil {
				return err
			}
			res.Pushed = append(res.Pushed, refs...)
		}
	}
	return nil
}

// writeImage writes an archive or layout.
func (e *exporting) writeImage(ctx context.Context, o Output, v *variant) error {
	if err := e.describeInStore(v); err != nil {
		return err
	}
	images := []image.ToSave{{Descriptor: v.desc, Refs: o.Names}}
	opt := image.SaveOptions{Docker: o.Type == export.Docker && !o.Dir, Fetcher: e.images, Platform: *v.built[0].Manifest.Platform}
	if o.Dir && o.To == nil {
		return image.SaveLayout(ctx, e.Store, o.Dest, images, opt)
	}
	said := &Result{}
	said.add(v)
	return e.toFile(ctx, o, said, func(w io.Writer) error { return image.Save(ctx, e.Store, w, images, opt) })
}

// writeFiles writes root file systems. Each of several that are one index gets a directory of its own, if nobody says otherwise.
func (e *exporting) writeFiles(ctx context.Context, o Output, built []files, split bool) error {
	var ts []export.PlatformTree
	at := time.Unix(0, 0) // of the directories that tell platforms apart
	for _, b := range built {
		t, closeTree, err := export.OpenTree(ctx, e.Store, e.images, b.layers)
		if err != nil {
			return err
		}
		defer closeTree()
		epoch := o.Epoch.Of(b.epoch)
		if epoch != nil {
			at = *epoch
		}
		ts = append(ts, export.PlatformTree{ID: b.id, Platform: b.platform, Tree: export.Clamp(t, epoch)})
	}
	if o.Split != nil {
		split = *o.Split
	}
	t, err := together(ts, split, at)
	if err != nil {
		return err
	}
	switch {
	case o.Type == export.Tar:
		return e.toFile(ctx, o, &Result{}, func(w io.Writer) error { return export.WriteTar(ctx, t, w) })
	case o.To != nil:
		return o.To.Tree(ctx, t)
	}
	skipped, err := export.WriteDir(ctx, t, o.Dest)
	if len(skipped) > 0 {
		e.Progress.Warn(fmt.Sprintf("%d devices and FIFOs were left out of %s, %s among them", len(skipped), o.Dest, skipped[0]))
	}
	return err
}

// together is one tree of all platforms'.
func together(ts []export.PlatformTree, split bool, at time.Time) (tree.Tree, error) {
	switch {
	case split:
		return export.SplitPlatforms(ts, at), nil
	case len(ts) == 1:
		return ts[0].Tree, nil
	}
	return export.MergePlatforms(ts)
}

// toFile writes an output's one file. One on this machine appears only when it is whole;
// "-" is standard output. said is what somebody else is told of the result.
func (e *exporting) toFile(ctx context.Context, o Output, said *Result, write func(io.Writer) error) error {
	to := func(w io.Writer) error {
		b := bufio.NewWriterSize(w, 1<<20)
		if err := write(b); err != nil {
			return err
		}
		return b.Flush()
	}
	switch {
	case o.To != nil:
		return toSomebody(ctx, o.To, said, to)
	case o.Dest == "-":
		return to(e.Stdout)
	}
	return export.WriteFile(o.Dest, to)
}

func toSomebody(ctx context.Context, d Destination, said *Result, write func(io.Writer) error) error {
	meta, err := said.Metadata()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w, err := d.File(ctx, meta)
	if err != nil {
		return err
	}
	if err := write(w); err != nil {
		cancel() // or what there is would be taken for all of it
		_ = w.Close()
		return err
	}
	return w.Close()
}

// describeInStore stores the images without a name. Layers that came from a
// registry and were not needed here stay there until they are.
func (e *exporting) describeInStore(v *variant) error {
	for _, b := range v.built {
		if _, err := image.Keep(e.Store, b); err != nil {
			return err
		}
	}
	if v.index == nil {
		return nil
	}
	_, err := e.Store.PutBlob(v.index)
	return err
}
