package decompress

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// newXZGuard passes an xz stream on up to a block that asks for a dictionary of
// more than maxWindow, which the xz package would allocate whatever its size.
// It knows just enough of the format to find the blocks; what is malformed in
// any other way is passed on for the xz package to refuse.
func newXZGuard(r *bufio.Reader) io.ReadCloser {
	pr, pw := io.Pipe()
	go func() {
		g := xzGuard{r: r, w: pw}
		pw.CloseWithError(g.streams())
	}()
	return pr
}

type xzGuard struct {
	r   *bufio.Reader
	w   io.Writer
	buf [1024]byte
}

// take passes n ≤ 1024 bytes on and returns them.
func (g *xzGuard) take(n int) ([]byte, error) {
	b := g.buf[:n]
	got, err := io.ReadFull(g.r, b)
	if _, werr := g.w.Write(b[:got]); werr != nil {
		return nil, werr
	}
	return b, err
}

// streams follows streams with padding between them, to the end.
func (g *xzGuard) streams() error {
	for {
		b, err := g.take(4)
		if err != nil {
			return end(err)
		}
		if binary.LittleEndian.Uint32(b) == 0 {
			continue // padding
		}
		if b, err = g.take(8); err != nil {
			return end(err)
		}
		check := xzCheckSize(b[3])
		for more := true; more; {
			if more, err = g.block(check); err != nil {
				return end(err)
			}
		}
		if err := g.index(); err != nil {
			return end(err)
		}
	}
}

// end: the xz package sees for itself that something is missing.
func end(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return io.EOF
	}
	return err
}

func xzCheckSize(flag byte) int {
	return [16]int{0, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64}[flag&15]
}

// block follows one block; false: it is the index instead.
func (g *xzGuard) block(check int) (bool, error) {
	size, err := g.r.Peek(1)
	if err != nil {
		return false, err
	}
	if size[0] == 0 {
		return false, nil
	}
	head, err := g.r.Peek((int(size[0]) + 1) * 4)
	if err != nil {
		return false, err
	}
	if d, ok := xzDictionary(head); ok && d > maxWindow {
		return false, fmt.Errorf("xz: a dictionary of %d bytes is more than the %d allowed", d, maxWindow)
	}
	if _, err := g.take(len(head)); err != nil {
		return false, err
	}
	n, err := g.chunks()
	if err != nil {
		return false, err
	}
	_, err = g.take(int((4-n%4)%4) + check)
	return true, err
}

// xzDictionary finds the LZMA2 filter in a block header.
func xzDictionary(head []byte) (uint64, bool) {
	flags, b := head[1], head[2:len(head)-4]
	next := func() uint64 {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			b = nil
			return 0
		}
		b = b[n:]
		return v
	}
	for _, f := range []byte{0x40, 0x80} {
		if flags&f != 0 {
			next()
		}
	}
	for range flags&3 + 1 {
		id, size := next(), next()
		if size > uint64(len(b)) {
			return 0, false
		}
		if id == 0x21 && size == 1 {
			bits := uint64(b[0])
			if bits >= 40 {
				return 1<<32 - 1, true
			}
			return (2 | bits&1) << (bits/2 + 11), true
		}
		b = b[size:]
	}
	return 0, false
}

// chunks follows LZMA2 chunks to their end, and counts their bytes.
func (g *xzGuard) chunks() (int64, error) {
	var total int64
	for {
		c, err := g.take(1)
		if err != nil {
			return 0, err
		}
		total++
		var size int64
		switch control := c[0]; {
		case control == 0:
			return total, nil
		case control >= 0x80:
			n := 4
			if control >= 0xc0 {
				n = 5
			}
			b, err := g.take(n)
			if err != nil {
				return 0, err
			}
			size = int64(binary.BigEndian.Uint16(b[2:])) + 1
			total += int64(n)
		case control <= 2:
			b, err := g.take(2)
			if err != nil {
				return 0, err
			}
			size = int64(binary.BigEndian.Uint16(b)) + 1
			total += 2
		default:
			return 0, fmt.Errorf("xz: unknown chunk type %#x", control)
		}
		if _, err := io.CopyN(g.w, g.r, size); err != nil {
			return 0, err
		}
		total += size
	}
}

// index follows the index and the footer after it.
func (g *xzGuard) index() error {
	if _, err := g.take(1); err != nil {
		return err
	}
	total := int64(1)
	records, n, err := g.uvarint()
	if err != nil {
		return err
	}
	total += n
	for range records {
		for range 2 {
			_, n, err := g.uvarint()
			if err != nil {
				return err
			}
			total += n
		}
	}
	_, err = g.take(int((4-total%4)%4) + 4 + 12)
	return err
}

func (g *xzGuard) uvarint() (v uint64, n int64, err error) {
	for shift := 0; ; shift += 7 {
		b, err := g.take(1)
		if err != nil {
			return 0, 0, err
		}
		n++
		v |= uint64(b[0]&0x7f) << shift
		if b[0] < 0x80 {
			return v, n, nil
		}
		if n > 9 {
			return 0, 0, errors.New("xz: malformed number in index")
		}
	}
}
