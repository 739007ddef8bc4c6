package sentry

import (
	"fmt"

	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/context"
	"gvisor.dev/gvisor/pkg/errors/linuxerr"
	"gvisor.dev/gvisor/pkg/fspath"
	"gvisor.dev/gvisor/pkg/sentry/vfs"
	"gvisor.dev/gvisor/pkg/usermem"
)

// at is path below vd, its last component not followed if it is a symbolic link.
func at(vd vfs.VirtualDentry, path string) *vfs.PathOperation {
	return &vfs.PathOperation{Root: vd, Start: vd, Path: fspath.Parse(path)}
}

// follow is path below vd with all symbolic links followed.
func follow(vd vfs.VirtualDentry, path string) *vfs.PathOperation {
	p := at(vd, path)
	p.FollowFinalSymlink = true
	return p
}

func rootOf(m *vfs.Mount) vfs.VirtualDentry { return vfs.MakeVirtualDentry(m, m.Root()) }

func rootsOf(ms []*vfs.Mount) []vfs.VirtualDentry {
	r := make([]vfs.VirtualDentry, len(ms))
	for i, m := range ms {
		r[i] = rootOf(m)
	}
	return r
}

func internal(data any) vfs.MountOptions {
	return vfs.MountOptions{GetFilesystemOptions: vfs.GetFilesystemOptions{InternalData: data}}
}

func withData(data string) vfs.MountOptions {
	return vfs.MountOptions{GetFilesystemOptions: vfs.GetFilesystemOptions{Data: data}}
}

// mount makes a mount that is not connected to anything yet. The caller holds
// its reference.
func (g *guest) mount(fs string, opts vfs.MountOptions) (*vfs.Mount, error) {
	return g.mountFor(g.ctx, fs, opts)
}

// mountFor is mount for a process whose context is ctx: proc shows its PID
// namespace, mqueue the queues of its IPC namespace.
func (g *guest) mountFor(ctx context.Context, fs string, opts vfs.MountOptions) (*vfs.Mount, error) {
	opts.GetFilesystemOptions.InternalMount = true
	m, err := g.vfs.MountDisconnected(ctx, g.root, fs, fs, &opts)
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", fs, err)
	}
	return m, nil
}

// stat is lstat(2).
func (g *guest) stat(p *vfs.PathOperation) (linux.Statx, error) {
	return g.vfs.StatAt(g.ctx, g.root, p, &vfs.StatOptions{Mask: linux.STATX_ALL})
}

func isType(st linux.Statx, t uint16) bool { return st.Mode&linux.S_IFMT == t }

func isMissing(err error) bool { return linuxerr.Equals(linuxerr.ENOENT, err) }

// writeFile creates a file with a content.
func (g *guest) writeFile(p *vfs.PathOperation, b []byte, mode linux.FileMode) error {
	fd, err := g.vfs.OpenAt(g.ctx, g.root, p, &vfs.OpenOptions{Flags: linux.O_WRONLY | linux.O_CREAT, Mode: mode})
	if err != nil {
		return err
	}
	defer fd.DecRef(g.ctx)
	for len(b) > 0 {
		n, err := fd.Write(g.ctx, usermem.BytesIOSequence(b), vfs.WriteOptions{})
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// copyAttributes gives the directory at to what the directory at from has:
// owner, mode, time and extended attributes, but not whether it is opaque.
func (g *guest) copyAttributes(to, from *vfs.PathOperation) error {
	const mask = linux.STATX_UID | linux.STATX_GID | linux.STATX_MODE | linux.STATX_MTIME
	st, err := g.stat(from)
	if err != nil {
		return err
	}
	st.Mask = mask
	st.Mode &^= linux.S_IFMT
	xattrs, err := g.xattrs(from)
	if err != nil {
		return err
	}
	for name, value := range xattrs {
		if isOverlayXattr(name) {
			continue
		}
		if err := g.vfs.SetXattrAt(g.ctx, g.root, to, &vfs.SetXattrOptions{Name: name, Value: value}); err != nil {
			return err
		}
	}
	return g.vfs.SetStatAt(g.ctx, g.root, to, &vfs.SetStatOptions{Stat: st})
}
