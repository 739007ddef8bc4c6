// Package decompress opens compressed streams: gzip, bzip2, xz and zstd, told by
// their first bytes, with bounded memory whatever the stream asks for.
package decompress

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/therootcompany/xz"
)

// maxWindow bounds what a decompressor may hold in memory, whatever the
// stream asks for. It is enough for "xz -9" and for "zstd --long".
const maxWindow = 128 << 20

type format int

const (
	none format = iota
	gz
	bz2
	xzip
	zst
)

// formatOf tells a compression from a stream's first bytes.
func formatOf(head []byte) format {
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b, 0x08}):
		return gz
	case bytes.HasPrefix(head, []byte("BZh")):
		return bz2
	case bytes.HasPrefix(head, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		return xzip
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return zst
	case len(head) >= 8 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:4], []byte{0x2a, 0x4d, 0x18}):
		return zst // a skippable frame
	}
	return none
}

// Compressed reports whether a stream that begins with head, eight bytes or
// more, is in one of the formats that New knows.
func Compressed(head []byte) bool { return formatOf(head) != none }

// New returns the uncompressed stream of r, which is gzip, bzip2, xz or
// zstd (told from its first bytes) or not compressed at all. What a stream can
// make it allocate is bounded. Closing it does not close r.
func New(r io.Reader) (io.ReadCloser, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	head, err := br.Peek(8)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch formatOf(head) {
	case gz:
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, fmt.Errorf("decompress gzip: %w", err)
		}
		return decompressor{"gzip", z, func() { z.Close() }}, nil
	case bz2:
		return decompressor{"bzip2", bzip2.NewReader(br), func() {}}, nil
	case xzip:
		z, err := newXZ(br)
		if err != nil {
			return nil, fmt.Errorf("decompress xz: %w", err)
		}
		return decompressor{"xz", z, func() {}}, nil
	case zst:
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, fmt.Errorf("decompress zstd: %w", err)
		}
		return decompressor{"zstd", z, z.Close}, nil
	}
	return decompressor{"", br, func() {}}, nil
}

type decompressor struct {
	name  string
	r     io.Reader
	close func()
}

func (d decompressor) Read(p []byte) (int, error) {
	n, err := d.r.Read(p)
	if err != nil && err != io.EOF && d.name != "" {
		err = fmt.Errorf("decompress %s: %w", d.name, err)
	}
	return n, err
}

func (d decompressor) Close() error {
	d.close()
	return nil
}

// xzReader keeps a panic of the decoder, a translation of C, from being more
// than an error: its input is anybody's.
type xzReader struct{ r *xz.Reader }

func newXZ(r io.Reader) (x io.Reader, err error) {
	defer recovered(&err)
	z, err := xz.NewReader(r, maxWindow)
	return xzReader{z}, err
}

func (x xzReader) Read(p []byte) (n int, err error) {
	if len(p) == 0 {
		return 0, nil
	}
	defer recovered(&err)
	return x.r.Read(p)
}

func recovered(err *error) {
	if r := recover(); r != nil {
		*err = fmt.Errorf("stream is corrupt: %v", r)
	}
}
