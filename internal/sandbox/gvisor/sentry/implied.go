package sentry

import (
	"path"
	"slices"

	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/context"
	"gvisor.dev/gvisor/pkg/sentry/kernel/auth"
	"gvisor.dev/gvisor/pkg/sentry/vfs"

	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/tree"
)

// impliedFS is a layer as it looks on top of others. Of a directory that the layer's tar
// had files in, but no entry for (layer.XattrImplied), the layer knows nothing: it shows the
// owner, mode, times and attributes that the layers below have. An overlay would take the topmost layer's.
type impliedFS struct {
	vfs.FilesystemImpl // the layer
	vfsfs              vfs.Filesystem
	layer              vfs.VirtualDentry // its root, without this
	below              vfs.VirtualDentry // the layers below, merged
	creds              *auth.Credentials
	inodes             map[uint64]bool // of the layer's implied directories
}

// onTop is layer n as it looks on top of lowers. The caller holds a reference to the result.
func (g *guest) onTop(n int, lowers []*vfs.Mount) (*vfs.Mount, error) {
	m := g.layers[n]
	if len(g.implied[n]) == 0 {
		m.IncRef()
		return m, nil
	}
	below, err := g.mountBelow(lowers)
	if err != nil {
		return nil, err
	}
	// References to below and m are held as long as this process lives.
	m.IncRef()
	i := &impliedFS{
		FilesystemImpl: m.Filesystem().Impl(), layer: rootOf(m), below: rootOf(below), creds: g.root, inodes: g.implied[n],
	}
	i.vfsfs.Init(g.vfs, m.Filesystem().FilesystemType(), i)
	return g.vfs.NewDisconnectedMount(&i.vfsfs, m.Root(), &vfs.MountOptions{}), nil
}

// impliedInodes are the implied directories in a layer's table.
func impliedInodes(xattrs map[uint64]map[string]string) map[uint64]bool {
	r := map[uint64]bool{}
	for n, x := range xattrs {
		if x[layer.XattrImplied] == "y" {
			r[n] = true
		}
	}
	return r
}

// known finds the directory that rp is at in the layers below, if the layer itself knows nothing
// of it. Only what an overlay asks is answered so: it has resolved the path already.
func (i *impliedFS) known(ctx context.Context, rp *vfs.ResolvingPath) (*vfs.PathOperation, linux.Statx, bool) {
	if !rp.Done() {
		return nil, linux.Statx{}, false
	}
	v := i.vfsfs.VirtualFilesystem()
	here := vfs.MakeVirtualDentry(i.layer.Mount(), rp.Start())
	st, err := v.StatAt(ctx, i.creds, at(here, ""), &vfs.StatOptions{Mask: linux.STATX_INO})
	if err != nil || !i.inodes[st.Ino] {
		return nil, st, false
	}
	name, err := v.PathnameInFilesystem(ctx, here)
	if err != nil {
		return nil, st, false
	}
	// Of what is in a directory that hides those below it, they say nothing.
	for dir := path.Dir(name); dir != "/"; dir = path.Dir(dir) {
		opaque, err := v.GetXattrAt(ctx, i.creds, at(i.layer, dir), &vfs.GetXattrOptions{Name: tree.XattrOpaque})
		if err == nil && opaque == "y" {
			return nil, st, false
		}
	}
	p := at(i.below, name)
	st, err = v.StatAt(ctx, i.creds, p, &vfs.StatOptions{Mask: linux.STATX_ALL})
	return p, st, err == nil && isType(st, linux.S_IFDIR)
}

// StatAt implements vfs.FilesystemImpl.
func (i *impliedFS) StatAt(ctx context.Context, rp *vfs.ResolvingPath, opts vfs.StatOptions) (linux.Statx, error) {
	_, known, ok := i.known(ctx, rp)
	st, err := i.FilesystemImpl.StatAt(ctx, rp, opts)
	if ok {
		st.Mode, st.UID, st.GID = known.Mode, known.UID, known.GID
		st.Atime, st.Mtime, st.Ctime = known.Atime, known.Mtime, known.Ctime
	}
	return st, err
}

// ListXattrAt implements vfs.FilesystemImpl.
func (i *impliedFS) ListXattrAt(ctx context.Context, rp *vfs.ResolvingPath, size uint64) ([]string, error) {
	p, _, ok := i.known(ctx, rp)
	own, err := i.FilesystemImpl.ListXattrAt(ctx, rp, size)
	if !ok || err != nil {
		return own, err
	}
	names, err := i.vfsfs.VirtualFilesystem().ListXattrAt(ctx, i.creds, p, size)
	return slices.Concat(own, names), err
}

// GetXattrAt implements vfs.FilesystemImpl.
func (i *impliedFS) GetXattrAt(ctx context.Context, rp *vfs.ResolvingPath, opts vfs.GetXattrOptions) (string, error) {
	if !isOverlayXattr(opts.Name) {
		if p, _, ok := i.known(ctx, rp); ok {
			return i.vfsfs.VirtualFilesystem().GetXattrAt(ctx, i.creds, p, &opts)
		}
	}
	return i.FilesystemImpl.GetXattrAt(ctx, rp, opts)
}
