// Package rootfs sees the layers of an image as the one tree that a process in
// it would see, without a mount and without unpacking: lookup, symbolic links
// resolved inside the image, users and groups by name.
//
// Layers are merged as Linux's overlayfs merges them: an upper file hides what
// is below it, a directory merges with directories below unless it is opaque,
// a whiteout hides, and a directory's metadata is that of the topmost layer
// which has an entry for it (see layer.XattrImplied). Everything is lazy, and memory is bounded by a small cache.
package rootfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/tree"
	"github.com/opencontainers/go-digest"
)

// stacksCached is how many directories' stacks of layers are remembered: some
// 100 bytes each.
const stacksCached = 8192

// FS is raw layers merged. It implements tree.Tree.
type FS struct {
	layers []tree.Tree // the top first
	// stacks remembers for a directory which layers, from the top, make it up.
	// nil if the cache could not be made, which costs time only.
	stacks *lru.Cache[string, []int32]
	all    []int32
}

// New returns the merge of layers, given the bottom first. A layer is a raw
// one: whiteouts are character devices 0:0, opaque directories are marked by
// tree.XattrOpaque. Without layers it is an empty root directory, 0755 and
// owned by root.
func New(layers ...tree.Tree) *FS {
	f := &FS{layers: slices.Clone(layers)}
	slices.Reverse(f.layers)
	f.stacks, _ = lru.New[string, []int32](stacksCached)
	f.all = f.rootStack()
	return f
}

// rootStack leaves out the layers below a root that is opaque.
func (f *FS) rootStack() []int32 {
	var s []int32
	for i, l := range f.layers {
		s = append(s, int32(i))
		if n, err := l.Lstat("."); err == nil && n.IsOpaque() {
			break
		}
	}
	return s
}

// found is where a path was found: in which layer, and, for a directory, in
// which others too.
type found struct {
	node  tree.Node
	layer int32
	stack []int32
}

// find looks p up, from its nearest ancestor that is in the cache.
func (f *FS) find(op, p string) (found, error) {
	if tree.Clean(p) != p {
		return found{}, &fs.PathError{Op: op, Path: p, Err: fs.ErrInvalid}
	}
	if p == "." {
		return f.root()
	}
	done, stack := f.nearest(path.Dir(p))
	at := 0 // p[:at] is done, with its slash
	if done != "." {
		at = len(done) + 1
	}
	for {
		name, _, more := strings.Cut(p[at:], "/")
		next := p[:at+len(name)]
		e, err := f.step(stack, next)
		if err != nil {
			return found{}, pathError(op, p, err)
		}
		if !more {
			return e, nil
		}
		if !e.node.IsDir() {
			return found{}, pathError(op, p, fs.ErrNotExist)
		}
		at, stack = len(next)+1, e.stack
		f.remember(next, stack)
	}
}

func (f *FS) root() (found, error) {
	if len(f.layers) == 0 {
		return found{node: tree.Node{Mode: tree.ModeDir | 0o755, MTime: time.Unix(0, 0)}, layer: -1}, nil
	}
	n, err := f.layers[0].Lstat(".")
	if err != nil {
		return found{}, err
	}
	return found{node: f.shown(n, 0), layer: 0, stack: f.all}, nil
}

func (f *FS) nearest(dir string) (string, []int32) {
	for d := dir; d != "." && f.stacks != nil; d = path.Dir(d) {
		if s, ok := f.stacks.Get(d); ok {
			return d, s
		}
	}
	return ".", f.all
}

func (f *FS) remember(dir string, stack []int32) {
	if f.stacks != nil {
		f.stacks.Add(dir, stack)
	}
}

// implied reports whether n, found in a raw layer, is a directory that the layer
// has only because of what is in it.
func implied(n tree.Node) bool { return n.IsDir() && n.Xattr[layer.XattrImplied] == "y" }

// step looks p up in the layers of its parent directory.
func (f *FS) step(parent []int32, p string) (found, error) {
	var e found
	have := false
	open := false   // all that was found is implied: a lower layer may know what p is like
	hidden := false // an opaque directory was found
	for _, i := range parent {
		n, err := f.layers[i].Lstat(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return found{}, err
		}
		if n.IsWhiteout() || have && !n.IsDir() {
			break
		}
		if !have || open && !implied(n) {
			e.node, e.layer, open = f.shown(n, i), i, implied(n)
		}
		have = true
		if !n.IsDir() {
			break
		}
		if !hidden {
			e.stack = append(e.stack, i)
			hidden = n.IsOpaque()
		}
		if hidden && !open {
			break
		}
	}
	if !have {
		return found{}, fs.ErrNotExist
	}
	return e, nil
}

// shown is a layer's node as the merged tree shows it: without overlayfs's own
// attributes, and with an inode number that no other layer's file has.
func (f *FS) shown(n tree.Node, layer int32) tree.Node {
	n.Inode = inode(n.Inode, layer)
	for k := range n.Xattr {
		if !strings.HasPrefix(k, "trusted.overlay.") {
			continue
		}
		kept := make(map[string]string, len(n.Xattr))
		for k, v := range n.Xattr {
			if !strings.HasPrefix(k, "trusted.overlay.") {
				kept[k] = v
			}
		}
		n.Xattr = kept
		break
	}
	return n
}

const inodeBits = 47

// inode makes a number unique across layers. Layer files count their inodes
// from 1, so that the number fits; one of another kind of tree that does not is
// mixed. The top bit stays free for what is laid on top of an FS.
func inode(ino uint64, layer int32) uint64 {
	if ino == 0 {
		return 0
	}
	if ino < 1<<inodeBits && layer < 1<<15 {
		return uint64(layer+1)<<inodeBits | ino
	}
	x := ino ^ uint64(layer+1)*0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return (x^x>>31)&(1<<63-1) | 1<<62
}

// Lstat implements tree.Tree. It lists no directory. Names need not be UTF-8, here as
// everywhere in this package: files of images are bytes.
func (f *FS) Lstat(p string) (tree.Node, error) {
	e, err := f.find("lstat", p)
	return e.node, err
}

// ReadDir implements tree.Tree.
func (f *FS) ReadDir(p string) ([]tree.Entry, error) {
	e, err := f.find("readdir", p)
	if err != nil {
		return nil, err
	}
	if !e.node.IsDir() {
		return nil, pathError("readdir", p, syscall.ENOTDIR)
	}
	if p != "." {
		f.remember(p, e.stack)
	}
	if len(e.stack) == 0 {
		return nil, nil
	}
	var out []tree.Entry
	seen := map[string]bool{}
	for k, i := range e.stack {
		es, err := f.layers[i].ReadDir(p)
		if err != nil {
			return nil, fmt.Errorf("read directory %q of a layer: %w", p, err)
		}
		for _, c := range es {
			// The last layer's names need not be remembered.
			if seen[c.Name] {
				continue
			}
			if k < len(e.stack)-1 {
				seen[c.Name] = true
			}
			if c.Node.IsWhiteout() {
				continue
			}
			n := f.shown(c.Node, i)
			if implied(c.Node) {
				d, err := f.step(e.stack, path.Join(p, c.Name))
				if err != nil {
					return nil, err
				}
				n = d.node
			}
			out = append(out, tree.Entry{Name: c.Name, Node: n})
		}
	}
	slices.SortFunc(out, func(a, b tree.Entry) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// Readlink implements tree.Tree.
func (f *FS) Readlink(p string) (string, error) {
	e, err := f.find("readlink", p)
	if err != nil {
		return "", err
	}
	if !e.node.IsSymlink() {
		return "", pathError("readlink", p, syscall.EINVAL)
	}
	return f.layers[e.layer].Readlink(p)
}

// Open implements tree.Tree.
func (f *FS) Open(p string) (io.ReadCloser, error) {
	e, err := f.find("open", p)
	if err != nil {
		return nil, err
	}
	if !e.node.IsRegular() {
		return nil, pathError("open", p, syscall.EINVAL)
	}
	return f.layers[e.layer].Open(p)
}

// Origin implements tree.Tracer as far as the layers do.
func (f *FS) Origin(p string) (tree.Origin, error) {
	e, err := f.find("lstat", p)
	if err != nil || e.layer < 0 {
		return tree.Origin{}, err
	}
	return tree.OriginOf(f.layers[e.layer], p)
}

// ContentDigest implements tree.Digester as far as the layers do.
func (f *FS) ContentDigest(p string) (digest.Digest, error) {
	e, err := f.find("digest", p)
	if err != nil {
		return "", err
	}
	if e.layer < 0 {
		return "", errors.ErrUnsupported
	}
	return tree.ContentDigest(f.layers[e.layer], p)
}

// pathError words an error about a path as the operating system would.
func pathError(op, p string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		err = syscall.ENOENT
	}
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return err
	}
	return &fs.PathError{Op: op, Path: "/" + strings.TrimPrefix(p, "."), Err: err}
}
