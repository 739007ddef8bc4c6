// Package gc tells what takes room in a store, in BuildKit's words, and removes it.
package gc

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/filters"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/cachemount"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/store"
)

// The types of items, with BuildKit's names.
const (
	Regular    = "regular"         // a layer, of a base image or that a build made, with its blobs
	CacheMount = "exec.cachemount" // what RUN --mount=type=cache shows
	Internal   = "internal"        // manifests, configs
)

// Item is something that takes room in a store and can be removed by itself.
type Item struct {
	ID          string
	Type        string
	Description string
	Parents     []string // IDs of the layers that it was made on
	Created     time.Time
	Used        time.Time
	Size        int64 // bytes on disk
	InUse       bool  // by a running build, so that it is not removed
	Shared      bool  // an image with a name has it, so that it stays while the image does
	Mutable     bool  // a cache mount, which the next step may change

	digests []string // of the layers and blobs that go with it
	mount   *cachemount.Info
}

// id is how an item is called: the beginning of a digest.
func id(digest string) string {
	_, hex, _ := strings.Cut(digest, ":")
	return hex[:min(len(hex), 25)]
}

// List lists what takes room in a store and fits a filter, the largest first. Filters are
// of containerd's language, as BuildKit has them: conditions on id, parents, description,
// inuse, mutable, immutable, type, shared and private. An item is to fit any of them; no
// filter fits all. It does not count as a use.
func List(ctx context.Context, st *store.Store, filter ...string) ([]Item, error) {
	all, err := items(ctx, st)
	if err != nil {
		return nil, err
	}
	f, err := parse(filter)
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(i Item) bool { return !f.Match(&i) })
	slices.SortFunc(all, func(a, b Item) int { return cmp.Or(cmp.Compare(b.Size, a.Size), cmp.Compare(a.ID, b.ID)) })
	return all, nil
}

func parse(filter []string) (filters.Filter, error) {
	f, err := filters.ParseAll(filter...)
	if err != nil {
		return nil, diag.New(diag.ExitUsage, "filter %q: %w", filter, err)
	}
	return f, nil
}

// Field implements filters.Adaptor.
func (i *Item) Field(path []string) (string, bool) {
	if len(path) != 1 {
		return "", false
	}
	switch path[0] {
	case "id":
		return i.ID, true
	case "parents":
		return strings.Join(i.Parents, ";"), true
	case "description":
		return i.Description, true
	case "type":
		return i.Type, true
	}
	is, ok := map[string]bool{
		"inuse": i.InUse, "mutable": i.Mutable, "immutable": !i.Mutable, "shared": i.Shared, "private": !i.Shared,
	}[path[0]]
	return "", ok && is
}

func items(ctx context.Context, st *store.Store) ([]Item, error) {
	contents, err := st.Contents()
	if err != nil {
		return nil, err
	}
	mounts, err := cachemount.New(st).List(ctx)
	if err != nil {
		return nil, err
	}
	known, err := history(st)
	if err != nil {
		return nil, err
	}
	byDigest := map[string]*store.Content{}
	for i := range contents {
		byDigest[contents[i].Digest] = &contents[i]
	}
	var all []Item
	for i := range mounts {
		all = append(all, mountItem(&mounts[i], byDigest, known))
	}
	for _, c := range byDigest {
		all = append(all, contentItem(c, known))
	}
	return all, nil
}

// mountItem is a cache mount with the layers that are its own, which it takes from contents.
func mountItem(m *cachemount.Info, contents map[string]*store.Content, known map[string]*past) Item {
	key, err := json.Marshal(m.Key)
	if err != nil {
		key = []byte(m.ID) // never: a string and numbers
	}
	sum := sha256.Sum256(key)
	it := Item{
		ID: hex.EncodeToString(sum[:])[:25], Type: CacheMount, Description: fmt.Sprintf("cache mount %q", m.ID), Mutable: true,
		Created: m.Used, Used: m.Used, mount: m,
	}
	for _, l := range m.Layers {
		d := string(l.DiffID)
		c := contents[d]
		if c == nil || known[d] != nil || c.Tagged {
			continue // of what it began with, or gone
		}
		it.Size += c.Size
		it.InUse = it.InUse || c.InUse
		it.digests = append(it.digests, d)
		delete(contents, d)
	}
	return it
}

func contentItem(c *store.Content, known map[string]*past) Item {
	it := Item{ID: id(c.Digest), Type: Regular, Created: c.Used, Used: c.Used, Size: c.Size, InUse: c.InUse, Shared: c.Tagged, digests: []string{c.Digest}}
	if c.Document {
		it.Type = Internal
	}
	if p := known[c.Digest]; p != nil {
		it.Parents = slices.Sorted(maps.Keys(p.parents))
		if !p.created.IsZero() {
			it.Created = p.created
		}
		if p.origin != "" {
			it.Description = "from " + p.origin
		}
	}
	return it
}

// past is what the cache's records know of a layer.
type past struct {
	parents map[string]bool
	created time.Time
	origin  string
}

// history reads the cache's records.
func history(st *store.Store) (map[string]*past, error) {
	known := map[string]*past{}
	err := st.EachRecord(func(r store.Record) error {
		rec, ok := cache.Parse(r.Kind, r.Body)
		if !ok {
			return nil
		}
		for i, l := range rec.Layers {
			p := known[string(l.DiffID)]
			if p == nil {
				p = &past{parents: map[string]bool{}}
				known[string(l.DiffID)] = p
			}
			if i > 0 {
				p.parents[id(string(rec.Layers[i-1].DiffID))] = true
			}
			if l.Built() {
				p.created = l.Created
			} else if l.Origin != "" {
				p.origin = l.Origin
			}
		}
		return nil
	})
	return known, err
}

// LimitOf is what BuildKit's clients let a store be, in bytes. A space that is reserved and nothing else is all that
// is left.
func LimitOf(maxUsed, reserved, minFree int64) (store.Limit, error) {
	if min(maxUsed, reserved, minFree) < 0 {
		return store.Limit{}, diag.New(diag.ExitUsage, "what is kept cannot be negative")
	}
	l := store.Limit{MaxUsed: maxUsed, MinFree: minFree, Reserved: reserved}
	if maxUsed == 0 && minFree == 0 {
		l.MaxUsed = reserved
	}
	return l, nil
}

// Options say what Prune removes.
type Options struct {
	Filter []string // as List's: only what fits
	store.Limit
	KeepFor time.Duration // what was used within this time stays
	DryRun  bool
}

// Report is what Prune removed, or would.
type Report struct {
	Items []Item
	Bytes int64 // of all that was removed, also of what is no item
	InUse int64 // what only running builds keep
}

// Prune removes what neither an image with a name nor a running build needs, as far as
// the options say, what was used longest ago first. Builds may run meanwhile.
func Prune(ctx context.Context, st *store.Store, opt Options) (Report, error) {
	before, err := items(ctx, st)
	if err != nil {
		return Report{}, err
	}
	po := store.PruneOptions{KeepFor: opt.KeepFor, Limit: opt.Limit, DryRun: opt.DryRun}
	if len(opt.Filter) > 0 {
		f, err := parse(opt.Filter)
		if err != nil {
			return Report{}, err
		}
		po.Only, po.Keep = only(before, f)
	}
	rep, err := st.Prune(ctx, po)
	if err != nil {
		return Report{}, err
	}
	out := Report{Bytes: rep.Bytes, InUse: rep.InUse}
	for _, i := range before {
		if len(i.digests) > 0 && !slices.ContainsFunc(i.digests, func(d string) bool { return !rep.Gone[d] }) {
			out.Items = append(out.Items, i)
		}
	}
	slices.SortFunc(out.Items, func(a, b Item) int { return cmp.Or(cmp.Compare(b.Size, a.Size), cmp.Compare(a.ID, b.ID)) })
	return out, nil
}

// only says which records keep nothing but items that fit: those whose result has such a
// layer on top. What lies below is another item, which has records of its own; it and all
// else that does not fit is to be kept.
func only(all []Item, f filters.Filter) (fits func(store.Record) bool, keep []string) {
	mounts, digests := map[string]bool{}, map[string]bool{}
	for i := range all {
		it := &all[i]
		switch fit := f.Match(it); {
		case fit && it.mount != nil:
			mounts[it.mount.RecordKey()] = true
		case fit:
			digests[it.digests[0]] = true
		case it.mount == nil:
			keep = append(keep, it.digests...)
		}
	}
	return func(r store.Record) bool {
		if r.Kind == cachemount.RecordKind {
			return mounts[r.Key]
		}
		if rec, ok := cache.Parse(r.Kind, r.Body); ok {
			n := len(rec.Layers)
			return n > 0 && digests[string(rec.Layers[n-1].DiffID)]
		}
		return len(r.Mentions) > 0 && !slices.ContainsFunc(r.Mentions, func(d string) bool { return !digests[d] })
	}, keep
}
