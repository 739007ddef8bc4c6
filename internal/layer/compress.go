package layer

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"runtime"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/pgzip"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Compression is how a layer's tar is compressed in its blob.
type Compression string

// The compressions that OCI images may have.
const (
	Gzip         Compression = "gzip"
	Zstd         Compression = "zstd"
	Uncompressed Compression = "uncompressed"
)

// MediaType returns the OCI media type of a layer with that compression; "" is
// Uncompressed.
func MediaType(c Compression) string {
	switch c {
	case Gzip:
		return ocispec.MediaTypeImageLayerGzip
	case Zstd:
		return ocispec.MediaTypeImageLayerZstd
	}
	return ocispec.MediaTypeImageLayer
}

// What the compressed bytes depend on, besides the input and the level. To
// change one is to change the digest of every blob.
const (
	gzipBlock  = 256 << 10
	zstdWindow = 4 << 20
)

// maxGzipBlocks bounds what is compressed at once, and so memory.
const maxGzipBlocks = 4

// LeastLevel is the level that users call 0: gzip then stores what it gets, and zstd is at its fastest.
const LeastLevel = -1

// Compress returns a writer that compresses to w. Level 0 is the default of
// the compression; others are LeastLevel, gzip's 1 to 9 and zstd's 1 to 22. The bytes depend only on
// input, compression and level, neither on the time nor on the machine nor on how the
// input is cut into writes. Close ends the stream, does not close w, and must be
// called even after an error.
func Compress(w io.Writer, c Compression, level int) (io.WriteCloser, error) {
	switch c {
	case Gzip:
		switch {
		case level < LeastLevel || level > 9:
			return nil, fmt.Errorf("gzip has no level %d: 1 to 9", level)
		case level == 0:
			level = pgzip.DefaultCompression
		case level == LeastLevel:
			level = pgzip.NoCompression
		}
		z, err := pgzip.NewWriterLevel(w, level)
		if err != nil {
			return nil, err
		}
		z.ModTime = time.Unix(0, 0) // pgzip writes the zero time as some other one
		return gzipWriter{z}, z.SetConcurrency(gzipBlock, min(runtime.GOMAXPROCS(0), maxGzipBlocks))
	case Zstd:
		switch {
		case level < LeastLevel || level > 22:
			return nil, fmt.Errorf("zstd has no level %d: 1 to 22", level)
		case level == 0:
			level = 3
		case level == LeastLevel:
			level = 1
		}
		return zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(level)),
			zstd.WithWindowSize(zstdWindow), zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true))
	case Uncompressed:
		return uncompressed{w}, nil
	}
	return nil, fmt.Errorf("unknown compression %q: gzip, zstd or uncompressed", c)
}

type uncompressed struct{ io.Writer }

func (uncompressed) Close() error { return nil }

// gzipWriter ends pgzip's goroutines also after an error, which its Close does not.
type gzipWriter struct{ *pgzip.Writer }

func (w gzipWriter) Close() error {
	err := w.Writer.Close()
	if err != nil {
		w.Reset(io.Discard)
	}
	return err
}

// maxZstdWindow is what zstd's own decompressor accepts without being told to.
const maxZstdWindow = 128 << 20

// Decompress returns the uncompressed stream of a layer's blob, whose
// compression it tells from its first bytes: gzip (of any number of members), zstd, or none.
// Closing it does not close r.
func Decompress(r io.Reader) (io.ReadCloser, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	head, err := br.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read layer: %w", err)
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, fmt.Errorf("decompress layer: %w", err)
		}
		return decompressor{z, func() { z.Close() }}, nil
	case bytes.Equal(head, []byte{0x28, 0xb5, 0x2f, 0xfd}), len(head) == 4 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:], []byte{0x2a, 0x4d, 0x18}):
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxZstdWindow))
		if err != nil {
			return nil, fmt.Errorf("decompress layer: %w", err)
		}
		return decompressor{z, z.Close}, nil
	}
	return decompressor{br, func() {}}, nil
}

type decompressor struct {
	r     io.Reader
	close func()
}

func (d decompressor) Read(p []byte) (int, error) {
	n, err := d.r.Read(p)
	if err != nil && err != io.EOF {
		err = fmt.Errorf("decompress layer: %w", err)
	}
	return n, err
}

func (d decompressor) Close() error {
	d.close()
	return nil
}
