package sentry

import (
	"cmp"
	"fmt"
	"path"
	"slices"

	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/errors/linuxerr"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/overlay"
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

// stackMounts merges the layers of each of the session's mounts, once.
func (g *guest) stackMounts() error {
	for _, m := range g.config.Mounts {
		if len(m.Layers) == 0 {
			g.stacks = append(g.stacks, nil)
			continue
		}
		lowers, err := g.stack(m.Layers)
		if err != nil {
			return fmt.Errorf("mount layers for %q: %w", m.Dest, err)
		}
		s, err := g.mountBelow(lowers)
		if err != nil {
			return fmt.Errorf("mount layers for %q: %w", m.Dest, err)
		}
		for _, l := range lowers {
			l.DecRef(g.ctx) // the overlay has its own
		}
		g.stacks = append(g.stacks, s)
	}
	return nil
}

// newBinds makes what a step sees of the session's mounts, in the order in
// which BuildKit mounts: by destination, so that parents are first.
func (g *guest) newBinds() ([]bind, error) {
	var binds []bind
	for i, m := range g.config.Mounts {
		b := bind{dest: path.Clean("/" + string(m.Dest)), dir: true, size: m.Size, writable: m.Writable}
		if g.stacks[i] != nil {
			var err error
			if b.mount, b.dir, err = g.newBind(g.stacks[i], &m); err != nil {
				return nil, fmt.Errorf("mount %q on %q: %w", m.Source, b.dest, err)
			}
		}
		binds = append(binds, b)
	}
	slices.SortStableFunc(binds, func(a, b bind) int { return cmp.Compare(a.dest, b.dest) })
	return binds, nil
}

// newBind makes a mount of m's source, and says whether it is a directory.
// What a step writes to it goes to an upper layer that nobody else sees.
func (g *guest) newBind(stack *vfs.Mount, m *wire.Mount) (*vfs.Mount, bool, error) {
	if m.Writable {
		upper, err := g.newUpper(rootOf(stack))
		if err != nil {
			return nil, false, err
		}
		defer upper.DecRef(g.ctx)
		stack, err = g.mount(overlay.Name, internal(overlay.FilesystemOptions{
			UpperRoot: rootOf(upper), LowerRoots: rootsOf([]*vfs.Mount{stack}),
		}))
		if err != nil {
			return nil, false, err
		}
		defer stack.DecRef(g.ctx)
	}
	source := follow(rootOf(stack), string(m.Source))
	st, err := g.stat(source)
	if err != nil {
		return nil, false, err
	}
	vd, err := g.vfs.GetDentryAt(g.ctx, g.root, source, &vfs.GetDentryOptions{})
	if err != nil {
		return nil, false, err
	}
	defer vd.DecRef(g.ctx)
	opts := &vfs.MountOptions{ReadOnly: !m.Writable}
	return g.vfs.NewDisconnectedMount(vd.Mount().Filesystem(), vd.Dentry(), opts), isType(st, linux.S_IFDIR), nil
}

// mountBinds mounts the session's mounts, each in what the ones before it made.
func (g *guest) mountBinds(root vfs.VirtualDentry, r *rootfs) error {
	points := r.points[len(r.points)-len(r.binds):]
	for i := range r.binds {
		b, p := &r.binds[i], points[i]
		if err := g.makeNested(root, &p); err != nil {
			return fmt.Errorf("make mount point %q: %w", b.dest, err)
		}
		if b.mount == nil {
			var err error
			if b.mount, err = g.newTmpfs(root, &p, b); err != nil {
				return err
			}
		}
		m := b.mount
		b.mount = nil
		if err := g.connect(root, m, p.path); err != nil {
			return err
		}
	}
	return nil
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
		if n == all && !p.dir {
			return g.writeFile(at(root, p.path), nil, 0o644)
		}
		if err := g.vfs.MkdirAt(g.ctx, g.root, at(root, p.prefix(n)), &vfs.MkdirOptions{Mode: 0o755}); err != nil && !linuxerr.Equals(linuxerr.EEXIST, err) {
			return err
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
