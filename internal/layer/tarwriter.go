package layer

import (
	"archive/tar"
	"encoding/base64"
	"fmt"
	"io"
	"net/url"
	"path"
	"strings"
	"time"

	"github.com/kiln-build/kiln/internal/tree"
)

// Names that the OCI image specification gives to whiteouts.
const (
	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
)

// TarWriter writes the canonical tar of a layer: the one byte sequence that
// Kiln produces for given changes, whoever computes them (a sandbox, a COPY, a
// layer file read back). Its diff ID is the layer's identity.
//
// Entries come in the order of tree.Walk: a directory before its content,
// names sorted bytewise, the first name of a hard-linked file as the file and
// the later ones as links to it. The root itself is not an entry. Times have
// nanoseconds (PAX). Whiteouts have mode 0 and the epoch as their time.
type TarWriter struct {
	tw    *tar.Writer
	links map[uint64]string
	buf   []byte
}

// NewTarWriter returns a TarWriter that writes to w.
func NewTarWriter(w io.Writer) *TarWriter {
	return &TarWriter{tw: tar.NewWriter(w), links: map[uint64]string{}, buf: make([]byte, 256<<10)}
}

// Add writes one entry. target is a symbolic link's target. open gives a regular file's
// content, exactly n.Size bytes; it is called at most once, and not for a
// second name of a hard-linked file (n.Inode != 0 and n.Nlink > 1). A node that
// is a whiteout or opaque directory is written as the OCI whiteout for it.
// Sockets are left out, as every builder does: tar has none. A node that would
// not come back from the tar as itself is refused: a name that begins with
// ".wh.", is longer than 255 bytes or leads out of the root, say.
func (w *TarWriter) Add(p string, n tree.Node, target string, open func() (io.ReadCloser, error)) error {
	if p == "." {
		return w.opaque(p, n)
	}
	if n.Mode&tree.ModeType == tree.ModeSocket {
		return nil
	}
	if err := checkPath(p); err != nil {
		return fmt.Errorf("write layer entry %q: %w", p, err)
	}
	if n.IsWhiteout() {
		dir, base := path.Split(p)
		return w.marker(dir + whiteoutPrefix + base)
	}
	h := &tar.Header{
		Format: tar.FormatPAX, Name: p, Mode: int64(n.Mode & tree.ModePerm),
		Uid: int(n.UID), Gid: int(n.GID), ModTime: n.MTime,
	}
	if !n.IsDir() && n.Nlink > 1 && n.Inode != 0 {
		if first, ok := w.links[n.Inode]; ok {
			h.Typeflag, h.Linkname = tar.TypeLink, first
			return w.header(h)
		}
		w.links[n.Inode] = p
	}
	if err := describe(h, n, target); err != nil {
		return fmt.Errorf("write layer entry %q: %w", p, err)
	}
	if err := w.header(h); err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeReg:
		return w.content(p, n.Size, open)
	case tar.TypeDir:
		return w.opaque(p, n)
	}
	return nil
}

// describe completes the header of an entry that is not a hard link.
func describe(h *tar.Header, n tree.Node, target string) error {
	if err := setXattrs(h, n.Xattr); err != nil {
		return err
	}
	switch n.Mode & tree.ModeType {
	case tree.ModeRegular:
		h.Typeflag, h.Size = tar.TypeReg, n.Size
		return nil
	case tree.ModeDir:
		h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
		return nil
	case tree.ModeSymlink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, target
		return checkTarget(target)
	case tree.ModeFIFO:
		h.Typeflag = tar.TypeFifo
		return nil
	case tree.ModeChar:
		h.Typeflag = tar.TypeChar
	case tree.ModeBlock:
		h.Typeflag = tar.TypeBlock
	default:
		return fmt.Errorf("unknown file type %#o", n.Mode&tree.ModeType)
	}
	h.Devmajor, h.Devminor = int64(n.Major), int64(n.Minor)
	return checkDev(h)
}

// opaque writes what hides a directory's content in lower layers, if n is opaque.
func (w *TarWriter) opaque(p string, n tree.Node) error {
	if !n.IsOpaque() {
		return nil
	}
	return w.marker(path.Join(p, whiteoutOpaque))
}

// setXattrs puts extended attributes into a header, as "SCHILY.xattr." records
// where PAX can, else as libarchive's. Overlayfs' own are not part of a layer.
func setXattrs(h *tar.Header, xattrs map[string]string) error {
	for k, v := range xattrs {
		if strings.HasPrefix(k, xattrPrivate) {
			continue
		}
		if err := checkXattr(k, v); err != nil {
			return err
		}
		rec := paxSchily + k
		if strings.Contains(k, "=") { // ends the key of a PAX record
			rec, v = paxLibarchive+url.PathEscape(k), base64.RawStdEncoding.EncodeToString([]byte(v))
			rec = strings.ReplaceAll(rec, "=", "%3D")
		}
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[rec] = v
	}
	return nil
}

// checkPath refuses a name that would not come back as itself from a tar.
func checkPath(p string) error {
	if tree.Clean(p) != p || len(p) > maxPath {
		return fmt.Errorf("path of %d bytes is not possible", len(p))
	}
	for c := range strings.SplitSeq(p, "/") {
		if err := checkComponent(c); err != nil {
			return err
		}
	}
	return nil
}

func (w *TarWriter) marker(name string) error {
	return w.header(&tar.Header{Format: tar.FormatPAX, Typeflag: tar.TypeReg, Name: name, ModTime: time.Unix(0, 0)})
}

func (w *TarWriter) header(h *tar.Header) error {
	if err := w.tw.WriteHeader(h); err != nil {
		return fmt.Errorf("write layer entry %q: %w", h.Name, err)
	}
	return nil
}

func (w *TarWriter) content(p string, size int64, open func() (io.ReadCloser, error)) error {
	r, err := open()
	if err != nil {
		return err
	}
	defer r.Close()
	// The file may have grown: take what was promised, and no more.
	n, err := io.CopyBuffer(struct{ io.Writer }{w.tw}, io.LimitReader(r, size), w.buf)
	if err != nil {
		return fmt.Errorf("write layer entry %q: %w", p, err)
	}
	if n != size {
		return fmt.Errorf("write layer entry %q: content ended after %d of %d bytes: it changed while it was read", p, n, size)
	}
	return nil
}

// Close writes the end of the archive. It does not close the writer below.
func (w *TarWriter) Close() error { return w.tw.Close() }
