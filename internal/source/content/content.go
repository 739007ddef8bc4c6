// Package content gives the digests of files in a tree, without reading them
// where the tree knows better.
package content

import (
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/tree"
)

// Digester is a tree that knows the SHA-256 digests of its files' content.
type Digester interface {
	ContentDigest(path string) (digest.Digest, error)
}

// Digest returns the SHA-256 digest of a regular file's content: the tree's own
// answer if it is a Digester, what reading the file gives if not.
func Digest(t tree.Tree, p string) (d digest.Digest, err error) {
	if t, ok := t.(Digester); ok {
		return t.ContentDigest(p)
	}
	r, err := t.Open(p)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	h := digest.SHA256.Hash()
	if _, err := io.Copy(h, r); err != nil {
		return "", fmt.Errorf("digest of %q: %w", p, err)
	}
	return digest.NewDigest(digest.SHA256, h), nil
}
