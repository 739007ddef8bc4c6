package rootfs

import (
	"errors"
	"io/fs"
	"path"
	"strings"
	"syscall"

	"github.com/kiln-build/kiln/internal/tree"
)

const (
	// maxLinks is how many symbolic links Linux follows for one path.
	maxLinks = 40
	// maxUnresolved bounds a path, and what links may make of it: above
	// Linux's PATH_MAX, far below what a hostile layer could ask for.
	maxUnresolved = 8 << 10
)

// Resolve follows the symbolic links in p inside t, as a process whose root
// directory is t's root would: an absolute target starts at that root, and ".."
// never leaves it. last says whether a link as the last component is followed
// too. The result is a path for t with no link in it (but the last, without
// last), and exists. Errors are fs.PathErrors with Linux's numbers: ENOENT
// (errors.Is fs.ErrNotExist), ENOTDIR, ELOOP after 40 links.
func Resolve(t tree.Tree, p string, last bool) (string, error) {
	return resolver{t: t, op: "stat", root: "."}.run(p, last)
}

// ResolveNew is Resolve for a path that need not exist yet, in any component,
// as the destination of a COPY is resolved: a missing component counts as a
// directory that will be made, so the target of a dangling link is where it
// points to. A component that is neither directory nor link is ENOTDIR if
// something follows it.
func ResolveNew(t tree.Tree, p string, last bool) (string, error) {
	return resolver{t: t, op: "lstat", root: ".", missing: true}.run(p, last)
}

// ResolveBelow is ResolveNew with the directory root of t, itself without links,
// as the root that p and links in it cannot leave: what a process after
// chroot(root) finds. p and the result are relative to t's root and root
// respectively: the result is again a path of t.
func ResolveBelow(t tree.Tree, root, p string, last bool) (string, error) {
	return resolver{t: t, op: "lstat", root: root, missing: true}.run(p, last)
}

type resolver struct {
	t       tree.Tree
	op      string
	root    string
	missing bool // missing components are allowed
}

func (r resolver) fail(p string, err error) error {
	return &fs.PathError{Op: r.op, Path: path.Clean("/" + p), Err: err}
}

// run walks p component by component; cur has no link in it. cur is relative
// to r.root, "" is that root.
func (r resolver) run(p string, last bool) (string, error) {
	if len(p) > maxUnresolved {
		return "", r.fail(p[:64]+"...", syscall.ENAMETOOLONG)
	}
	rest, cur, links := p, "", 0
	gone := false // cur does not exist
	for rest != "" {
		name, after, _ := strings.Cut(rest, "/")
		rest = strings.TrimLeft(after, "/")
		switch name {
		case "", ".":
			continue
		case "..":
			cur = strings.TrimPrefix(path.Dir("/"+cur), "/")
			gone = false
			continue
		}
		next := path.Join(cur, name)
		if gone {
			cur = next
			continue
		}
		n, err := r.t.Lstat(path.Join(r.root, next))
		switch {
		case errors.Is(err, fs.ErrNotExist) && r.missing:
			cur, gone = next, true
		case errors.Is(err, fs.ErrNotExist):
			return "", r.fail(p, syscall.ENOENT)
		case err != nil:
			return "", err
		case n.IsSymlink() && (last || rest != ""):
			if links++; links > maxLinks {
				return "", r.fail(p, syscall.ELOOP)
			}
			target, err := r.t.Readlink(path.Join(r.root, next))
			if err != nil {
				return "", err
			}
			if len(target)+1+len(rest) > maxUnresolved {
				return "", r.fail(p, syscall.ENAMETOOLONG)
			}
			if strings.HasPrefix(target, "/") {
				cur = ""
			}
			if rest != "" {
				target += "/" + rest
			}
			rest = target
		case !n.IsDir() && rest != "":
			return "", r.fail(p, syscall.ENOTDIR)
		default:
			cur = next
		}
	}
	return path.Join(r.root, cur), nil
}
