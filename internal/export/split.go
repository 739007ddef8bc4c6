package export

import (
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/kiln-build/kiln/internal/tree"
)

// Dir is a tree that is to be a directory of another.
type Dir struct {
	Name string
	Tree tree.Tree
}

// Dirs returns a tree of which each of dirs is a directory: what several platforms' files are
// told apart by. Names must differ.
func Dirs(dirs []Dir) tree.Tree {
	d := slices.Clone(dirs)
	slices.SortFunc(d, func(a, b Dir) int { return strings.Compare(a.Name, b.Name) })
	return &dirTree{dirs: d}
}

// dirTree implements Dirs.
type dirTree struct{ dirs []Dir }

var _ tree.Tree = (*dirTree)(nil)

// below is the tree that a path leads into, by its number, and the path there. -1: the root itself.
func (t *dirTree) below(op, p string) (n int, rest string, err error) {
	if p == "." {
		return -1, ".", nil
	}
	name, rest, ok := strings.Cut(p, "/")
	if !ok {
		rest = "."
	}
	n = slices.IndexFunc(t.dirs, func(d Dir) bool { return d.Name == name })
	if n < 0 {
		return 0, "", &fs.PathError{Op: op, Path: p, Err: fs.ErrNotExist}
	}
	return n, rest, nil
}

// node is one of tree n: equal inode numbers in two trees are not one file.
func (t *dirTree) node(n int, node tree.Node) tree.Node {
	if node.Inode != 0 {
		node.Inode = node.Inode*uint64(len(t.dirs)) + uint64(n)
	}
	return node
}

// Lstat implements tree.Tree.
func (t *dirTree) Lstat(p string) (tree.Node, error) {
	n, rest, err := t.below("lstat", p)
	if err != nil {
		return tree.Node{}, err
	}
	if n < 0 {
		return tree.Node{Mode: tree.ModeDir | 0o755, MTime: time.Unix(0, 0)}, nil
	}
	node, err := t.dirs[n].Tree.Lstat(rest)
	return t.node(n, node), err
}

// ReadDir implements tree.Tree.
func (t *dirTree) ReadDir(p string) ([]tree.Entry, error) {
	n, rest, err := t.below("readdir", p)
	if err != nil {
		return nil, err
	}
	if n < 0 {
		var es []tree.Entry
		for _, d := range t.dirs {
			node, err := t.Lstat(d.Name)
			if err != nil {
				return nil, err
			}
			es = append(es, tree.Entry{Name: d.Name, Node: node})
		}
		return es, nil
	}
	es, err := t.dirs[n].Tree.ReadDir(rest)
	for i := range es {
		es[i].Node = t.node(n, es[i].Node)
	}
	return es, err
}

// Readlink implements tree.Tree. An absolute target stays within its directory, as it was
// within its own root.
func (t *dirTree) Readlink(p string) (string, error) {
	n, rest, err := t.below("readlink", p)
	if err != nil {
		return "", err
	}
	if n < 0 {
		return "", &fs.PathError{Op: "readlink", Path: p, Err: syscall.EINVAL}
	}
	target, err := t.dirs[n].Tree.Readlink(rest)
	if err == nil && path.IsAbs(target) {
		target = path.Join("/", t.dirs[n].Name, target)
	}
	return target, err
}

// Open implements tree.Tree.
func (t *dirTree) Open(p string) (io.ReadCloser, error) {
	n, rest, err := t.below("open", p)
	if err != nil {
		return nil, err
	}
	if n < 0 {
		return nil, &fs.PathError{Op: "open", Path: p, Err: syscall.EISDIR}
	}
	return t.dirs[n].Tree.Open(rest)
}
