package sentry

import (
	"fmt"

	"gvisor.dev/gvisor/pkg/sentry/fsimpl/overlay"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/tmpfs"
	"gvisor.dev/gvisor/pkg/sentry/vfs"

	"github.com/kiln-build/kiln/internal/sandbox/gvisor/wire"
)

// maxLowers is how many lower layers an overlay here gets at most. gVisor's
// limit is Linux's, 500; when there are more than ours (layers and the steps of a
// session add up) the bottom ones are merged into one read-only overlay.
const maxLowers = 400

// mountLayers mounts the layer files, over two empty file systems: an overlay
// wants a root, and without an upper layer two lower ones.
func (g *guest) mountLayers() error {
	for range 2 {
		m, err := g.mount(tmpfs.Name, withData("mode=0755"))
		if err != nil {
			return err
		}
		g.lowers = append(g.lowers, m)
	}
	for i := range g.config.Layers {
		m, err := g.mountLayer(wire.FDLayers + i)
		if err != nil {
			return fmt.Errorf("mount layer %d: %w", i, err)
		}
		if err := g.addLower(m); err != nil {
			return err
		}
	}
	return nil
}

// addLower puts m on top of the lower layers, taking over its reference.
func (g *guest) addLower(m *vfs.Mount) error {
	g.lowers = append([]*vfs.Mount{m}, g.lowers...)
	if len(g.lowers) <= maxLowers {
		return nil
	}
	// Whiteouts and opaque directories keep their meaning, as what they hide
	// can only be below them.
	n := len(g.lowers) - maxLowers/2
	below, err := g.mountBelow(g.lowers[n:])
	if err != nil {
		return err
	}
	for _, l := range g.lowers[n:] {
		l.DecRef(g.ctx) // the overlay has its own
	}
	g.lowers = append(g.lowers[:n:n], below)
	return nil
}

// mountBelow merges lower layers for looking at.
func (g *guest) mountBelow(lowers []*vfs.Mount) (*vfs.Mount, error) {
	opts := internal(overlay.FilesystemOptions{LowerRoots: rootsOf(lowers)})
	opts.ReadOnly = true
	return g.mount(overlay.Name, opts)
}
