// Package inline has trees of a few files that are in memory: a Dockerfile that
// came by standard input, an empty build context.
package inline

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/kiln-build/kiln/internal/tree"
)

// Tree is a tree of files in memory, by path. Directories are there because
// something is in them. It implements tree.Tree.
type Tree map[string]File

// File is a regular file.
type File struct {
	Content []byte
	Mode    uint32 // permissions
	MTime   time.Time
}

// Lstat implements tree.Tree.
func (t Tree) Lstat(p string) (tree.Node, error) {
	if f, ok := t[p]; ok {
		return tree.Node{Mode: tree.ModeRegular | f.Mode&tree.ModePerm, Size: int64(len(f.Content)), MTime: f.MTime}, nil
	}
	if p == "." {
		return directory(), nil
	}
	for name := range t {
		if strings.HasPrefix(name, p+"/") {
			return directory(), nil
		}
	}
	return tree.Node{}, fmt.Errorf("lstat %q: %w", p, fs.ErrNotExist)
}

func directory() tree.Node {
	return tree.Node{Mode: tree.ModeDir | 0o755, MTime: time.Unix(0, 0)}
}

// ReadDir implements tree.Tree.
func (t Tree) ReadDir(p string) ([]tree.Entry, error) {
	n, err := t.Lstat(p)
	if err != nil {
		return nil, err
	}
	if !n.IsDir() {
		return nil, fmt.Errorf("read directory %q: %w", p, syscall.ENOTDIR)
	}
	var es []tree.Entry
	for name := range t {
		rest := name
		if p != "." {
			var below bool
			if rest, below = strings.CutPrefix(name, p+"/"); !below {
				continue
			}
		}
		first, _, _ := strings.Cut(rest, "/")
		n, err := t.Lstat(path.Join(p, first))
		if err != nil {
			return nil, err
		}
		es = append(es, tree.Entry{Name: first, Node: n})
	}
	slices.SortFunc(es, func(a, b tree.Entry) int { return cmp.Compare(a.Name, b.Name) })
	return slices.CompactFunc(es, func(a, b tree.Entry) bool { return a.Name == b.Name }), nil
}

// Readlink implements tree.Tree: there are no links.
func (t Tree) Readlink(p string) (string, error) {
	if _, err := t.Lstat(p); err != nil {
		return "", err
	}
	return "", fmt.Errorf("read link %q: not a symbolic link", p)
}

// Open implements tree.Tree.
func (t Tree) Open(p string) (io.ReadCloser, error) {
	f, ok := t[p]
	if !ok {
		if _, err := t.Lstat(p); err != nil {
			return nil, fmt.Errorf("open %q: %w", p, fs.ErrNotExist)
		}
		return nil, fmt.Errorf("open %q: not a regular file", p)
	}
	return io.NopCloser(bytes.NewReader(f.Content)), nil
}
