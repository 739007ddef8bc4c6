package local

import (
	"errors"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/internal/source/statcache"
	"github.com/kiln-build/kiln/internal/tree"
)

// hidden reports whether a file is not part of the tree.
func hidden(st *unix.Stat_t) bool {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFSOCK:
		return true
	case unix.S_IFCHR:
		return st.Rdev == 0
	}
	return false
}

func (t *Tree) node(st *unix.Stat_t) tree.Node {
	n := tree.Node{Mode: st.Mode & (tree.ModeType | tree.ModePerm), MTime: time.Unix(st.Mtim.Unix())}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		n.Size = st.Size
	case unix.S_IFBLK, unix.S_IFCHR:
		n.Major, n.Minor = unix.Major(st.Rdev), unix.Minor(st.Rdev)
	}
	// Inodes are unique in one file system only; files of another one that is
	// mounted below are taken as not linked.
	if !n.IsDir() && st.Nlink > 1 && st.Dev == t.rootID.dev {
		n.Inode, n.Nlink = st.Ino, uint32(min(st.Nlink, 1<<31))
	}
	return n
}

// rootNode is the same for every directory: what mode and attributes the place
// has where a context happens to lie is not part of the context.
func rootNode(st *unix.Stat_t) tree.Node {
	return tree.Node{Mode: tree.ModeDir | 0o755, MTime: time.Unix(st.Mtim.Unix())}
}

func sigOf(st *unix.Stat_t) statcache.Sig {
	return statcache.Sig{
		Dev: st.Dev, Ino: st.Ino, Size: st.Size,
		MTime: st.Mtim.Nano(), CTime: st.Ctim.Nano(),
	}
}

func fdPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// xattrs reads the attributes that belong to a file rather than to its host.
// path begins with /proc/self/fd/N, so that nothing but the last component is
// looked up by name; follow if there is none but N, a link to the file itself.
func (t *Tree) xattrs(path string, follow bool) (map[string]string, error) {
	if !t.statPath {
		return nil, nil
	}
	list, get := unix.Llistxattr, unix.Lgetxattr
	if follow {
		list, get = unix.Listxattr, unix.Getxattr
	}
	names, err := grown(func(b []byte) (int, error) { return list(path, b) })
	switch {
	case errors.Is(err, unix.ENOTSUP), errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return nil, nil
	case err != nil:
		return nil, err
	}
	var m map[string]string
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names), "\x00"), "\x00") {
		if name != "security.capability" && !strings.HasPrefix(name, "user.") {
			continue
		}
		v, err := grown(func(b []byte) (int, error) { return get(path, name, b) })
		if err != nil {
			continue // removed since, or not for us to read: as Docker's client does
		}
		if m == nil {
			m = map[string]string{}
		}
		m[name] = string(v)
	}
	return m, nil
}

// grown calls a system call that fills a buffer with one large enough. The
// kernel's limit for names and for one value is 64 KiB.
func grown(call func([]byte) (int, error)) ([]byte, error) {
	var small [256]byte
	n, err := retry(func() (int, error) { return call(small[:]) })
	if err == nil {
		return append([]byte(nil), small[:n]...), nil
	}
	if !errors.Is(err, unix.ERANGE) {
		return nil, err
	}
	b := make([]byte, 64<<10)
	n, err = retry(func() (int, error) { return call(b) })
	if err != nil {
		return nil, err
	}
	return append([]byte(nil), b[:n]...), nil
}
