package sentry

import (
	"fmt"

	"gvisor.dev/gvisor/pkg/context"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/dev"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/devpts"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/mqfs"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/overlay"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/proc"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/sys"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/tmpfs"
	"gvisor.dev/gvisor/pkg/sentry/kernel"
	"gvisor.dev/gvisor/pkg/sentry/vfs"
)

// rootfs is the file system of one step.
type rootfs struct {
	// below is all that was there before, merged and without what is mounted
	// for the step.
	below *vfs.Mount
	// upper takes the changes.
	upper *vfs.Mount
	// points are the resolved places of mounts.
	points []mountPoint
	// merged is what the step sees, before anything is mounted in it.
	merged *vfs.Mount
	// volumes are the session's, made for this step; nil once they are the guest's.
	volumes []volume
	// binds are the session's mounts, made for this step; nil once connected.
	binds []bind
	// listeners are what the sentry listens on.
	listeners []*listener
}

// newRootfs stacks a new upper layer on the lower ones. Between them goes a
// skeleton that has just the mount points that are missing: were they made in
// the overlay they would be copied up, and be part of the layer.
func (g *guest) newRootfs() (_ *rootfs, err error) {
	below, err := g.mountBelow(g.lowers)
	if err != nil {
		return nil, err
	}
	r := &rootfs{below: below}
	defer func() {
		if err != nil {
			g.release(r)
		}
	}()
	if err := g.newVolumes(r); err != nil {
		return nil, err
	}
	if err := g.newBinds(r); err != nil {
		return nil, err
	}
	if r.points, err = g.resolvePoints(rootOf(below), r.binds); err != nil {
		return nil, err
	}
	skeleton, err := g.newSkeleton(rootOf(below), r.points)
	if err != nil {
		return nil, fmt.Errorf("make mount points: %w", err)
	}
	if r.upper, err = g.newUpper(rootOf(below)); err != nil {
		return nil, err
	}
	lowers := append([]*vfs.Mount{skeleton}, g.lowers...)
	r.merged, err = g.mount(overlay.Name, internal(overlay.FilesystemOptions{
		UpperRoot: rootOf(r.upper), LowerRoots: rootsOf(lowers),
	}))
	skeleton.DecRef(g.ctx)
	if err != nil {
		return nil, err
	}
	if err := g.recordPoints(rootOf(r.merged), r.points); err != nil {
		return nil, fmt.Errorf("make mount points: %w", err)
	}
	return r, nil
}

// newUpper makes an upper layer for what is below: its data is on disk.
func (g *guest) newUpper(below vfs.VirtualDentry) (*vfs.Mount, error) {
	opts := internal(tmpfs.FilesystemOpts{MemoryFile: g.upper, DisableDefaultSizeLimit: true})
	opts.GetFilesystemOptions.Data = fmt.Sprintf("size=%d", upperSize())
	m, err := g.mount(tmpfs.Name, opts)
	if err != nil {
		return nil, err
	}
	// tmpfs' root is 1777 root:root of now.
	if err := g.copyAttributes(at(rootOf(m), ""), at(below, "")); err != nil {
		return nil, fmt.Errorf("copy root's attributes: %w", err)
	}
	return m, nil
}

// release lets go of all but the upper layer, which the caller keeps.
func (g *guest) release(r *rootfs) {
	r.below.DecRef(g.ctx)
	for _, b := range r.binds {
		if b.mount != nil {
			b.mount.DecRef(g.ctx)
		}
	}
	for _, v := range r.volumes {
		g.releaseVolume(v)
	}
	for _, l := range r.listeners {
		l.ep.Close(g.ctx)
	}
}

// namespace makes the mount namespace of a step, with everything mounted. ctx is that
// of the process to be, and has its IPC namespace.
func (g *guest) namespace(ctx context.Context, r *rootfs) (*vfs.MountNamespace, error) {
	mns := g.vfs.NewMountNamespaceFrom(g.ctx, g.root, r.merged.Filesystem(), r.merged.Root(), &vfs.MountOptions{}, g.kernel, false)
	// The namespace took over references, which r.merged still has and drops.
	r.merged.Filesystem().IncRef()
	r.merged.Root().IncRef()
	r.merged.DecRef(g.ctx)
	root := mns.Root(g.ctx)
	defer root.DecRef(g.ctx)
	err := g.mountKernelFilesystems(ctx, root, r.points)
	if err == nil {
		err = g.mountFiles(root, r.points)
	}
	if err == nil {
		err = g.mountBinds(root, r)
	}
	if err != nil {
		mns.DecRef(g.ctx)
		return nil, err
	}
	return mns, nil
}

// connect mounts m on path, taking over the reference to m.
func (g *guest) connect(root vfs.VirtualDentry, m *vfs.Mount, path string) error {
	defer m.DecRef(g.ctx)
	if err := g.vfs.ConnectMountAt(g.ctx, g.root, m, at(root, path)); err != nil {
		return fmt.Errorf("mount on %q: %w", path, err)
	}
	return nil
}

func (g *guest) mountKernelFilesystems(ctx context.Context, root vfs.VirtualDentry, points []mountPoint) error {
	place := map[string]string{}
	for _, p := range points {
		place[p.wanted] = p.path
	}
	for _, x := range []struct {
		fs, at string
		opts   vfs.MountOptions
	}{
		{proc.Name, place["/proc"], internal(&proc.InternalData{})},
		{sys.Name, place["/sys"], readOnly(internal(&sys.InternalData{}))},
		{dev.Name, place["/dev"], vfs.MountOptions{}},
		{devpts.Name, place["/dev"] + "/pts", vfs.MountOptions{}},
		{tmpfs.Name, place["/dev"] + "/shm", withData("mode=1777,size=64m")}, // docker's size
		{mqfs.Name, place["/dev"] + "/mqueue", vfs.MountOptions{}},
	} {
		if x.fs == mqfs.Name {
			if err := g.vfs.MkdirAt(g.ctx, g.root, at(root, x.at), &vfs.MkdirOptions{Mode: 0o1777}); err != nil {
				return fmt.Errorf("make %q: %w", x.at, err)
			}
		}
		m, err := g.mountFor(ctx, x.fs, x.opts)
		if err != nil {
			return err
		}
		if err := g.connect(root, m, x.at); err != nil {
			return err
		}
	}
	return nil
}

func readOnly(o vfs.MountOptions) vfs.MountOptions {
	o.ReadOnly = true
	return o
}

// newIPCNamespace makes an IPC namespace, so that a step's shared memory and
// queues end with it.
func (g *guest) newIPCNamespace() (*kernel.IPCNamespace, error) {
	ns := kernel.NewIPCNamespace(g.root.UserNamespace)
	if err := ns.InitPosixQueues(g.ctx, g.vfs, g.root); err != nil {
		return nil, err
	}
	ns.SetInode(namespaceInode(g.ctx, g.kernel, ns))
	return ns, nil
}
