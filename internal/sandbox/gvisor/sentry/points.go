package sentry

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/context"
	"gvisor.dev/gvisor/pkg/errors/linuxerr"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/nsfs"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/tmpfs"
	"gvisor.dev/gvisor/pkg/sentry/kernel"
	"gvisor.dev/gvisor/pkg/sentry/vfs"

	"github.com/kiln-build/kiln/internal/sandbox/gvisor/wire"
)

// mountPoint is where something is mounted for a step.
type mountPoint struct {
	wanted string // as asked for
	path   string // with symbolic links resolved, within the image
	dir    bool
	// content is what a supplied file shows.
	content []byte
	// bind: it is for one of the session's own mounts.
	bind bool
	// have is how many components of path the image has.
	have int
	// nested: it is in what will be mounted on an earlier point, so that it is
	// looked for, and made, when that is there.
	nested bool
}

func (p mountPoint) components() []string {
	return strings.Split(strings.TrimPrefix(p.path, "/"), "/")
}

// prefix is the first n components of the path.
func (p mountPoint) prefix(n int) string { return "/" + path.Join(p.components()[:n]...) }

// resolvePoints finds the places for all that is mounted, in the order in which
// it will be.
func (g *guest) resolvePoints(below vfs.VirtualDentry, binds []bind) ([]mountPoint, error) {
	var points []mountPoint
	for _, d := range []string{"/proc", "/sys", "/dev"} {
		points = append(points, mountPoint{wanted: d, dir: true})
	}
	for _, f := range g.config.Files {
		points = append(points, mountPoint{wanted: path.Clean("/" + string(f.Path)), content: f.Content})
	}
	for _, b := range binds {
		points = append(points, mountPoint{wanted: b.dest, dir: b.dir, bind: true})
	}
	for i := range points {
		earlier := points[:i]
		if points[i].dir && !points[i].bind {
			earlier = nil // the kernel's own do not depend on each other
		}
		if err := g.resolvePoint(below, &points[i], earlier); err != nil {
			return nil, cannotMount(points[i].wanted, err)
		}
	}
	return points, nil
}

// resolvePoint follows the symbolic links of an image, as runc does for a
// mount: within the image, and what is missing counts as a directory to be made.
// It goes no further than to a point among earlier.
func (g *guest) resolvePoint(below vfs.VirtualDentry, p *mountPoint, earlier []mountPoint) error {
	todo := strings.Split(strings.TrimPrefix(p.wanted, "/"), "/")
	var done []string
	missing := false
	p.have = 0
	for links := 0; ; {
		if at := "/" + path.Join(done...); slices.ContainsFunc(earlier, func(e mountPoint) bool { return !e.nested && e.path == at }) {
			p.nested = true
			return nil
		}
		if len(todo) == 0 {
			break
		}
		name := todo[0]
		todo = todo[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			done = done[:max(len(done)-1, 0)]
			p.have = min(p.have, len(done))
			missing = false // what is left of the path exists, if it did
			continue
		}
		next := append(slices.Clip(done), name)
		if missing = missing || p.have < len(done); missing {
			done = next
			continue
		}
		full := "/" + path.Join(next...)
		st, err := g.stat(at(below, full))
		if isMissing(err) {
			done = next
			continue
		}
		if err != nil {
			return err
		}
		if isType(st, linux.S_IFLNK) {
			if links++; links > linux.MaxSymlinkTraversals {
				return linuxerr.ELOOP
			}
			target, err := g.vfs.ReadlinkAt(g.ctx, g.root, at(below, full))
			if err != nil {
				return err
			}
			if path.IsAbs(target) {
				done, p.have = nil, 0
			}
			todo = append(strings.Split(target, "/"), todo...)
			continue
		}
		if isDir, wantDir := isType(st, linux.S_IFDIR), p.dir || hasName(todo); isDir != wantDir {
			return wrongKind(full, isDir, hasName(todo))
		}
		done, p.have = next, len(next)
	}
	if len(done) == 0 {
		return errors.New("nothing can be mounted over the root")
	}
	p.path = "/" + path.Join(done...)
	return nil
}

// wrongKind says that what is at a path of the image does not fit what is to be mounted.
func wrongKind(full string, isDir, isParent bool) error {
	switch {
	case isDir:
		return fmt.Errorf("%q is a directory in the image, and a file is to be mounted there", full)
	case isParent:
		return fmt.Errorf("%q is not a directory in the image", full)
	}
	return fmt.Errorf("%q is not a directory in the image, and a directory is to be mounted there", full)
}

// hasName reports whether a component is left to go to.
func hasName(todo []string) bool {
	return slices.ContainsFunc(todo, func(s string) bool { return s != "" && s != "." })
}

// newSkeleton makes a layer with just the missing mount points and their
// directories, those that the image has with the image's attributes.
func (g *guest) newSkeleton(below vfs.VirtualDentry, points []mountPoint) (*vfs.Mount, error) {
	m, err := g.mount(tmpfs.Name, withData("mode=0755"))
	if err != nil {
		return nil, err
	}
	type existing struct{ path string }
	var mirrored []existing
	for _, p := range points {
		all := len(p.components())
		if p.have == all || p.nested {
			continue
		}
		for n := 1; n <= all; n++ {
			if n == all && !p.dir {
				if err := g.writeFile(at(rootOf(m), p.path), nil, 0o644); err != nil {
					return nil, err
				}
				continue
			}
			err := g.vfs.MkdirAt(g.ctx, g.root, at(rootOf(m), p.prefix(n)), &vfs.MkdirOptions{Mode: 0o755})
			if linuxerr.Equals(linuxerr.EEXIST, err) {
				continue
			}
			if err != nil {
				return nil, err
			}
			if n <= p.have {
				mirrored = append(mirrored, existing{p.prefix(n)})
			}
		}
	}
	// The deepest first, as making an entry touches its directory.
	slices.Reverse(mirrored)
	for _, e := range append(mirrored, existing{"/"}) {
		if err := g.copyAttributes(at(rootOf(m), e.path), at(below, e.path)); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// recordPoints copies the directories that were missing up into the layer, for
// BuildKit leaves /proc, /sys and /dev in it as well. It removes what else it made for mounts.
func (g *guest) recordPoints(merged vfs.VirtualDentry, points []mountPoint) error {
	for _, p := range points {
		if !p.dir || p.bind {
			continue
		}
		for n := p.have + 1; n <= len(p.components()); n++ {
			opts := &vfs.SetStatOptions{Stat: linux.Statx{Mask: linux.STATX_MODE, Mode: 0o755}}
			if err := g.vfs.SetStatAt(g.ctx, g.root, at(merged, p.prefix(n)), opts); err != nil {
				return err
			}
		}
	}
	return nil
}

// removeStubs removes from the upper layer what is there of the mount points that were made
// for the step, if nothing was put into them: a failed rm or mv of a mount point copies it up, as
// does a chmod of its directory. BuildKit removes the same.
func (g *guest) removeStubs(upper vfs.VirtualDentry, points []mountPoint) error {
	for _, p := range points {
		if p.dir && !p.bind || p.nested {
			continue
		}
		for n := len(p.components()); n > p.have; n-- {
			if removed, err := g.removeStub(upper, path.Dir(p.prefix(n)), path.Base(p.prefix(n))); err != nil || !removed {
				if err != nil {
					return err
				}
				break
			}
		}
	}
	return nil
}

// removeStub removes an empty file or directory, and keeps the time of the directory that it is in.
func (g *guest) removeStub(upper vfs.VirtualDentry, dir, name string) (bool, error) {
	full := at(upper, path.Join(dir, name))
	st, err := g.stat(full)
	if isMissing(err) {
		return true, nil // it was not copied up
	}
	if err != nil {
		return false, err
	}
	was, err := g.stat(at(upper, dir))
	if err != nil {
		return false, err
	}
	switch {
	case isType(st, linux.S_IFDIR):
		err = g.vfs.RmdirAt(g.ctx, g.root, full)
	case isType(st, linux.S_IFREG) && st.Size == 0:
		err = g.vfs.UnlinkAt(g.ctx, g.root, full)
	default:
		return false, nil
	}
	if linuxerr.Equals(linuxerr.ENOTEMPTY, err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	was.Mask = linux.STATX_MTIME
	return true, g.vfs.SetStatAt(g.ctx, g.root, at(upper, dir), &vfs.SetStatOptions{Stat: was})
}

// mountFiles mounts the supplied files.
func (g *guest) mountFiles(root vfs.VirtualDentry, points []mountPoint) error {
	for _, p := range points {
		if p.dir || p.bind {
			continue
		}
		f, err := g.newFile(&wire.Mount{Content: p.content, Mode: 0o644})
		if err != nil {
			return fmt.Errorf("write %q: %w", p.wanted, err)
		}
		if err := g.makeNested(root, &p); err != nil {
			f.DecRef(g.ctx)
			return cannotMount(p.wanted, err)
		}
		if err := g.connect(root, f, p.path); err != nil {
			return err
		}
	}
	return nil
}

// namespaceInode is the inode that counts ns' references.
func namespaceInode(ctx context.Context, k *kernel.Kernel, ns vfs.Namespace) *nsfs.Inode {
	// The kernel's own way returns an interface; what it makes is an nsfs inode.
	inode, _ := k.GetNamespaceInode(ctx, ns).(*nsfs.Inode)
	return inode
}
