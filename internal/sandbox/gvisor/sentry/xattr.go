package sentry

import (
	"slices"
	"strings"

	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/context"
	"gvisor.dev/gvisor/pkg/errors/linuxerr"
	"gvisor.dev/gvisor/pkg/sentry/vfs"
)

func isOverlayXattr(name string) bool { return strings.HasPrefix(name, "trusted.overlay.") }

// xattrs reads all extended attributes of a file.
func (g *guest) xattrs(p *vfs.PathOperation) (map[string]string, error) {
	names, err := g.vfs.ListXattrAt(g.ctx, g.root, p, 0)
	if linuxerr.Equals(linuxerr.EOPNOTSUPP, err) {
		return nil, nil
	}
	if err != nil || len(names) == 0 {
		return nil, err
	}
	r := make(map[string]string, len(names))
	for _, n := range names {
		v, err := g.vfs.GetXattrAt(g.ctx, g.root, p, &vfs.GetXattrOptions{Name: n})
		if err != nil {
			return nil, err
		}
		r[n] = v
	}
	return r, nil
}

// xattrTable is the extended attributes of a layer file by inode number.
type xattrTable map[uint64]map[string]string

// layerFS is a mounted EROFS with the extended attributes that gVisor's EROFS
// cannot read, from the layer file's own table. The overlay asks it for opaque
// directories and exec for file capabilities.
type layerFS struct {
	vfs.FilesystemImpl
	vfsfs vfs.Filesystem
	table xattrTable
}

// withXattrs returns m with the attributes of t. It takes over the reference to m.
func (g *guest) withXattrs(m *vfs.Mount, t xattrTable) *vfs.Mount {
	if len(t) == 0 {
		return m
	}
	l := &layerFS{FilesystemImpl: m.Filesystem().Impl(), table: t}
	l.vfsfs.Init(g.vfs, m.Filesystem().FilesystemType(), l)
	// The new mount takes a reference to the file system and to the root of
	// its own; m's references keep the EROFS alive for the session.
	return g.vfs.NewDisconnectedMount(&l.vfsfs, m.Root(), &vfs.MountOptions{ReadOnly: true})
}

func (l *layerFS) lookup(ctx context.Context, rp *vfs.ResolvingPath) (map[string]string, error) {
	mnt, creds := rp.Mount(), rp.Credentials()
	d, err := l.GetDentryAt(ctx, rp, vfs.GetDentryOptions{})
	if err != nil {
		return nil, err
	}
	defer d.DecRef(ctx)
	vd := vfs.MakeVirtualDentry(mnt, d)
	st, err := l.vfsfs.VirtualFilesystem().StatAt(ctx, creds, at(vd, ""), &vfs.StatOptions{Mask: linux.STATX_INO})
	if err != nil {
		return nil, err
	}
	return l.table[st.Ino], nil
}

// ListXattrAt implements vfs.FilesystemImpl.
func (l *layerFS) ListXattrAt(ctx context.Context, rp *vfs.ResolvingPath, _ uint64) ([]string, error) {
	xattrs, err := l.lookup(ctx, rp)
	var names []string
	for n := range xattrs {
		names = append(names, n)
	}
	slices.Sort(names)
	return names, err
}

// GetXattrAt implements vfs.FilesystemImpl.
func (l *layerFS) GetXattrAt(ctx context.Context, rp *vfs.ResolvingPath, opts vfs.GetXattrOptions) (string, error) {
	xattrs, err := l.lookup(ctx, rp)
	if err != nil {
		return "", err
	}
	if v, ok := xattrs[opts.Name]; ok {
		return v, nil
	}
	return "", linuxerr.ENODATA
}
