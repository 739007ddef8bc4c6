package compare

import (
	"archive/tar"
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// node is one inode of an image's merged file system. Hard links share it.
type node struct {
	typ      string // "dir", "file", "symlink", "char", "block", "fifo"
	mode     int64  // permission bits with setuid, setgid and sticky
	uid, gid int
	size     int64
	target   string // of a symlink
	major    int64
	minor    int64
	xattrs   map[string]string
	digest   string // of a file's content
	mtime    time.Time
	implicit bool // a parent that no layer has an entry for
}

// tree maps every absolute path to its inode.
type tree map[string]*node

// layerEntries is what one layer says, before it is applied.
type layerEntries struct {
	order    []string
	nodes    map[string]*node
	links    map[string]string // hard links whose target is in a lower layer
	removed  []string          // whiteouts
	opaque   []string
	problems []string
	gone     []string // paths of the tree below that the layer makes vanish, by whatever means
}

const paxXattr = "SCHILY.xattr."

// readLayer reads one layer's tar. Its problems are what an extractor may stumble over.
func readLayer(l v1.Layer) (*layerEntries, error) {
	rc, err := l.Uncompressed()
	if err != nil {
		return nil, fmt.Errorf("open layer: %w", err)
	}
	defer rc.Close()
	e := &layerEntries{nodes: map[string]*node{}, links: map[string]string{}}
	for r := tar.NewReader(rc); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("read layer: %w", err)
		}
		if err := e.add(h, r); err != nil {
			return nil, err
		}
	}
	// The whole stream is read, so that its digest is verified.
	if _, err := io.Copy(io.Discard, rc); err != nil {
		return nil, fmt.Errorf("read layer: %w", err)
	}
	return e, nil
}

func (e *layerEntries) problem(format string, a ...any) {
	e.problems = append(e.problems, fmt.Sprintf(format, a...))
}

func (e *layerEntries) add(h *tar.Header, r io.Reader) error {
	p := path.Clean("/" + h.Name)
	if strings.HasPrefix(h.Name, "/") || slices.Contains(strings.Split(h.Name, "/"), "..") {
		e.problem("name %q is absolute or has ..", h.Name)
	}
	switch base := path.Base(p); {
	case base == ".wh..wh..opq":
		e.opaque = append(e.opaque, path.Dir(p))
		return nil
	case strings.HasPrefix(base, ".wh."):
		e.removed = append(e.removed, path.Join(path.Dir(p), strings.TrimPrefix(base, ".wh.")))
		return nil
	}
	if _, ok := e.nodes[p]; ok {
		e.problem("%s is there twice", p)
	}
	if h.Typeflag == tar.TypeLink {
		target := path.Clean("/" + h.Linkname)
		if strings.HasPrefix(h.Linkname, "/") {
			e.problem("hard link %s has the absolute target %q", p, h.Linkname)
		}
		if n, ok := e.nodes[target]; ok {
			e.nodes[p] = n
		} else {
			e.links[p] = target
		}
		e.order = append(e.order, p)
		return nil
	}
	n, err := newNode(h, r)
	if err != nil {
		return fmt.Errorf("read %s: %w", p, err)
	}
	e.nodes[p] = n
	e.order = append(e.order, p)
	return nil
}

func newNode(h *tar.Header, r io.Reader) (*node, error) {
	n := &node{mode: h.Mode & 0o7777, uid: h.Uid, gid: h.Gid, mtime: h.ModTime, xattrs: map[string]string{}}
	for k, v := range h.PAXRecords {
		if x, ok := strings.CutPrefix(k, paxXattr); ok {
			n.xattrs[x] = v
		}
	}
	switch h.Typeflag {
	case tar.TypeReg:
		n.typ, n.size = "file", h.Size
		d := sha256.New()
		if _, err := io.Copy(d, r); err != nil {
			return nil, err
		}
		n.digest = fmt.Sprintf("%x", d.Sum(nil))
	case tar.TypeDir:
		n.typ = "dir"
	case tar.TypeSymlink:
		n.typ, n.target, n.mode = "symlink", h.Linkname, 0o777
	case tar.TypeChar:
		n.typ, n.major, n.minor = "char", h.Devmajor, h.Devminor
	case tar.TypeBlock:
		n.typ, n.major, n.minor = "block", h.Devmajor, h.Devminor
	case tar.TypeFifo:
		n.typ = "fifo"
	default:
		return nil, fmt.Errorf("type %q is not known", h.Typeflag)
	}
	return n, nil
}

// apply puts a layer on top of the tree and returns what is odd about it.
func (t tree) apply(e *layerEntries) []string {
	problems := e.problems
	for _, d := range e.opaque {
		t.removeBelow(d)
	}
	for _, p := range e.removed {
		if _, ok := t[p]; !ok {
			problems = append(problems, fmt.Sprintf("whiteout of %s, which is not there", p))
		}
		if _, ok := e.nodes[p]; ok {
			problems = append(problems, fmt.Sprintf("%s has a whiteout and an entry in one layer", p))
		}
		t.removeBelow(p)
		delete(t, p)
	}
	for _, p := range e.order {
		n, ok := e.nodes[p]
		if !ok {
			if n, ok = e.lookup(t, e.links[p]); !ok {
				problems = append(problems, fmt.Sprintf("hard link %s to %s, which is not there", p, e.links[p]))
				continue
			}
		}
		t.set(p, n)
	}
	return problems
}

func (e *layerEntries) lookup(t tree, p string) (*node, bool) {
	if n, ok := e.nodes[p]; ok {
		return n, true
	}
	n, ok := t[p]
	return n, ok
}

func (t tree) set(p string, n *node) {
	for d := path.Dir(p); d != "/" && d != p; d = path.Dir(d) {
		if o, ok := t[d]; ok {
			if o.typ != "dir" {
				t[d] = &node{typ: "dir", mode: 0o755, implicit: true}
			}
			continue
		}
		t[d] = &node{typ: "dir", mode: 0o755, implicit: true}
	}
	if o, ok := t[p]; ok && o.typ == "dir" && n.typ != "dir" {
		t.removeBelow(p)
	}
	t[p] = n
}

func (t tree) removeBelow(dir string) {
	prefix := strings.TrimSuffix(dir, "/") + "/"
	for p := range t {
		if strings.HasPrefix(p, prefix) && p != "/" {
			delete(t, p)
		}
	}
}

// flatten is the file system of an image, and each layer's odd things.
func flatten(img v1.Image) (tree, []*layerEntries, []string, error) {
	layers, err := img.Layers()
	if err != nil {
		return nil, nil, nil, fmt.Errorf("list layers: %w", err)
	}
	t := tree{}
	var all []*layerEntries
	var problems []string
	for i, l := range layers {
		e, err := readLayer(l)
		if err != nil {
			return nil, nil, nil, fmt.Errorf("layer %d: %w", i, err)
		}
		before := slices.Collect(maps.Keys(t))
		odd := t.apply(e)
		for _, p := range before {
			if _, ok := t[p]; !ok {
				e.gone = append(e.gone, p)
			}
		}
		for _, p := range odd {
			problems = append(problems, fmt.Sprintf("layer %d: %s", i, p))
		}
		all = append(all, e)
	}
	return t, all, problems, nil
}

// groups lists the hard-link groups: sets of two or more paths with one inode.
func (t tree) groups() map[string]string {
	by := map[*node][]string{}
	for p, n := range t {
		if n.typ != "dir" {
			by[n] = append(by[n], p)
		}
	}
	g := map[string]string{}
	for _, paths := range by {
		slices.Sort(paths)
		if len(paths) > 1 {
			for _, p := range paths {
				g[p] = strings.Join(paths, " ")
			}
		}
	}
	return g
}
