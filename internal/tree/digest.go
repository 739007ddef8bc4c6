package tree

import (
	"errors"

	"github.com/opencontainers/go-digest"
)

// Digester is a Tree that knows the SHA-256 digests of its files' content, or
// finds them more cheaply than by reading. errors.ErrUnsupported means that it
// cannot for this file.
type Digester interface {
	ContentDigest(path string) (digest.Digest, error)
}

// ContentDigest is what t knows of a regular file's content;
// errors.ErrUnsupported if it is no Digester: then the file must be read.
func ContentDigest(t Tree, path string) (digest.Digest, error) {
	if d, ok := t.(Digester); ok {
		return d.ContentDigest(path)
	}
	return "", errors.ErrUnsupported
}
