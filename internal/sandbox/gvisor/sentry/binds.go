package sentry

import (
	"cmp"
	"errors"
	"fmt"
	"path"
	"slices"

	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/errors/linuxerr"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/tmpfs"
	"gvisor.dev/gvisor/pkg/sentry/vfs"

	"github.com/kiln-build/kiln/internal/sandbox/gvisor/wire"
)

// bind is one of the session's mounts in one step.
type bind struct {
	dest  string // as asked for
	dir   bool
	mount *vfs.Mount // of what is shown, not connected yet; nil for a tmpfs
	// Of a tmpfs.
	size     int64
	writable bool
}

// mountError says that one of the things that are mounted cannot be.
type mountError struct{ dest, reason string }

func (e *mountError) Error() string { return fmt.Sprintf("mount on %q: %s", e.dest, e.reason) }

// cannotMount makes of err one about the place dest, unless it is one already.
func cannotMount(dest string, err error) error {
	var m *mountError
	if err == nil || errors.As(err, &m) {
		return err
	}
	return &mountError{dest, err.Error()}
}

// newBinds makes what a step sees of the session's mounts, in the order in
// which BuildKit mounts: by destination, so that parents are first.
func (g *guest) newBinds(r *rootfs) error {
	for i := range g.config.Mounts {
		m := &g.config.Mounts[i]
		b := bind{dest: path.Clean("/" + string(m.Dest)), dir: true, size: m.Size, writable: m.Writable}
		var err error
		switch m.Kind {
		case wire.KindVolume:
			b.mount, b.dir, err = g.showVolume(&r.volumes[m.Volume], m)
		case wire.KindFile:
			b.dir = false
			b.mount, err = g.newFile(m)
		case wire.KindSocket:
			b.dir = false
			var l *listener
			if b.mount, l, err = g.newSocket(i, m); err == nil {
				r.listeners = append(r.listeners, l)
			}
		case wire.KindTmpfs:
		default:
			err = fmt.Errorf("a mount of the unknown kind %q", m.Kind)
		}
		if err != nil {
			return cannotMount(b.dest, err)
		}
		r.binds = append(r.binds, b)
	}
	slices.SortStableFunc(r.binds, func(a, b bind) int { return cmp.Compare(a.dest, b.dest) })
	return nil
}

// showVolume makes a mount of m's source in its volume, and says whether it is a directory.
func (g *guest) showVolume(v *volume, m *wire.Mount) (*vfs.Mount, bool, error) {
	source := follow(rootOf(v.merged), string(m.Source))
	st, err := g.stat(source)
	if isMissing(err) {
		err = fmt.Errorf("there is no %q in what is to be mounted", m.Source)
	}
	if err != nil {
		return nil, false, err
	}
	mnt, err := g.show(source, &vfs.MountOptions{ReadOnly: !m.Writable})
	return mnt, isType(st, linux.S_IFDIR), err
}

// newFile makes a mount of a read-only file that is in memory. It is shown through an
// overlay, for a tmpfs lets its owner change a file's mode and length though the mount is read-only.
func (g *guest) newFile(m *wire.Mount) (*vfs.Mount, error) {
	dir, err := g.mount(tmpfs.Name, withData("mode=0755"))
	if err != nil {
		return nil, err
	}
	defer dir.DecRef(g.ctx)
	const name = "file"
	if err := g.writeFile(at(rootOf(dir), name), m.Content, 0); err != nil {
		return nil, err
	}
	if err := g.setOwner(at(rootOf(dir), name), m); err != nil {
		return nil, err
	}
	merged, err := g.mountBelow(append([]*vfs.Mount{dir}, g.empty...))
	if err != nil {
		return nil, err
	}
	defer merged.DecRef(g.ctx)
	opts := &vfs.MountOptions{ReadOnly: true}
	opts.Flags.NoSUID = true
	opts.Flags.NoExec = m.Mode&0o111 == 0
	return g.show(at(rootOf(merged), name), opts)
}

// show makes a mount of one file or directory of a file system.
func (g *guest) show(p *vfs.PathOperation, opts *vfs.MountOptions) (*vfs.Mount, error) {
	vd, err := g.vfs.GetDentryAt(g.ctx, g.root, p, &vfs.GetDentryOptions{})
	if err != nil {
		return nil, err
	}
	defer vd.DecRef(g.ctx)
	return g.vfs.NewDisconnectedMount(vd.Mount().Filesystem(), vd.Dentry(), opts), nil
}

// setOwner gives a file the owner and permissions that m says.
func (g *guest) setOwner(p *vfs.PathOperation, m *wire.Mount) error {
	return g.vfs.SetStatAt(g.ctx, g.root, p, &vfs.SetStatOptions{Stat: linux.Statx{
		Mask: linux.STATX_MODE | linux.STATX_UID | linux.STATX_GID,
		Mode: uint16(m.Mode & 0o777), UID: m.UID, GID: m.GID,
	}})
}

// mountBinds mounts the session's mounts, each in what the ones before it made.
func (g *guest) mountBinds(root vfs.VirtualDentry, r *rootfs) error {
	points := r.points[len(r.points)-len(r.binds):]
	for i := range r.binds {
		if err := g.mountBind(root, &r.binds[i], points[i]); err != nil {
			return cannotMount(r.binds[i].dest, err)
		}
	}
	return nil
}

func (g *guest) mountBind(root vfs.VirtualDentry, b *bind, p mountPoint) error {
	if err := g.makeNested(root, &p); err != nil {
		return err
	}
	if b.mount == nil {
		var err error
		if b.mount, err = g.newTmpfs(root, &p, b); err != nil {
			return err
		}
	}
	m := b.mount
	b.mount = nil
	return g.connect(root, m, p.path)
}

// makeNested finds the place of a mount if it is in another, and makes what is
// missing of it there, as runc does.
func (g *guest) makeNested(root vfs.VirtualDentry, p *mountPoint) error {
	if !p.nested {
		return nil
	}
	p.nested = false
	if err := g.resolvePoint(root, p, nil); err != nil {
		return err
	}
	all := len(p.components())
	for n := p.have + 1; n <= all; n++ {
		var err error
		if n == all && !p.dir {
			err = g.writeFile(at(root, p.path), nil, 0o644)
		} else {
			err = g.vfs.MkdirAt(g.ctx, g.root, at(root, p.prefix(n)), &vfs.MkdirOptions{Mode: 0o755})
		}
		if err != nil && !linuxerr.Equals(linuxerr.EEXIST, err) {
			return fmt.Errorf("make %q: %w", p.prefix(n), err)
		}
	}
	return nil
}

// newTmpfs makes an empty directory, with the mode of the one that it hides, as runc does.
func (g *guest) newTmpfs(root vfs.VirtualDentry, p *mountPoint, b *bind) (*vfs.Mount, error) {
	data := "mode=1777"
	if p.have == len(p.components()) {
		st, err := g.stat(at(root, p.path))
		if err != nil {
			return nil, err
		}
		data = fmt.Sprintf("mode=%04o", st.Mode&^linux.S_IFMT)
	}
	if b.size > 0 {
		data += fmt.Sprintf(",size=%d", b.size)
	}
	opts := withData(data)
	opts.ReadOnly = !b.writable
	opts.Flags.NoSUID = true
	return g.mount(tmpfs.Name, opts)
}
