// Package local reads a directory of the host as a tree.Tree: a build context
// or the place where a Dockerfile lies.
//
// What it shows is what Docker's client sends of a directory: everything
// belongs to 0:0, permissions (with setuid, setgid and sticky), modification
// times, devices, FIFOs and hard links are the host's. Sockets are left out,
// as are character devices 0:0, which would mean a deletion in a layer. Of the
// extended attributes there are security.capability and user.*: the others
// (SELinux labels, ACLs, overlayfs marks) say something about the host and not
// about the files. The root itself is always rwxr-xr-x, without attributes.
//
// No path leads out of the directory, or through a symbolic link, whatever
// happens on the host meanwhile: each lookup is relative to a file descriptor
// of the directory, and the kernel is told to follow no link. Nothing but
// regular files is ever opened for reading, so FIFOs and devices cannot block.
//
// A tree should not change while it is in use, but a directory of the host may.
// Content that changed since its digest was given, or while it is read, is an
// error (ErrChanged), not a layer that differs from its cache key.
package local

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/internal/source/statcache"
	"github.com/kiln-build/kiln/internal/tree"
)

// ErrChanged is what reading gives when a file changed under the build.
var ErrChanged = errors.New("file changed while the build was using it")

// Tree is a directory of the host. It implements tree.Tree.
type Tree struct {
	root     *os.File
	rootID   fileID
	openat2  bool // the kernel has it
	statPath bool // /proc/self/fd is there, so extended attributes can be read
	cache    *statcache.Cache

	mu   sync.Mutex
	seen map[string]hashed // files whose digest was given
}

type fileID struct{ dev, ino uint64 }

type hashed struct {
	sig     statcache.Sig
	sum     statcache.Sum
	settled bool // no other content can have the same sig
}

// Option changes how Open opens a tree.
type Option func(*Tree)

// WithStatCache keeps content digests in a cache in dir, for the next build.
// Trees of different directories can share it, at the same time.
func WithStatCache(dir string) Option {
	return func(t *Tree) { t.cache = statcache.Open(dir) }
}

// Open opens a directory. dir itself may be a symbolic link to one.
func Open(dir string, opts ...Option) (*Tree, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open directory %q: %w", dir, err)
	}
	fd, err := retry(func() (int, error) {
		return unix.Open(abs, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return nil, fmt.Errorf("open directory %q: %w", dir, err)
	}
	t := &Tree{root: os.NewFile(uintptr(fd), abs), seen: map[string]hashed{}}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.root.Close()
		return nil, fmt.Errorf("open directory %q: %w", dir, err)
	}
	t.rootID = fileID{st.Dev, st.Ino}
	t.openat2 = hasOpenat2(fd)
	t.statPath = unix.Access("/proc/self/fd", unix.X_OK) == nil
	for _, o := range opts {
		o(t)
	}
	return t, nil
}

// Close writes the stat cache, if there is one, and closes the directory. The
// tree must not be used any more. An error is of no consequence to the build:
// digests will have to be computed again.
func (t *Tree) Close() error {
	var err error
	if t.cache != nil {
		err = t.cache.Flush()
	}
	return errors.Join(err, t.root.Close())
}

// Lstat implements tree.Tree.
func (t *Tree) Lstat(p string) (tree.Node, error) {
	fd, st, err := t.openStat(p)
	if err != nil {
		return tree.Node{}, err
	}
	defer unix.Close(fd)
	if p == "." {
		return rootNode(&st), nil
	}
	n := t.node(&st)
	if n.Xattr, err = t.xattrs(fdPath(fd), true); err != nil {
		return tree.Node{}, pathError("read extended attributes of", p, err)
	}
	return n, nil
}

// stat is Lstat without extended attributes.
func (t *Tree) stat(p string) (unix.Stat_t, error) {
	fd, st, err := t.openStat(p)
	if err == nil {
		unix.Close(fd)
	}
	return st, err
}

// openStat opens a path for nothing but to say what it is.
func (t *Tree) openStat(p string) (fd int, st unix.Stat_t, err error) {
	fd, err = t.openPath(p, unix.O_PATH)
	if err != nil {
		return -1, st, pathError("lstat", p, err)
	}
	if err = unix.Fstat(fd, &st); err == nil && hidden(&st) {
		err = unix.ENOENT
	}
	if err != nil {
		unix.Close(fd)
		return -1, st, pathError("lstat", p, err)
	}
	return fd, st, nil
}

// ReadDir implements tree.Tree.
func (t *Tree) ReadDir(p string) ([]tree.Entry, error) {
	fd, err := t.openPath(p, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		if n, lerr := t.Lstat(p); lerr == nil && !n.IsDir() {
			return nil, fmt.Errorf("read directory %q: %w", short(p), unix.ENOTDIR)
		}
		return nil, pathError("read directory", p, err)
	}
	f := os.NewFile(uintptr(fd), p)
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("read directory %q: %w", p, reason(err))
	}
	slices.Sort(names)
	es := make([]tree.Entry, 0, len(names))
	dir := fdPath(fd) + "/"
	for _, name := range names {
		var st unix.Stat_t
		err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) {
			continue // gone since the names were read
		}
		if err != nil {
			return nil, pathError("lstat", join(p, name), err)
		}
		if hidden(&st) {
			continue
		}
		n := t.node(&st)
		if n.Xattr, err = t.xattrs(dir+name, false); err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, pathError("read extended attributes of", join(p, name), err)
		}
		es = append(es, tree.Entry{Name: name, Node: n})
	}
	return es, nil
}

// Readlink implements tree.Tree.
func (t *Tree) Readlink(p string) (string, error) {
	fd, err := t.openPath(p, unix.O_PATH)
	if err != nil {
		return "", pathError("read link", p, err)
	}
	defer unix.Close(fd)
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, "", buf)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) {
		// What an empty path gives for something that is no link.
		return "", fmt.Errorf("read link %q: not a symbolic link", p)
	}
	if err != nil {
		return "", pathError("read link", p, err)
	}
	return string(buf[:n]), nil
}

// pathError says what failed at which path. A component that is no directory,
// or a symbolic link, means that the path does not exist.
func pathError(what, p string, err error) error {
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		err = fs.ErrNotExist
	}
	return fmt.Errorf("%s %q: %w", what, short(p), err)
}

// short keeps a message readable when someone made a path of thousands of bytes.
func short(p string) string {
	if len(p) <= 512 {
		return p
	}
	return p[:250] + "..." + p[len(p)-250:]
}

// reason strips what package os puts around an error: the path is said already.
func reason(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

func join(dir, name string) string {
	if dir == "." {
		return name
	}
	return dir + "/" + name
}

// valid is fs.ValidPath without its demand for UTF-8, which names need not be.
func valid(p string) bool {
	if p == "." {
		return true
	}
	for c := range strings.SplitSeq(p, "/") {
		if c == "" || c == "." || c == ".." {
			return false
		}
	}
	return !strings.ContainsRune(p, 0)
}
