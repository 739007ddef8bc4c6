// Package tree defines the read-only file tree that everything in Kiln is
// made of: a build context, one layer, the merged root file system of an image.
//
// A tree is a value: it does not change while it is in use, has Linux metadata
// that need not be the host's (uid 0 in a file that uid 1000 owns), and is read
// lazily. Nothing here touches the host except through an implementation.
package tree

import (
	"io"
	"io/fs"
	"path"
	"strings"
	"time"
)

// File type bits of Node.Mode, with Linux's values (inode(7)) on every host.
const (
	ModeType    = 0o170000
	ModeSocket  = 0o140000
	ModeSymlink = 0o120000
	ModeRegular = 0o100000
	ModeBlock   = 0o060000
	ModeDir     = 0o040000
	ModeChar    = 0o020000
	ModeFIFO    = 0o010000
	// ModePerm is permissions with setuid, setgid and sticky.
	ModePerm = 0o7777
)

// XattrOpaque marks a directory of a raw layer that hides what lower layers
// have below it; its value is "y", as in Linux's overlayfs.
const XattrOpaque = "trusted.overlay.opaque"

// Node is what is known about one path besides its content.
type Node struct {
	Mode     uint32 // type and permission bits, as st_mode
	UID, GID uint32
	Size     int64 // bytes of content; regular files only
	MTime    time.Time
	Major    uint32 // device number; character and block devices only
	Minor    uint32
	// Inode is equal for, and only for, hard links of one file within one
	// tree. 0: the tree cannot tell, treat as not linked.
	Inode uint64
	Nlink uint32            // number of names that share Inode; 0 or 1: not linked
	Xattr map[string]string // extended attributes, nil if none; not to be modified
}

// IsDir reports whether n is a directory.
func (n Node) IsDir() bool { return n.Mode&ModeType == ModeDir }

// IsRegular reports whether n is a regular file.
func (n Node) IsRegular() bool { return n.Mode&ModeType == ModeRegular }

// IsSymlink reports whether n is a symbolic link.
func (n Node) IsSymlink() bool { return n.Mode&ModeType == ModeSymlink }

// IsWhiteout reports whether n, found in a raw layer, hides a lower layer's
// entry of the same name: a character device 0:0, as in Linux's overlayfs.
func (n Node) IsWhiteout() bool {
	return n.Mode&ModeType == ModeChar && n.Major == 0 && n.Minor == 0
}

// IsOpaque reports whether n, found in a raw layer, is an opaque directory.
func (n Node) IsOpaque() bool { return n.IsDir() && n.Xattr[XattrOpaque] == "y" }

// Entry is one name in a directory.
type Entry struct {
	Name string
	Node Node
}

// Tree is a read-only file tree.
//
// Paths are as fs.ValidPath has them: slash-separated, relative, cleaned,
// "." is the root. No method follows a symbolic link, in any component: a
// path that has one before its end gives fs.ErrNotExist (use rootfs.Resolve).
// A missing path gives an error for which errors.Is(err, fs.ErrNotExist).
// Safe for concurrent use.
type Tree interface {
	Lstat(path string) (Node, error)
	// ReadDir returns the entries of a directory, sorted by name (bytewise).
	ReadDir(path string) ([]Entry, error)
	Readlink(path string) (string, error)
	// Open opens a regular file for reading.
	Open(path string) (io.ReadCloser, error)
}

// Clean turns any path a user may write, absolute or relative, into the form
// that Tree wants. ".." never leaves the root.
func Clean(p string) string {
	c := strings.TrimPrefix(path.Clean("/"+p), "/")
	if c == "" {
		return "."
	}
	return c
}

// Walk calls fn for the root and everything below it, a directory before its
// entries and those in sorted order. fn may return fs.SkipDir for a directory.
func Walk(t Tree, root string, fn func(path string, n Node) error) error {
	n, err := t.Lstat(root)
	if err != nil {
		return err
	}
	return walk(t, root, n, fn)
}

func walk(t Tree, p string, n Node, fn func(string, Node) error) error {
	err := fn(p, n)
	if err == fs.SkipDir && n.IsDir() {
		return nil
	}
	if err != nil || !n.IsDir() {
		return err
	}
	es, err := t.ReadDir(p)
	if err != nil {
		return err
	}
	for _, e := range es {
		if err := walk(t, path.Join(p, e.Name), e.Node, fn); err != nil {
			return err
		}
	}
	return nil
}
