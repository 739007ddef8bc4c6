package engine

import (
	"context"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/fileop"
	"github.com/kiln-build/kiln/internal/image"
)

// Versions of what the operations do: raised when the same fields and inputs
// would give another result than before.
const (
	execVersion  = 2
	fileVersion  = 2
	mergeVersion = 1
	diffVersion  = 1

	remoteVersion = 2
)

// keyOf is the key of an operation by its definition: its fields and the keys
// of its inputs. Images count by their layers, contexts by the content of the
// paths that are used. Nothing is computed but images' metadata.
func (r *run) keyOf(ctx context.Context, op *Op) (digest.Digest, error) {
	if op == nil {
		return digestOf(nil), nil
	}
	s := r.states[op]
	s.keyOnce.Do(func() {
		if s.key, s.keyErr = r.defineKey(ctx, op); s.keyErr != nil {
			// Here, not where the key is wanted: a missing file is the fault of the COPY that names it.
			s.keyErr = r.failed(ctx, s, s.keyErr)
		}
		r.used(s)
	})
	return s.key, s.keyErr
}

// inputKey is the key of an input by its definition.
func (r *run) inputKey(ctx context.Context, in Input) (digest.Digest, error) {
	k, err := r.keyOf(ctx, in.Op)
	if err != nil {
		return "", err
	}
	return resultKey(k, in.Index), nil
}

// resultKey is the key of a result of the operation with a key: the first has the
// operation's own.
func resultKey(key digest.Digest, index int) digest.Digest {
	if index == 0 {
		return key
	}
	h := cache.NewHasher("result", 1)
	h.String(key.String())
	h.Int(int64(index))
	return h.Key()
}

func (r *run) defineKey(ctx context.Context, op *Op) (digest.Digest, error) {
	switch op.Do.(type) {
	case *Image, *Layout:
		ls, err := r.resolve(ctx, op)
		if err != nil {
			return "", err
		}
		return digestOf(ls), nil
	case *Local:
		t, err := r.local(ctx, r.states[op])
		if err != nil {
			return "", err
		}
		return fileop.Digest(ctx, t, everything())
	case *Remote:
		return r.remoteKey(ctx, r.states[op])
	}
	return r.hash(ctx, op, "definition", func(n int) (digest.Digest, error) {
		return r.inputKey(ctx, op.Inputs[n])
	}, nil)
}

// contentKey is the key of an operation by the content of its computed inputs.
func (r *run) contentKey(ctx context.Context, op *Op, ins []Result) (digest.Digest, error) {
	if _, ok := op.Do.(*Remote); ok {
		return r.remoteKey(ctx, r.states[op]) // has no inputs
	}
	return r.hash(ctx, op, "content", func(n int) (digest.Digest, error) {
		ls, err := r.Layers(ctx, ins[n])
		return digestOf(ls), err
	}, ins)
}

// hash makes a key. input gives the key of a whole input; ins are the inputs
// if they have been computed.
func (r *run) hash(ctx context.Context, op *Op, kind string, input func(int) (digest.Digest, error), ins []Result) (digest.Digest, error) {
	var h *cache.Hasher
	var byContent []bool // inputs that count by the paths copied from them
	switch do := op.Do.(type) {
	case *Exec:
		h = cache.NewHasher("exec", execVersion)
		hashExec(h, do)
		byContent = r.execByContent(op, do, ins != nil)
		if err := r.hashMounted(ctx, h, op, do, byContent, ins); err != nil {
			return "", err
		}
	case *File:
		h = cache.NewHasher("file", fileVersion)
		byContent = r.byContent(op, do, ins != nil)
		h.Int(int64(len(do.Actions)))
		h.Int(int64(do.Result))
		for i := range do.Actions {
			a := &do.Actions[i]
			a.hash(h)
			if a.Copy == nil || a.Source.Kind != RefInput || !byContent[a.Source.N] {
				continue
			}
			d, err := r.copied(ctx, op, i, a.Source.N, *a.Copy, ins)
			if err != nil {
				return "", err
			}
			h.String(d.String())
		}
	case *Merge:
		h = cache.NewHasher("merge", mergeVersion)
	case *Diff:
		h = cache.NewHasher("diff", diffVersion)
	default:
		return "", fmt.Errorf("operation %T has no key", do)
	}
	h.String(kind)
	for n, in := range op.Inputs {
		switch {
		case in.Op == nil:
			h.String("")
		case byContent != nil && byContent[n]:
			h.String("by content")
		default:
			k, err := input(n)
			if err != nil {
				return "", err
			}
			h.String(k.String())
		}
	}
	return h.Key(), nil
}

// byContent says which inputs count by the content of the paths that are
// copied from them, rather than as a whole. Before anything has run only a
// context can be looked into.
func (r *run) byContent(op *Op, f *File, computed bool) []bool {
	out := make([]bool, len(op.Inputs))
	for n := range out {
		in := Ref{RefInput, n}
		for _, a := range f.Actions {
			if a.Source == in {
				out[n] = true
			}
		}
		for _, a := range f.Actions {
			if a.Base == in || a.UserIn == in || a.GroupIn == in {
				out[n] = false
			}
		}
		if op.Inputs[n].Op == nil {
			out[n] = false
		} else if !isLocal(op.Inputs[n].Op) && !computed {
			out[n] = false
		}
	}
	return out
}

// copied is the content digest of what action or mount i of op takes from an
// input. That of a context is computed once.
func (r *run) copied(ctx context.Context, op *Op, i, input int, a fileop.CopyAction, ins []Result) (digest.Digest, error) {
	from := op.Inputs[input].Op
	if !isLocal(from) {
		t, err := r.Tree(ctx, ins[input])
		if err != nil {
			return "", err
		}
		return fileop.Digest(ctx, t, a)
	}
	s := r.states[op]
	if d, ok := s.copied[i]; ok {
		return d, nil
	}
	t, err := r.local(ctx, r.states[from])
	if err != nil {
		return "", err
	}
	d, err := fileop.Digest(ctx, t, a)
	if err != nil {
		return "", err
	}
	if s.copied == nil {
		s.copied = map[int]digest.Digest{}
	}
	s.copied[i] = d
	return d, nil
}

func hashExec(h *cache.Hasher, x *Exec) {
	h.Strings(x.Args)
	h.Strings(x.Env)
	h.String(x.Cwd)
	h.String(x.User)
	h.String(x.Hostname)
	h.Int(int64(len(x.Hosts)))
	for _, e := range x.Hosts {
		h.String(e.Name)
		h.String(e.IP)
	}
	h.Bool(x.NoNetwork)
	h.Strings([]string{x.Platform.OS, x.Platform.Architecture, x.Platform.Variant})
	h.Bool(x.ReadOnlyRoot)
	h.Int(int64(len(x.SecretEnv)))
	for _, e := range x.SecretEnv {
		h.Strings([]string{e.Name, e.ID})
		h.Bool(e.Optional)
	}
	h.Int(int64(len(x.Mounts)))
	for i := range x.Mounts {
		x.Mounts[i].hash(h)
	}
	hashInts(h, x.Success)
	h.Int(int64(len(x.Ulimits)))
	for _, u := range x.Ulimits {
		h.Int(int64(u.Resource))
		h.Int(int64(u.Soft))
		h.Int(int64(u.Hard))
	}
	h.Int(int64(x.NumResults()))
	for i := range x.NumResults() {
		h.Int(int64(x.result(i)))
	}
}

func hashInts(h *cache.Hasher, ns []int) {
	h.Int(int64(len(ns)))
	for _, n := range ns {
		h.Int(int64(n))
	}
}

// hash adds an action's fields.
func (a *Action) hash(h *cache.Hasher) {
	for _, ref := range []Ref{a.Base, a.Source, a.UserIn, a.GroupIn} {
		h.Int(int64(ref.Kind))
		h.Int(int64(ref.N))
	}
	a.hashFields(h)
	hashOwner(h, a.owner())
}

func (a *Action) hashFields(h *cache.Hasher) {
	switch {
	case a.Copy != nil:
		c := a.Copy
		h.Strings([]string{"copy", c.Src, c.Dest, c.ModeStr})
		h.Bool(c.Mode != nil)
		if c.Mode != nil {
			h.Int(int64(*c.Mode))
		}
		for _, b := range []bool{
			c.FollowSymlink, c.DirCopyContents, c.AttemptUnpackDockerCompatibility, c.CreateDestPath, c.AllowWildcard,
			c.AllowEmptyWildcard, c.AlwaysReplaceExistingDestPaths,
		} {
			h.Bool(b)
		}
		for _, l := range [][]string{c.IncludePatterns, c.ExcludePatterns, c.RequiredPaths} {
			h.Strings(l)
		}
		hashTime(h, c.Timestamp)
	case a.Mkfile != nil:
		h.Strings([]string{"mkfile", a.Mkfile.Path})
		h.Int(int64(a.Mkfile.Mode))
		h.Bytes(a.Mkfile.Data)
		hashTime(h, a.Mkfile.Timestamp)
	case a.Mkdir != nil:
		h.Strings([]string{"mkdir", a.Mkdir.Path})
		h.Int(int64(a.Mkdir.Mode))
		h.Bool(a.Mkdir.MakeParents)
		hashTime(h, a.Mkdir.Timestamp)
	case a.Remove != nil:
		h.Strings([]string{"remove", a.Remove.Path})
		h.Bool(a.Remove.AllowNotFound)
		h.Bool(a.Remove.AllowWildcard)
	case a.Link != nil:
		h.Strings([]string{"symlink", a.Link.Oldpath, a.Link.Newpath})
		hashTime(h, a.Link.Timestamp)
	}
}

func hashTime(h *cache.Hasher, t *time.Time) {
	h.Bool(t != nil)
	if t != nil {
		h.Int(t.UnixNano())
	}
}

func hashOwner(h *cache.Hasher, o *fileop.Owner) {
	if o == nil {
		o = &fileop.Owner{}
	}
	for _, id := range []*fileop.ID{o.User, o.Group} {
		h.Bool(id != nil)
		if id != nil {
			h.String(id.Name)
			h.Int(int64(id.Num))
		}
	}
}

// digestOf is the identity of a root file system: the diff IDs of its layers.
func digestOf(ls []image.Layer) digest.Digest {
	h := cache.NewHasher("layers", 1)
	h.Int(int64(len(ls)))
	for _, l := range ls {
		h.String(l.DiffID.String())
	}
	return h.Key()
}
