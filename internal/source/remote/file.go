package remote

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/tree"
)

// oneFile is a tree of one file in its root. It implements tree.Tree.
type oneFile struct {
	name   string
	node   tree.Node
	path   string // on the host
	digest digest.Digest
}

func (t *oneFile) find(what, p string) error {
	if p != t.name {
		return fmt.Errorf("%s %q: %w", what, p, fs.ErrNotExist)
	}
	return nil
}

// Lstat implements tree.Tree.
func (t *oneFile) Lstat(p string) (tree.Node, error) {
	if p == "." {
		return tree.Node{Mode: tree.ModeDir | 0o755, MTime: time.Unix(0, 0)}, nil
	}
	return t.node, t.find("lstat", p)
}

// ReadDir implements tree.Tree.
func (t *oneFile) ReadDir(p string) ([]tree.Entry, error) {
	if p != "." {
		return nil, fmt.Errorf("read directory %q: %w", p, fs.ErrNotExist)
	}
	return []tree.Entry{{Name: t.name, Node: t.node}}, nil
}

// Readlink implements tree.Tree.
func (t *oneFile) Readlink(p string) (string, error) {
	return "", fmt.Errorf("read link %q: %w", p, fs.ErrInvalid)
}

// Open implements tree.Tree.
func (t *oneFile) Open(p string) (io.ReadCloser, error) {
	if err := t.find("open", p); err != nil {
		return nil, err
	}
	return os.Open(t.path)
}

// ContentDigest implements content.Digester.
func (t *oneFile) ContentDigest(p string) (digest.Digest, error) {
	return t.digest, t.find("digest of", p)
}
