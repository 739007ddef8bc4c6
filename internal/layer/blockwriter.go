package layer

import (
	"bytes"
	"fmt"
	"hash/crc32"
	"io"
	"os"
)

// blockWriter writes a file from its start to its end through a buffer, and
// leaves holes where whole blocks are zero.
type blockWriter struct {
	f    *os.File
	off  int64 // of buf[0]; a multiple of blockSize
	n    int   // bytes in buf
	buf  []byte
	zero []byte
	// sum is the running CRC of what is appended while summing is set.
	summing bool
	sum     uint32
}

func newBlockWriter(f *os.File) *blockWriter {
	return &blockWriter{f: f, buf: make([]byte, 256<<10), zero: make([]byte, blockSize)}
}

// pos is the file offset of the next byte.
func (w *blockWriter) pos() int64 { return w.off + int64(w.n) }

func (w *blockWriter) append(p []byte) error {
	if w.summing {
		w.sum = crc32.Update(w.sum, crcTable(), p)
	}
	for len(p) > 0 {
		if w.n == len(w.buf) {
			if err := w.flush(); err != nil {
				return err
			}
		}
		n := copy(w.buf[w.n:], p)
		w.n += n
		p = p[n:]
	}
	return nil
}

// align appends zeros up to the next multiple of n, which divides blockSize.
func (w *blockWriter) align(n int64) error {
	if r := w.pos() % n; r != 0 {
		return w.append(w.zero[:n-r])
	}
	return nil
}

// copyFrom appends exactly size bytes of r.
func (w *blockWriter) copyFrom(r io.Reader, size int64) error {
	for size > 0 {
		if w.n == len(w.buf) {
			if err := w.flush(); err != nil {
				return err
			}
		}
		n, err := r.Read(w.buf[w.n:min(int64(len(w.buf)), int64(w.n)+size)])
		w.n += n
		size -= int64(n)
		if size > 0 && err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

// flush writes the buffer, but for its blocks of zeros.
func (w *blockWriter) flush() error {
	for i := 0; i < w.n; {
		j := i
		for j < w.n && !w.isZero(j) {
			j = min(j+blockSize, w.n)
		}
		if j > i {
			if _, err := w.f.WriteAt(w.buf[i:j], w.off+int64(i)); err != nil {
				return fmt.Errorf("write layer file: %w", err)
			}
		}
		for j < w.n && w.isZero(j) {
			j = min(j+blockSize, w.n)
		}
		i = j
	}
	w.off += int64(w.n)
	w.n = 0
	return nil
}

func (w *blockWriter) isZero(i int) bool {
	b := w.buf[i:min(i+blockSize, w.n)]
	return b[0] == 0 && bytes.Equal(b, w.zero[:len(b)])
}

// finish flushes and gives the file its size, which may end in a hole.
func (w *blockWriter) finish() error {
	if err := w.flush(); err != nil {
		return err
	}
	if err := w.f.Truncate(w.off); err != nil {
		return fmt.Errorf("write layer file: %w", err)
	}
	return nil
}
