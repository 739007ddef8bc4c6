package fileop

import (
	"bytes"
	"errors"
	"io"
	"maps"
	"strings"
	"time"

	"github.com/kiln-build/kiln/internal/tree"
	"github.com/opencontainers/go-digest"
)

// inode is a file or directory that was made or changed.
type inode struct {
	// node.Nlink counts the names here; node.Inode is set with the second.
	node tree.Node
	// whiteout: not an inode at all; the name is gone from the base.
	whiteout bool
	target   string // symbolic link
	content  content
	// Directories: the names changed in it, and whether those of the base's
	// directory of the same path show through.
	kids  map[string]*inode
	lower bool
	// Others: what it is a copy of, but for metadata, if that is known; and whether it is
	// the base's of the same path, and was not put in its place.
	from tree.Origin
	kept bool
}

// content is where a regular file's bytes are.
type content struct {
	src  tree.Tree // with path; or
	path string

	spool    *spool // with at and size; or
	at, size int64

	data []byte
}

func (c content) open() (io.ReadCloser, error) {
	switch {
	case c.src != nil:
		return c.src.Open(c.path)
	case c.spool != nil:
		return c.spool.open(c.at, c.size)
	}
	return io.NopCloser(bytes.NewReader(c.data)), nil
}

// digest is tree.Digester's.
func (c content) digest() (digest.Digest, error) {
	if c.src == nil && c.spool == nil {
		return digest.FromBytes(c.data), nil
	}
	if c.src == nil {
		return "", errors.ErrUnsupported
	}
	return tree.ContentDigest(c.src, c.path)
}

// own marks inode numbers that Changes gave; those of a base have it clear.
const own = 1 << 63

func (i *inode) clone(seen map[*inode]*inode) *inode {
	if n, ok := seen[i]; ok {
		return n
	}
	n := *i
	if i.node.Nlink > 1 {
		seen[i] = &n
	}
	if i.kids != nil {
		n.kids = make(map[string]*inode, len(i.kids))
		for k, v := range i.kids {
			n.kids[k] = v.clone(seen)
		}
	}
	return &n
}

func (i *inode) set(name string, k *inode) {
	if i.kids == nil {
		i.kids = map[string]*inode{}
	}
	i.kids[name] = k
}

// unlink takes one name from i, and those below from what is there.
func (i *inode) unlink() {
	if i.node.Nlink > 1 {
		i.node.Nlink--
	}
	for _, k := range i.kids {
		k.unlink()
	}
}

// chown gives i to o; as on Linux, a file loses its capabilities.
func (i *inode) chown(o *owner) {
	if o == nil {
		return
	}
	i.node.UID, i.node.GID = o.uid, o.gid
	const capability = "security.capability"
	if _, ok := i.node.Xattr[capability]; ok && i.node.IsRegular() {
		i.node.Xattr = maps.Clone(i.node.Xattr)
		delete(i.node.Xattr, capability)
	}
}

func (i *inode) chmod(perm uint32) {
	i.node.Mode = i.node.Mode&tree.ModeType | perm&tree.ModePerm
}

// utime sets the modification time if there is one.
func (i *inode) utime(t *time.Time) {
	if t != nil {
		i.node.MTime = *t
	}
}

// addXattrs adds those of x that belong into an image.
func (i *inode) addXattrs(x map[string]string) {
	kept := copiedXattrs(x)
	if len(kept) == 0 {
		return
	}
	if len(i.node.Xattr) > 0 {
		m := maps.Clone(i.node.Xattr)
		maps.Copy(m, kept)
		kept = m
	}
	i.node.Xattr = kept
}

// copiedXattrs are the extended attributes that a copy takes along: all, but
// overlayfs's own and the labels of the host's security modules.
func copiedXattrs(x map[string]string) map[string]string {
	var out map[string]string
	for k, v := range x {
		if strings.HasPrefix(k, "trusted.overlay.") ||
			strings.HasPrefix(k, "security.") && k != "security.capability" {
			continue
		}
		if out == nil {
			out = make(map[string]string, len(x))
		}
		out[k] = v
	}
	return out
}
