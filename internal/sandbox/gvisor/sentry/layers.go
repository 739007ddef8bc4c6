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
		g.empty = append(g.empty, m)
	}
	for i := range g.config.Layers + g.config.Others {
		m, implied, err := g.mountLayer(wire.FDLayers + i)
		if err != nil {
			return fmt.Errorf("mount layer %d: %w", i, err)
		}
		g.layers, g.implied = append(g.layers, m), append(g.implied, implied)
	}
	root := make([]int, g.config.Layers)
	for i := range root {
		root[i] = i
	}
	var err error
	if g.lowers, err = g.stack(root); err != nil {
		return err
	}
	return g.stackVolumes()
}

// stack is a stack of layer files, for an overlay.
func (g *guest) stack(numbers []int) (lowers []*vfs.Mount, err error) {
	for _, m := range g.empty {
		m.IncRef()
		lowers = append(lowers, m)
	}
	for _, n := range numbers {
		if n < 0 || n >= len(g.layers) {
			return nil, fmt.Errorf("there is no layer %d", n)
		}
		m, err := g.onTop(n, lowers)
		if err != nil {
			return nil, err
		}
		if lowers, err = g.push(lowers, m); err != nil {
			return nil, err
		}
	}
	return lowers, nil
}

// push puts m on top of lowers, taking over its reference.
func (g *guest) push(lowers []*vfs.Mount, m *vfs.Mount) ([]*vfs.Mount, error) {
	lowers = append([]*vfs.Mount{m}, lowers...)
	if len(lowers) <= maxLowers {
		return lowers, nil
	}
	// Whiteouts and opaque directories keep their meaning, as what they hide
	// can only be below them.
	n := len(lowers) - maxLowers/2
	below, err := g.mountBelow(lowers[n:])
	if err != nil {
		return nil, err
	}
	for _, l := range lowers[n:] {
		l.DecRef(g.ctx) // the overlay has its own
	}
	return append(lowers[:n:n], below), nil
}

// addLower makes m the top of the session's layers, taking over its reference.
func (g *guest) addLower(m *vfs.Mount) (err error) {
	g.lowers, err = g.push(g.lowers, m)
	return err
}

// mountBelow merges lower layers for looking at.
func (g *guest) mountBelow(lowers []*vfs.Mount) (*vfs.Mount, error) {
	opts := internal(overlay.FilesystemOptions{LowerRoots: rootsOf(lowers)})
	opts.ReadOnly = true
	return g.mount(overlay.Name, opts)
}
