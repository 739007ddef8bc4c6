// Package compare says how two images differ in meaning: in the file system
// that their layers make when put on top of each other, and in their config.
// Compression, media types, creation times and the cut into blobs do not count,
// nor do modification times unless asked for. It knows nothing of Kiln: layers
// are read with archive/tar and merged by the image specification's rules.
package compare

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Options says what not to compare and what to compare besides.
type Options struct {
	// Ignore holds patterns of paths that are not compared, as path.Match has
	// them; one that ends in /** is for everything below a directory.
	Ignore []string
	// Mtime holds patterns of paths whose modification times are compared, to the nanosecond.
	Mtime []string
	// Layers compares what each layer holds besides directories, so that a
	// step that recorded too much is found although the merged result is right.
	Layers bool
	// Meaning leaves out what each builder chooses for itself: the number of
	// layers, the history, and in the config how the same is said.
	Meaning bool
}

// Diff is one difference.
type Diff struct {
	// Where is a path with an attribute, "/etc/passwd: mode", or "config: Env".
	Where string
	A, B  string
}

// Report is all differences between images A and B.
type Report struct {
	Diffs []Diff
	// LayersA and LayersB are the numbers of layers.
	LayersA, LayersB int
	// ProblemsA and ProblemsB name what an extractor may stumble over in the
	// layers: whiteouts of nothing, entries that are there twice, absolute names.
	ProblemsA, ProblemsB []string
}

// Equal says that no difference was found.
func (r *Report) Equal() bool { return len(r.Diffs) == 0 }

// String is a line a difference, "WHERE: A != B".
func (r *Report) String() string {
	var b strings.Builder
	for _, d := range r.Diffs {
		fmt.Fprintf(&b, "%s: %s != %s\n", d.Where, d.A, d.B)
	}
	return b.String()
}

func (r *Report) add(where, a, b string) {
	if a != b {
		r.Diffs = append(r.Diffs, Diff{where, a, b})
	}
}

// Images compares two images. An error means that one could not be read.
func Images(a, b v1.Image, o Options) (*Report, error) {
	ta, la, pa, err := flatten(a)
	if err != nil {
		return nil, fmt.Errorf("read first image: %w", err)
	}
	tb, lb, pb, err := flatten(b)
	if err != nil {
		return nil, fmt.Errorf("read second image: %w", err)
	}
	r := &Report{LayersA: len(la), LayersB: len(lb), ProblemsA: pa, ProblemsB: pb}
	r.trees(ta, tb, o)
	if o.Layers {
		r.layers(la, lb, o)
	}
	ca, err := a.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("read first image's config: %w", err)
	}
	cb, err := b.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("read second image's config: %w", err)
	}
	r.configs(ca, cb, o.Meaning)
	if !o.Meaning {
		r.history(ca, cb)
		r.add("layers", fmt.Sprint(len(la)), fmt.Sprint(len(lb)))
	}
	return r, nil
}

func matches(patterns []string, p string) bool {
	return slices.ContainsFunc(patterns, func(pat string) bool {
		if dir, ok := strings.CutSuffix(pat, "/**"); ok {
			return strings.HasPrefix(p, dir+"/")
		}
		ok, err := path.Match(pat, p)
		return ok && err == nil
	})
}

func (r *Report) trees(a, b tree, o Options) {
	ga, gb := a.groups(), b.groups()
	for _, p := range paths(a, b) {
		if matches(o.Ignore, p) {
			continue
		}
		na, nb := a[p], b[p]
		switch {
		case na == nil:
			r.add(p, "not there", nb.typ)
			continue
		case nb == nil:
			r.add(p, na.typ, "not there")
			continue
		case na.typ != nb.typ:
			r.add(p+": type", na.typ, nb.typ)
			continue
		}
		r.nodes(p, na, nb)
		r.add(p+": hard links", or(ga[p], "none"), or(gb[p], "none"))
		if matches(o.Mtime, p) {
			const layout = "2006-01-02T15:04:05.999999999Z"
			r.add(p+": mtime", na.mtime.UTC().Format(layout), nb.mtime.UTC().Format(layout))
		}
	}
}

func (r *Report) nodes(p string, a, b *node) {
	r.add(p+": mode", fmt.Sprintf("%04o", a.mode), fmt.Sprintf("%04o", b.mode))
	r.add(p+": uid", fmt.Sprint(a.uid), fmt.Sprint(b.uid))
	r.add(p+": gid", fmt.Sprint(a.gid), fmt.Sprint(b.gid))
	r.add(p+": size", fmt.Sprint(a.size), fmt.Sprint(b.size))
	r.add(p+": link target", fmt.Sprintf("%q", a.target), fmt.Sprintf("%q", b.target))
	r.add(p+": device", fmt.Sprintf("%d:%d", a.major, a.minor), fmt.Sprintf("%d:%d", b.major, b.minor))
	r.add(p+": content", a.digest, b.digest)
	for _, k := range paths(a.xattrs, b.xattrs) {
		r.add(p+": xattr "+k, quoted(a.xattrs, k), quoted(b.xattrs, k))
	}
}

func quoted(m map[string]string, k string) string {
	if v, ok := m[k]; ok {
		return fmt.Sprintf("%q", v)
	}
	return "none"
}

func or(s, def string) string {
	if s == "" {
		return def
	}
	return s
}

// paths is the sorted union of two maps' keys.
func paths[V any, M ~map[string]V](a, b M) []string {
	k := slices.Concat(slices.Collect(maps.Keys(a)), slices.Collect(maps.Keys(b)))
	slices.Sort(k)
	return slices.Compact(k)
}

func (r *Report) layers(a, b []*layerEntries, o Options) {
	for i := range min(len(a), len(b)) {
		sa, sb := a[i].contents(), b[i].contents()
		for _, p := range paths(sa, sb) {
			if !matches(o.Ignore, strings.TrimPrefix(p, "removed ")) {
				r.add(fmt.Sprintf("layer %d: %s", i, p), or(sa[p], "not there"), or(sb[p], "not there"))
			}
		}
	}
}

// contents names what a layer adds and removes, but for directories: whether a
// layer repeats the parents of what it changes is nobody's business, nor whether
// it removes by a whiteout for each name or by one for all.
func (e *layerEntries) contents() map[string]string {
	m := map[string]string{}
	for _, p := range e.order {
		if n, ok := e.nodes[p]; !ok || n.typ != "dir" {
			m[p] = "there"
		}
	}
	for _, p := range e.gone {
		m["removed "+p] = "there"
	}
	return m
}
