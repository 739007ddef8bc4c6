// Package archive makes a tree of a tar archive that is somebody's build
// context: from standard input, from an http server.
//
// The archive is spooled into one layer file, and read from there. Its names
// stay within the tree, whatever they say. Owners, permissions and times are the
// archive's own, as BuildKit unpacks such contexts; names that begin with
// ".wh.", which image layers reserve, are plain names here.
package archive

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"strings"

	"github.com/kiln-build/kiln/internal/decompress"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/tree"
)

// Tree is an archive's content. It implements tree.Tree.
type Tree struct{ r *layer.Reader }

// Read reads an archive, compressed or not, to its end. dir is where its
// content is kept, in a file that needs no removal: it has no name any more.
func Read(ctx context.Context, r io.Reader, dir string, lim layer.Limits) (_ *Tree, err error) {
	z, err := decompress.New(r)
	if err != nil {
		return nil, err
	}
	defer z.Close()
	f, err := os.CreateTemp(dir, "context-*.layer")
	if err != nil {
		return nil, fmt.Errorf("make file for the build context: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	if _, err := layer.ConvertPlain(ctx, z, f, lim); err != nil {
		return nil, err
	}
	lr, err := layer.Open(f.Name())
	if err != nil {
		return nil, err
	}
	return &Tree{lr}, nil
}

// Close gives the space back that the archive takes.
func (t *Tree) Close() error { return t.r.Close() }

// Lstat implements tree.Tree.
func (t *Tree) Lstat(p string) (tree.Node, error) {
	n, err := t.r.Lstat(p)
	if err != nil {
		return tree.Node{}, err
	}
	if p == "." {
		return root(n), nil
	}
	if n.IsWhiteout() {
		return tree.Node{}, fmt.Errorf("lstat %q: %w", p, os.ErrNotExist)
	}
	return bare(n), nil
}

// ReadDir implements tree.Tree.
func (t *Tree) ReadDir(p string) ([]tree.Entry, error) {
	es, err := t.r.ReadDir(p)
	if err != nil {
		return nil, err
	}
	out := make([]tree.Entry, 0, len(es))
	for _, e := range es {
		if !e.Node.IsWhiteout() {
			out = append(out, tree.Entry{Name: e.Name, Node: bare(e.Node)})
		}
	}
	return out, nil
}

// Readlink implements tree.Tree.
func (t *Tree) Readlink(p string) (string, error) { return t.r.Readlink(p) }

// Open implements tree.Tree.
func (t *Tree) Open(p string) (io.ReadCloser, error) { return t.r.Open(p) }

// root is the same for every context: where it lies is not part of it.
func root(n tree.Node) tree.Node {
	return tree.Node{Mode: tree.ModeDir | 0o755, MTime: n.MTime}
}

// bare takes the marks off that mean something in layers only.
func bare(n tree.Node) tree.Node {
	marked := func(k, _ string) bool { return strings.HasPrefix(k, "trusted.overlay.") }
	for k, v := range n.Xattr {
		if marked(k, v) {
			n.Xattr = maps.Clone(n.Xattr)
			maps.DeleteFunc(n.Xattr, marked)
			if len(n.Xattr) == 0 {
				n.Xattr = nil
			}
			break
		}
	}
	return n
}
