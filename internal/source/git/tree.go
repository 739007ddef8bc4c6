package git

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/source/local"
	"github.com/kiln-build/kiln/internal/tree"
)

// Tree is a commit's files. It implements tree.Tree.
//
// Its metadata is what git knows, and the same wherever it is fetched: of
// permissions that is whether a file can be executed, and the time is the
// commit's, unless the URL asked for that of the checkout.
type Tree struct {
	Commit string    // the commit's full hash
	Date   time.Time // when it was committed

	files *local.Tree
	dir   string
	keep  bool      // show .git
	time  time.Time // of everything; zero: the files' own
}

// Close removes the files.
func (t *Tree) Close() error { return errors.Join(t.files.Close(), os.RemoveAll(t.dir)) }

// Lstat implements tree.Tree.
func (t *Tree) Lstat(p string) (tree.Node, error) {
	if t.hidden(p) {
		return tree.Node{}, notExist("lstat", p)
	}
	n, err := t.files.Lstat(p)
	return t.node(n), err
}

// ReadDir implements tree.Tree.
func (t *Tree) ReadDir(p string) ([]tree.Entry, error) {
	if t.hidden(p) {
		return nil, notExist("read directory", p)
	}
	es, err := t.files.ReadDir(p)
	if err != nil {
		return nil, err
	}
	out := make([]tree.Entry, 0, len(es))
	for _, e := range es {
		if !t.hidden(e.Name) {
			out = append(out, tree.Entry{Name: e.Name, Node: t.node(e.Node)})
		}
	}
	return out, nil
}

// Readlink implements tree.Tree.
func (t *Tree) Readlink(p string) (string, error) {
	if t.hidden(p) {
		return "", notExist("read link", p)
	}
	return t.files.Readlink(p)
}

// Open implements tree.Tree.
func (t *Tree) Open(p string) (io.ReadCloser, error) {
	if t.hidden(p) {
		return nil, notExist("open", p)
	}
	return t.files.Open(p)
}

// ContentDigest is local.Tree's.
func (t *Tree) ContentDigest(p string) (digest.Digest, error) {
	if t.hidden(p) {
		return "", notExist("digest of", p)
	}
	return t.files.ContentDigest(p)
}

// hidden reports whether a path is git's own. No commit can have a file of that
// name; submodules have one each, that says where it was fetched to.
func (t *Tree) hidden(p string) bool { return !t.keep && inGitDir(p) }

func inGitDir(p string) bool { return strings.Contains("/"+p+"/", "/.git/") }

func (t *Tree) node(n tree.Node) tree.Node {
	if !t.time.IsZero() {
		n.MTime = t.time
	}
	switch n.Mode & tree.ModeType {
	case tree.ModeDir:
		n.Mode = tree.ModeDir | 0o755
	case tree.ModeRegular:
		exec := n.Mode&0o100 != 0
		if n.Mode = tree.ModeRegular | 0o644; exec {
			n.Mode |= 0o111
		}
	}
	n.Inode, n.Nlink, n.Xattr = 0, 0, nil
	return n
}

func notExist(what, p string) error { return fmt.Errorf("%s %q: %w", what, p, fs.ErrNotExist) }
