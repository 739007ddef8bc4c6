// Package memtree is a tree.Tree in memory, for tests.
package memtree

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/kiln-build/kiln/internal/tree"
)

// File describes one path. The zero value is an empty regular file, 0644, owned
// by root, of the epoch.
type File struct {
	// Mode is type and permission bits (tree.Mode...). Without a type it is
	// a symbolic link if Link is set, a directory if the path given to New
	// ends with "/", else a regular file; without permission bits, and
	// without NoPerm, it has 0644 (file), 0755 (directory) or 0777 (link).
	Mode   uint32
	NoPerm bool // permission bits really are 0
	UID    uint32
	GID    uint32
	Data   string // content
	Link   string // target of a symbolic link
	// HardLink is the path of a file that this one is another name of; all
	// else is taken from there.
	HardLink string
	MTime    time.Time // zero: the epoch
	Major    uint32
	Minor    uint32
	Xattr    map[string]string
}

// Dir returns a directory with the given permission bits.
func Dir(perm uint32) File { return File{Mode: tree.ModeDir | perm, NoPerm: perm == 0} }

// Symlink returns a symbolic link.
func Symlink(target string) File { return File{Link: target} }

// Whiteout returns what hides a lower layer's name in a raw layer.
func Whiteout() File { return File{Mode: tree.ModeChar, NoPerm: true} }

// Opaque returns a directory of a raw layer that hides what is below it.
func Opaque() File {
	return File{Mode: tree.ModeDir | 0o755, Xattr: map[string]string{tree.XattrOpaque: "y"}}
}

type entry struct {
	node tree.Node
	data string
	link string
	kids []string // names, sorted
}

// Tree is a tree in memory. Safe for concurrent use.
type Tree struct {
	files map[string]*entry
}

// New makes a tree of files by path; a leading and a trailing "/" are allowed.
// Parents that are not given are directories with 0755. It panics on what is no
// tree (a file below a file, a hard link to nothing): that is a mistake in a test.
func New(files map[string]File) *Tree {
	t := &Tree{files: map[string]*entry{}}
	names := make([]string, 0, len(files))
	for p := range files {
		names = append(names, p)
	}
	slices.Sort(names)
	ino := uint64(0)
	for _, p := range names {
		f := files[p]
		if f.HardLink == "" {
			ino++
			t.files[tree.Clean(p)] = newEntry(p, f, ino)
		}
	}
	for _, p := range names {
		if f := files[p]; f.HardLink != "" {
			e := t.files[tree.Clean(f.HardLink)]
			if e == nil {
				panic("memtree: hard link to missing " + f.HardLink)
			}
			e.node.Nlink++
			t.files[tree.Clean(p)] = e
		}
	}
	t.addParents(&ino)
	for p := range t.files {
		if p != "." {
			d := t.files[path.Dir(p)]
			d.kids = append(d.kids, path.Base(p))
		}
	}
	for _, e := range t.files {
		slices.Sort(e.kids)
	}
	return t
}

func (t *Tree) addParents(ino *uint64) {
	var dirs []string
	for p := range t.files {
		for d := p; d != "."; {
			d = path.Dir(d)
			dirs = append(dirs, d)
		}
	}
	slices.Sort(dirs)
	for _, d := range append(dirs, ".") {
		e := t.files[d]
		if e == nil {
			*ino++
			t.files[d] = newEntry("/", File{}, *ino)
		} else if !e.node.IsDir() {
			panic("memtree: not a directory: " + d)
		}
	}
}

func newEntry(p string, f File, ino uint64) *entry {
	mode := f.Mode
	if mode&tree.ModeType == 0 {
		switch {
		case f.Link != "":
			mode |= tree.ModeSymlink
		case strings.HasSuffix(p, "/") || tree.Clean(p) == ".":
			mode |= tree.ModeDir
		default:
			mode |= tree.ModeRegular
		}
	}
	if mode&tree.ModePerm == 0 && !f.NoPerm {
		switch mode & tree.ModeType {
		case tree.ModeDir:
			mode |= 0o755
		case tree.ModeSymlink:
			mode |= 0o777
		default:
			mode |= 0o644
		}
	}
	n := tree.Node{
		Mode: mode, UID: f.UID, GID: f.GID, MTime: f.MTime, Major: f.Major, Minor: f.Minor,
		Inode: ino, Nlink: 1, Xattr: f.Xattr,
	}
	if n.MTime.IsZero() {
		n.MTime = time.Unix(0, 0)
	}
	if n.IsRegular() {
		n.Size = int64(len(f.Data))
	}
	return &entry{node: n, data: f.Data, link: f.Link}
}

func (t *Tree) get(op, p string) (*entry, error) {
	if tree.Clean(p) != p {
		return nil, &fs.PathError{Op: op, Path: p, Err: fs.ErrInvalid}
	}
	e := t.files[p]
	if e == nil {
		return nil, &fs.PathError{Op: op, Path: p, Err: fs.ErrNotExist}
	}
	return e, nil
}

// Lstat implements tree.Tree.
func (t *Tree) Lstat(p string) (tree.Node, error) {
	e, err := t.get("lstat", p)
	if err != nil {
		return tree.Node{}, err
	}
	return e.node, nil
}

// ReadDir implements tree.Tree.
func (t *Tree) ReadDir(p string) ([]tree.Entry, error) {
	e, err := t.get("readdir", p)
	if err != nil {
		return nil, err
	}
	if !e.node.IsDir() {
		return nil, &fs.PathError{Op: "readdir", Path: p, Err: syscall.ENOTDIR}
	}
	out := make([]tree.Entry, 0, len(e.kids))
	for _, k := range e.kids {
		out = append(out, tree.Entry{Name: k, Node: t.files[path.Join(p, k)].node})
	}
	return out, nil
}

// Readlink implements tree.Tree.
func (t *Tree) Readlink(p string) (string, error) {
	e, err := t.get("readlink", p)
	if err != nil {
		return "", err
	}
	if !e.node.IsSymlink() {
		return "", &fs.PathError{Op: "readlink", Path: p, Err: syscall.EINVAL}
	}
	return e.link, nil
}

// Open implements tree.Tree.
func (t *Tree) Open(p string) (io.ReadCloser, error) {
	e, err := t.get("open", p)
	if err != nil {
		return nil, err
	}
	if !e.node.IsRegular() {
		return nil, &fs.PathError{Op: "open", Path: p, Err: errors.New("not a regular file")}
	}
	return io.NopCloser(strings.NewReader(e.data)), nil
}

// Origin implements tree.Tracer.
func (t *Tree) Origin(p string) (tree.Origin, error) {
	n, err := t.Lstat(p)
	return tree.Origin{Layer: fmt.Sprintf("%p", t), Inode: n.Inode}, err
}
