package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"time"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/cachemount"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/fileop"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/sandbox"
	"github.com/kiln-build/kiln/internal/tree"
)

// selection is what m shows of its input, as a copy would take it.
func (m *Mount) selection() fileop.CopyAction {
	return fileop.CopyAction{Src: path.Join("/", m.Source), Dest: "/" + mountedName, FollowSymlink: true}
}

// everything selects a whole tree.
func everything() fileop.CopyAction {
	return fileop.CopyAction{Src: "/", Dest: "/", DirCopyContents: true}
}

// hash adds a mount's fields: of a cache neither which one it is nor how it is shared, for
// what is in it must not make a difference; of a secret or agent not what it is.
func (m *Mount) hash(h *cache.Hasher) {
	h.String(m.Dest)
	h.Int(int64(m.Input))
	h.String(m.Source)
	h.Bool(m.Writable)
	switch {
	case m.Tmpfs != nil:
		h.String("tmpfs")
		h.Int(m.Tmpfs.Size)
	case m.Secret != nil:
		h.Strings([]string{"secret", m.Secret.ID})
		m.Secret.Owner.hash(h)
		h.Bool(m.Secret.Optional)
	case m.SSH != nil:
		h.Strings([]string{"ssh", m.SSH.ID})
		m.SSH.Owner.hash(h)
		h.Bool(m.SSH.Optional)
	default:
		h.String("input")
		h.Bool(m.Cache != nil)
	}
}

func (o Owner) hash(h *cache.Hasher) {
	for _, n := range []uint32{o.UID, o.GID, o.Mode} {
		h.Int(int64(n))
	}
}

// execByContent is byContent for a RUN step: what is only looked at counts by what is
// mounted of it. The root file system and mounts that are results count as a whole.
func (r *run) execByContent(op *Op, x *Exec, computed bool) []bool {
	out := make([]bool, len(op.Inputs))
	whole := make([]bool, len(op.Inputs))
	for i, m := range x.Mounts {
		if m.takesInput() && m.Input != 0 {
			out[m.Input] = computed
			whole[m.Input] = whole[m.Input] || x.isResult(i)
		}
	}
	for n, in := range op.Inputs {
		if in.Op == nil {
			out[n] = false
			continue
		}
		_, local := in.Op.Do.(*Local) // which has no other key
		out[n] = local || out[n] && !whole[n]
	}
	return out
}

// hashMounted adds what is mounted of inputs that count by content.
func (r *run) hashMounted(ctx context.Context, h *cache.Hasher, op *Op, x *Exec, byContent []bool, ins []Result) error {
	add := func(mount, input int, a fileop.CopyAction) error {
		d, err := r.copied(ctx, op, mount, input, a, ins)
		if errors.Is(err, fs.ErrNotExist) {
			err = diag.New(diag.ExitDockerfile, "%w", err)
		}
		h.String(d.String())
		return err
	}
	if len(byContent) > 0 && byContent[0] {
		if err := add(Root, 0, everything()); err != nil {
			return err
		}
	}
	for i := range x.Mounts {
		m := &x.Mounts[i]
		if !m.takesInput() || !byContent[m.Input] {
			continue
		}
		a := m.selection()
		if x.isResult(i) {
			a = everything()
		}
		if err := add(i, m.Input, a); err != nil {
			return err
		}
	}
	return nil
}

// stepMounts is what a step is shown, and what comes back of it.
type stepMounts struct {
	mounts []sandbox.Mount
	// volumes are those of mounts that are results, by number of the mount, and
	// below are the layers that they begin with.
	volumes map[int]*sandbox.Volume
	below   map[int][]image.Layer
	caches  []*heldCache
	secrets [][]byte // values that the step must not print
}

// heldCache is a cache mount that a step has.
type heldCache struct {
	*cachemount.Mount
	volume   *sandbox.Volume
	writable bool
	unshare  func() // nil if nobody else has it
}

func (m *stepMounts) release() {
	for _, c := range m.caches {
		c.Release()
		if c.unshare != nil {
			c.unshare()
		}
	}
}

// sharers are the steps of a build that have a cache mount at the same time.
type sharers struct {
	steps int
	told  bool
}

// share says, when a step has run for long beside others with the same cache mount, that none sees what
// another writes: a step that waits for a file of another's would wait for ever. The step calls unshare at its end.
func (s *Solver) share(k cachemount.Key) (unshare func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sh := s.sharers[k]
	if sh == nil {
		sh = &sharers{}
		s.sharers[k] = sh
	}
	sh.steps++
	note := func() {
		s.mu.Lock()
		tell := sh.steps > 1 && !sh.told
		sh.told = sh.told || tell
		s.mu.Unlock()
		if tell {
			s.Progress.Note(fmt.Sprintf("cache mount %q is used by several steps at once: none sees what another writes before that has ended; with sharing=locked they take turns", k.ID))
		}
	}
	var timer *time.Timer
	if sh.steps > 1 {
		timer = time.AfterFunc(s.patience, note)
	}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		sh.steps--
		if timer != nil {
			timer.Stop()
		}
	}
}

// mounts makes the step's mounts ready to be shown. It may wait for others to be done with a cache.
func (r *run) mounts(ctx context.Context, op *Op, x *Exec, ins []Result) (_ *stepMounts, err error) {
	out := &stepMounts{volumes: map[int]*sandbox.Volume{}, below: map[int][]image.Layer{}}
	defer func() {
		if err != nil {
			out.release()
		}
	}()
	caches, err := r.acquire(ctx, op, x, ins, out)
	if err != nil {
		return nil, err
	}
	for i := range x.Mounts {
		m := &x.Mounts[i]
		s := sandbox.Mount{Dest: m.Dest, Source: m.Source, Writable: m.Writable}
		shown := true
		switch {
		case m.Tmpfs != nil:
			s.Tmpfs = &sandbox.Tmpfs{Size: m.Tmpfs.Size}
		case m.Secret != nil:
			shown, err = r.secretFile(ctx, m.Secret, &s, out)
		case m.SSH != nil:
			shown, err = r.agentSocket(ctx, m.SSH, &s)
		case m.Cache != nil:
			s.Volume = caches[i].volume
			if op.Inputs[m.Input].Op == nil {
				s.Source = path.Join(cachemount.EmptyDir, m.Source)
			}
		case x.isResult(i):
			s.Volume, err = r.resultVolume(ctx, i, ins[m.Input], out)
		default:
			err = r.shownPart(ctx, m, ins[m.Input], &s)
		}
		if err != nil {
			return nil, err
		}
		if shown {
			out.mounts = append(out.mounts, s)
		}
	}
	return out, nil
}

// shownPart mounts a part of an input, whose changes nobody keeps.
func (r *run) shownPart(ctx context.Context, m *Mount, in Result, s *sandbox.Mount) error {
	if in.context != nil {
		l, err := r.contextLayer(ctx, in, m.selection())
		if err != nil {
			return err
		}
		s.Volume, s.Source = r.volume([]image.Layer{l}), mountedName
		return nil
	}
	t, err := r.Tree(ctx, in)
	if err != nil {
		return err
	}
	s.Volume = r.volume(in.Layers)
	return m.exists(t)
}

// resultVolume mounts a whole input, whose changes will be a result.
func (r *run) resultVolume(ctx context.Context, mount int, in Result, out *stepMounts) (*sandbox.Volume, error) {
	in, err := r.inLayers(ctx, in)
	if err != nil {
		return nil, err
	}
	if _, err := r.Tree(ctx, in); err != nil { // fetches what is not there
		return nil, err
	}
	out.volumes[mount], out.below[mount] = r.volume(in.Layers), in.Layers
	return out.volumes[mount], nil
}

func (r *run) volume(ls []image.Layer) *sandbox.Volume {
	v := &sandbox.Volume{}
	for _, l := range ls {
		v.Layers = append(v.Layers, r.Store.LayerPath(l.DiffID))
	}
	return v
}

// exists checks that there is what m shows: of an input that counts as a
// whole, nobody has asked before.
func (m *Mount) exists(t tree.Tree) error {
	_, err := rootfs.Resolve(t, path.Join("/", m.Source), true)
	if errors.Is(err, fs.ErrNotExist) {
		return diag.New(diag.ExitDockerfile, "%q: not found", path.Join("/", m.Source))
	}
	return err
}

// acquire takes the step's cache mounts, by number of the mount. Two mounts of one cache
// show the same. All steps take theirs in the same order, so that none waits for the other.
func (r *run) acquire(ctx context.Context, op *Op, x *Exec, ins []Result, out *stepMounts) (map[int]*heldCache, error) {
	type wish struct {
		key    cachemount.Key
		mounts []int
	}
	var wishes []*wish
	for i, m := range x.Mounts {
		if m.Cache == nil {
			continue
		}
		base, err := r.cacheBase(ctx, op, m.Input)
		if err != nil {
			return nil, err
		}
		k := cachemount.Key{ID: m.Cache.ID, Base: base}
		if n := slices.IndexFunc(wishes, func(w *wish) bool { return w.key == k }); n >= 0 {
			wishes[n].mounts = append(wishes[n].mounts, i)
			continue
		}
		wishes = append(wishes, &wish{k, []int{i}})
	}
	slices.SortFunc(wishes, func(a, b *wish) int {
		return cmp.Or(cmp.Compare(a.key.ID, b.key.ID), cmp.Compare(a.key.Base, b.key.Base))
	})
	caches := map[int]*heldCache{}
	for _, w := range wishes {
		first := &x.Mounts[w.mounts[0]]
		c, err := r.takeCache(ctx, op.Inputs[first.Input].Op, w.key, first.Cache.Sharing, ins[first.Input])
		if err != nil {
			return nil, err
		}
		out.caches = append(out.caches, c)
		for _, i := range w.mounts {
			caches[i] = c
			c.writable = c.writable || x.Mounts[i].Writable
		}
	}
	return caches, nil
}

// cacheBase names what a cache mount begins with.
func (r *run) cacheBase(ctx context.Context, op *Op, input int) (string, error) {
	in := op.Inputs[input]
	if in.Op == nil {
		return "", nil
	}
	// Not by its content: a base that is made again, and differs in times alone, must not
	// lose the cache.
	k, err := r.inputKey(ctx, in)
	return k.String(), err
}

func (r *run) takeCache(ctx context.Context, op *Op, k cachemount.Key, sharing cachemount.Sharing, in Result) (*heldCache, error) {
	in, err := r.inLayers(ctx, in)
	if err != nil {
		return nil, err
	}
	caches := cachemount.New(r.Store)
	if op == nil {
		l, err := caches.Empty(ctx)
		if err != nil {
			return nil, err
		}
		in.Layers = []image.Layer{l}
	}
	if err := r.importCache(ctx, caches, k, in.Layers); err != nil {
		return nil, fmt.Errorf("import cache mount %q: %w", k.ID, err)
	}
	c, err := caches.Acquire(ctx, k, sharing, in.Layers, func() {
		r.Progress.Note(fmt.Sprintf("cache mount %q is locked by another step: waiting for it", k.ID))
	})
	if err != nil {
		return nil, fmt.Errorf("take cache mount %q: %w", k.ID, err)
	}
	if r.Mounts != nil {
		r.Mounts.Used(c.Key)
	}
	if _, err := r.Tree(ctx, Result{Layers: c.Layers}); err != nil { // fetches what is not there
		c.Release()
		return nil, err
	}
	held := &heldCache{Mount: c, volume: r.volume(c.Layers)}
	if sharing == cachemount.Shared {
		held.unshare = r.share(c.Key)
	}
	return held, nil
}

// importCache gets a cache mount that the store does not have from elsewhere.
func (r *run) importCache(ctx context.Context, caches *cachemount.Store, k cachemount.Key, base []image.Layer) error {
	if r.Mounts == nil || r.wasEmptied(k) {
		return nil
	}
	have, err := caches.Own(k)
	if have != nil || err != nil {
		return err
	}
	own, err := r.Mounts.Import(ctx, k)
	if own == nil || err != nil {
		return err
	}
	return caches.Import(ctx, k, base, own)
}

// emptied names cache mounts that a build has emptied.
type emptied struct {
	id    string
	based bool // those that began with something
}

// emptyCaches empties the cache mounts of steps that run though their results are known, as BuildKit does:
// before anything runs, so that steps that came before find them empty, too. A build does it
// once, for what its steps have put there since is to stay.
func (s *Solver) emptyCaches(ctx context.Context, ops []*Op) error {
	for _, op := range ops {
		x, ok := op.Do.(*Exec)
		if !ok || !op.IgnoreCache {
			continue
		}
		for _, m := range x.Mounts {
			if m.Cache == nil {
				continue
			}
			if err := s.emptyCache(ctx, emptied{m.Cache.ID, op.Inputs[m.Input].Op != nil}); err != nil {
				return fmt.Errorf("empty cache mount %q: %w", m.Cache.ID, err)
			}
		}
	}
	return nil
}

func (s *Solver) emptyCache(ctx context.Context, e emptied) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.emptied[e] {
		return nil
	}
	s.emptied[e] = true
	return cachemount.New(s.Store).RemoveAll(ctx, e.id, e.based)
}

// wasEmptied reports whether this build has emptied a cache mount.
func (s *Solver) wasEmptied(k cachemount.Key) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.emptied[emptied{k.ID, k.Base != ""}]
}

// keepCaches keeps what a step has changed in its cache mounts.
func (r *run) keepCaches(ctx context.Context, ses sandbox.Session, m *stepMounts) error {
	for _, c := range m.caches {
		if !c.writable {
			continue
		}
		l, err := r.changes(ctx, ses, c.volume)
		if err != nil {
			return fmt.Errorf("keep cache mount %q: %w", c.Key.ID, err)
		}
		f, err := layer.Open(r.Store.LayerPath(l.DiffID))
		if err != nil {
			return fmt.Errorf("keep cache mount %q: %w", c.Key.ID, err)
		}
		empty := f.Info().Entries == 0
		f.Close()
		if empty {
			continue
		}
		if err := c.Add(ctx, l); err != nil {
			return fmt.Errorf("keep cache mount %q: %w", c.Key.ID, err)
		}
	}
	return nil
}

// changes makes a layer of what the last process changed in a volume.
func (r *run) changes(ctx context.Context, ses sandbox.Session, v *sandbox.Volume) (image.Layer, error) {
	l, err := image.Commit(ctx, r.Store, image.CommitOptions{}, func(w io.Writer) error { return ses.Changes(ctx, v, w) })
	l.Created = time.Now().UTC()
	return l, err
}

// mountedName is what a part of a build context is called in its layer.
const mountedName = "mounted"

// bound names a part of a build context: what Copy takes of it.
type bound struct{ context, source, dest string }

// contextLayer makes a layer of a part of a build context, once for all who want
// the same: the sandbox, and whoever builds on it, know no other files than layers'.
func (s *Solver) contextLayer(ctx context.Context, res Result, part fileop.CopyAction) (image.Layer, error) {
	key := bound{res.local.key(), part.Src, part.Dest}
	s.mu.Lock()
	l, ok := s.bound[key]
	s.mu.Unlock()
	if ok {
		return l, nil
	}
	c := fileop.New(nil, fileop.Options{})
	defer c.Close()
	if err := c.Copy(ctx, res.context, part); err != nil {
		return image.Layer{}, err
	}
	l, err := image.Commit(ctx, s.Store, image.CommitOptions{}, func(w io.Writer) error { return c.WriteTar(ctx, w) })
	if err != nil {
		return image.Layer{}, err
	}
	l.Created = time.Now().UTC()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bound[key] = l
	return l, nil
}

// inLayers is a result with a build context as a layer.
func (s *Solver) inLayers(ctx context.Context, res Result) (Result, error) {
	ls, err := s.Layers(ctx, res)
	return Result{Layers: ls}, err
}
