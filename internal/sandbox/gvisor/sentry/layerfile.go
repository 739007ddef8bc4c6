package sentry

import (
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/context"
	"gvisor.dev/gvisor/pkg/errors/linuxerr"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/erofs"
	"gvisor.dev/gvisor/pkg/sentry/kernel/auth"
	"gvisor.dev/gvisor/pkg/sentry/vfs"

	"github.com/kiln-build/kiln/internal/layer"
)

// layerFS is a mounted layer file: its EROFS image, with what gVisor's EROFS
// does not read from the table behind it. The overlay asks it for opaque
// directories, exec for file capabilities, and without the device numbers
// every character device would be a whiteout.
type layerFS struct {
	vfs.FilesystemImpl
	vfsfs   vfs.Filesystem
	xattrs  map[uint64]map[string]string
	devices map[uint64]layer.Device
}

// mountLayer mounts the layer file that descriptor fd is of. It returns the inodes
// of the layer's implied directories, too.
func (g *guest) mountLayer(fd int) (*vfs.Mount, map[uint64]bool, error) {
	l, err := readTable(fd)
	if err != nil {
		return nil, nil, err
	}
	implied := impliedInodes(l.xattrs)
	opts := withData(fmt.Sprintf("ifd=%d", fd))
	opts.ReadOnly = true
	m, err := g.mount(erofs.Name, opts)
	if err != nil || (len(l.xattrs) == 0 && len(l.devices) == 0) {
		return m, implied, err
	}
	l.FilesystemImpl = m.Filesystem().Impl()
	l.vfsfs.Init(g.vfs, m.Filesystem().FilesystemType(), l)
	// The new mount has references of its own; those of m keep the EROFS
	// alive, as long as this process.
	// It is not a read-only mount, for that would forbid writing to a device;
	// files and directories the EROFS keeps from changing.
	return g.vfs.NewDisconnectedMount(&l.vfsfs, m.Root(), &vfs.MountOptions{}), implied, nil
}

func readTable(fd int) (*layerFS, error) {
	// A descriptor of its own, for an os.File closes it in the end, and
	// gVisor takes over the other.
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	f := os.NewFile(uintptr(own), "layer")
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	l := &layerFS{}
	if l.xattrs, err = layer.ReadXattrs(f, fi.Size()); err != nil {
		return nil, err
	}
	l.devices, err = layer.ReadDevices(f, fi.Size())
	return l, err
}

// inode is the inode number of the file at rp.
func (l *layerFS) inode(ctx context.Context, rp *vfs.ResolvingPath) (uint64, error) {
	mnt, creds := rp.Mount(), rp.Credentials()
	d, err := l.GetDentryAt(ctx, rp, vfs.GetDentryOptions{})
	if err != nil {
		return 0, err
	}
	defer d.DecRef(ctx)
	vd := vfs.MakeVirtualDentry(mnt, d)
	st, err := l.vfsfs.VirtualFilesystem().StatAt(ctx, creds, at(vd, ""), &vfs.StatOptions{Mask: linux.STATX_INO})
	return st.Ino, err
}

// StatAt implements vfs.FilesystemImpl.
func (l *layerFS) StatAt(ctx context.Context, rp *vfs.ResolvingPath, opts vfs.StatOptions) (linux.Statx, error) {
	st, err := l.FilesystemImpl.StatAt(ctx, rp, opts)
	if err != nil {
		return st, err
	}
	if d, ok := l.devices[st.Ino]; ok {
		st.RdevMajor, st.RdevMinor = d.Major, d.Minor
	}
	return st, nil
}

// ListXattrAt implements vfs.FilesystemImpl.
func (l *layerFS) ListXattrAt(ctx context.Context, rp *vfs.ResolvingPath, _ uint64) ([]string, error) {
	n, err := l.inode(ctx, rp)
	if err != nil {
		return nil, err
	}
	var names []string
	for name := range l.xattrs[n] {
		names = append(names, name)
	}
	slices.Sort(names)
	return names, nil
}

// GetXattrAt implements vfs.FilesystemImpl.
func (l *layerFS) GetXattrAt(ctx context.Context, rp *vfs.ResolvingPath, opts vfs.GetXattrOptions) (string, error) {
	n, err := l.inode(ctx, rp)
	if err != nil {
		return "", err
	}
	if v, ok := l.xattrs[n][opts.Name]; ok {
		return v, nil
	}
	return "", linuxerr.ENODATA
}

// OpenAt implements vfs.FilesystemImpl. EROFS opens no devices.
func (l *layerFS) OpenAt(ctx context.Context, rp *vfs.ResolvingPath, opts vfs.OpenOptions) (*vfs.FileDescription, error) {
	if len(l.devices) == 0 || !rp.Done() { // the overlay, whose lower this is, has resolved all
		return l.FilesystemImpl.OpenAt(ctx, rp, opts)
	}
	d, err := l.GetDentryAt(ctx, rp, vfs.GetDentryOptions{})
	if err != nil {
		return nil, err
	}
	defer d.DecRef(ctx)
	st, err := l.StatAt(ctx, rp, vfs.StatOptions{Mask: linux.STATX_BASIC_STATS})
	if err != nil {
		return nil, err
	}
	dev, ok := l.devices[st.Ino]
	if !ok {
		return l.FilesystemImpl.OpenAt(ctx, rp, opts)
	}
	// EROFS' own check refuses every write.
	if err := vfs.GenericCheckPermissions(rp.Credentials(), vfs.AccessTypesForOpenFlags(&opts), linux.FileMode(st.Mode), nil, auth.KUID(st.UID), auth.KGID(st.GID)); err != nil {
		return nil, err
	}
	kind := vfs.CharDevice
	if isType(st, linux.S_IFBLK) {
		kind = vfs.BlockDevice
	}
	return l.vfsfs.VirtualFilesystem().OpenDeviceSpecialFile(ctx, rp.Mount(), d, kind, dev.Major, dev.Minor, &opts)
}
