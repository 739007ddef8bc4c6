package archive

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"

	"github.com/kiln-build/kiln/internal/decompress"
)

// HeaderSize is how many bytes of a stream Detect wants to see.
const HeaderSize = 1024

// Detect reports whether a stream that begins with head is what Docker takes
// as an archive: compressed in one of the ways that package decompress knows, or a tar.
// Everything else that comes as a build context is a Dockerfile.
func Detect(head []byte) bool { return decompress.Compressed(head) || isTar(head) }

// isTar reports whether the first block is a tar header with a right checksum,
// or the end of an empty archive. What follows it may lie beyond head.
func isTar(head []byte) bool {
	if len(head) < 512 {
		return false
	}
	if !bytes.ContainsFunc(head[:512], func(r rune) bool { return r != 0 }) {
		return true
	}
	_, err := tar.NewReader(bytes.NewReader(head)).Next()
	return err == nil || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) || errors.Is(err, tar.ErrInsecurePath)
}
