package layer

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"math"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/tree"
)

// Info says what a layer's tar was.
type Info struct {
	DiffID  digest.Digest // of the whole stream
	TarSize int64         // length of the stream
	Entries int           // names in the layer: files, directories, whiteouts
	Newest  time.Time     // the latest modification time of an entry; zero without entries
}

// Prefixes of the PAX records that carry extended attributes.
const (
	paxSchily     = "SCHILY.xattr."
	paxLibarchive = "LIBARCHIVE.xattr." // name URL-encoded, value in base64
)

// Convert reads an uncompressed layer tar from r, to its very end, and writes
// the layer file for it to f, which it empties first. It neither syncs nor closes f.
//
// The tar is taken as containerd takes it: names stay within the root, parents
// that are missing are made (see XattrImplied), symbolic links on the way to an
// entry are followed within the layer, of entries with one name the last one
// counts, a directory is merged into a directory. Beyond that, a hard link may
// come before its target, and a whiteout hides only lower layers wherever it stands.
//
// If Convert fails, what is in f is no layer file. Going beyond a limit is a *LimitError.
func Convert(ctx context.Context, r io.Reader, f *os.File, lim Limits) (Info, error) {
	return convertTar(ctx, r, f, lim, false)
}

func convertTar(ctx context.Context, r io.Reader, f *os.File, lim Limits, plain bool) (Info, error) {
	lim = lim.withDefaults()
	if err := f.Truncate(0); err != nil {
		return Info{}, fmt.Errorf("write layer file: %w", err)
	}
	c := &converter{
		b:    newBuilder(lim),
		w:    newBlockWriter(f),
		src:  &source{r: cancellable(ctx, r), sum: sha256.New(), max: lim.MaxBytes},
		left: lim.MaxBytes,
	}
	c.b.plain = plain
	if err := c.w.append(make([]byte, blockSize)); err != nil { // block 0: the superblock
		return Info{}, err
	}
	if err := c.read(ctx); err != nil {
		return Info{}, fmt.Errorf("read layer: %w", err)
	}
	var sum [32]byte
	c.src.sum.Sum(sum[:0])
	iw := imageWriter{b: c.b, w: c.w}
	n, err := iw.write(c.src.n, sum)
	if err != nil {
		return Info{}, err
	}
	return Info{DiffID: digest.NewDigestFromBytes(digest.SHA256, sum[:]), TarSize: c.src.n, Entries: int(n), Newest: c.newest}, nil
}

// readerFunc is an io.Reader.
type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// cancellable is r until ctx ends.
func cancellable(ctx context.Context, r io.Reader) io.Reader {
	return readerFunc(func(p []byte) (int, error) {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		return r.Read(p)
	})
}

// source is the tar stream: counted, hashed, bounded.
type source struct {
	r   io.Reader
	sum hash.Hash
	n   int64
	max int64
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.sum.Write(p[:n])
	if s.n += int64(n); s.n > s.max {
		return 0, &LimitError{Name: "MaxBytes", What: "bytes in the layer's tar", Max: s.max}
	}
	return n, err
}

type converter struct {
	b    *builder
	w    *blockWriter
	src  *source
	left int64 // of MaxBytes, for file content

	newest time.Time
}

func (c *converter) read(ctx context.Context) error {
	br := bufio.NewReaderSize(c.src, 256<<10)
	tr := tar.NewReader(br)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return err
		}
		// Reading the hole of a sparse file does not read the source.
		if err := c.entry(h, cancellable(ctx, tr)); err != nil {
			return fmt.Errorf("entry %q: %w", h.Name, err)
		}
	}
	// What follows the end of the archive belongs to the diff ID too.
	if _, err := io.Copy(io.Discard, br); err != nil {
		return err
	}
	return c.b.resolvePending()
}

// entry takes in one entry of the tar.
func (c *converter) entry(h *tar.Header, content io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	dirName, base, kind, err := c.b.parseName(h.Name)
	if err != nil || kind == kindIgnored {
		return err
	}
	in, err := c.inode(h)
	if err != nil {
		return err
	}
	if h.ModTime.After(c.newest) {
		c.newest = h.ModTime
	}
	dir, err := c.b.lookupDir(dirName, true)
	if err != nil {
		return err
	}
	switch kind {
	case kindOpaque:
		dir.flags |= flagOpaque
		return nil
	case kindWhiteout:
		return c.b.put(dir, base, newWhiteout())
	}
	switch h.Typeflag {
	case tar.TypeLink:
		return c.b.link(h.Name, dir, base, h.Linkname, in)
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		if err := c.content(in, content); err != nil {
			return err
		}
	}
	return c.b.put(dir, base, in)
}

func newWhiteout() *inode { return &inode{mode: tree.ModeChar} }

// inode turns a header into an inode, which for a hard link has no type.
func (c *converter) inode(h *tar.Header) (*inode, error) {
	if h.Uid < 0 || h.Gid < 0 || int64(h.Uid) > math.MaxUint32 || int64(h.Gid) > math.MaxUint32 {
		return nil, fmt.Errorf("owner %d:%d is out of range", h.Uid, h.Gid)
	}
	in := &inode{
		mode: uint16(h.Mode & tree.ModePerm), uid: uint32(h.Uid), gid: uint32(h.Gid),
		mtime: h.ModTime.Unix(), nsec: uint32(h.ModTime.Nanosecond()),
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		in.mode |= tree.ModeRegular
		in.size = h.Size
	case tar.TypeLink:
	case tar.TypeSymlink:
		in.mode |= tree.ModeSymlink
		in.target = strings.Clone(h.Linkname)
		if err := checkTarget(in.target); err != nil {
			return nil, err
		}
	case tar.TypeDir:
		in.mode |= tree.ModeDir
		in.dir = &directory{}
	case tar.TypeFifo:
		in.mode |= tree.ModeFIFO
	case tar.TypeChar, tar.TypeBlock:
		if err := checkDev(h); err != nil {
			return nil, err
		}
		in.block = encodeDev(uint32(h.Devmajor), uint32(h.Devminor))
		if h.Typeflag == tar.TypeBlock {
			in.mode |= tree.ModeBlock
		} else if in.mode |= tree.ModeChar; in.block == 0 {
			return newWhiteout(), nil // as overlayfs stores one, and so as storage drivers take it
		}
	default:
		return nil, fmt.Errorf("unknown entry type %q", h.Typeflag)
	}
	m, err := headerXattrs(h)
	if err != nil {
		return nil, err
	}
	in.xattrs, err = c.b.internXattrs(m)
	return in, err
}

// headerXattrs returns the extended attributes that a header has. Those that
// overlayfs and the layer file keep for themselves are left out, as a mount of
// overlayfs would not let them be set.
func headerXattrs(h *tar.Header) (map[string]string, error) {
	var m map[string]string
	for _, rec := range slices.Sorted(maps.Keys(h.PAXRecords)) {
		v := h.PAXRecords[rec]
		k, schily := strings.CutPrefix(rec, paxSchily)
		if !schily {
			enc, ok := strings.CutPrefix(rec, paxLibarchive)
			if !ok {
				continue
			}
			var err error
			if k, err = url.PathUnescape(enc); err != nil {
				return nil, fmt.Errorf("extended attribute %q: %w", enc, err)
			}
			if _, ok := h.PAXRecords[paxSchily+k]; ok {
				continue
			}
			b, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(v, "="))
			if err != nil {
				return nil, fmt.Errorf("extended attribute %q: %w", k, err)
			}
			v = string(b)
		}
		if strings.HasPrefix(k, xattrPrivate) {
			continue
		}
		if err := checkXattr(k, v); err != nil {
			return nil, err
		}
		if m == nil {
			m = map[string]string{}
		}
		m[k] = v
	}
	return m, nil
}

func checkTarget(s string) error {
	if s == "" || len(s) > maxTarget || strings.IndexByte(s, 0) >= 0 {
		return fmt.Errorf("symbolic link's target of %d bytes is not possible", len(s))
	}
	return nil
}

func checkDev(h *tar.Header) error {
	if h.Devmajor < 0 || h.Devminor < 0 || h.Devmajor > maxMajor || h.Devminor > maxMinor {
		return fmt.Errorf("device number %d:%d is out of range", h.Devmajor, h.Devminor)
	}
	return nil
}

func checkXattr(k, v string) error {
	if k == "" || len(k) > maxXattrName || strings.IndexByte(k, 0) >= 0 {
		return fmt.Errorf("extended attribute's name %.64q is not possible", k)
	}
	if len(v) > maxXattrValue {
		return fmt.Errorf("extended attribute %q has %d bytes, more than %d", k, len(v), maxXattrValue)
	}
	return nil
}

// content writes a regular file's content.
func (c *converter) content(in *inode, r io.Reader) error {
	if in.size > c.b.lim.MaxFileSize {
		return &LimitError{Name: "MaxFileSize", What: "bytes in a file", Max: c.b.lim.MaxFileSize}
	}
	if in.size > c.left {
		return &LimitError{Name: "MaxBytes", What: "bytes in the layer's files", Max: c.b.lim.MaxBytes}
	}
	c.left -= in.size
	if in.size <= 0 {
		in.size = 0
		return nil
	}
	if err := c.w.align(blockSize); err != nil {
		return err
	}
	block, err := blockOf(c.w.pos())
	if err != nil {
		return err
	}
	in.block = block
	return c.w.copyFrom(r, in.size)
}
