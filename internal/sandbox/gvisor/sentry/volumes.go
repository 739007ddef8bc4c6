package sentry

import (
	"fmt"
	"io"

	"gvisor.dev/gvisor/pkg/sentry/fsimpl/overlay"
	"gvisor.dev/gvisor/pkg/sentry/vfs"

	"github.com/kiln-build/kiln/internal/sandbox/gvisor/wire"
)

// volume is one of the session's volumes in one step.
type volume struct {
	below *vfs.Mount // its layers merged; the session's
	upper *vfs.Mount // takes the step's changes; nil if nothing can change it
	// merged is what is shown of it.
	merged *vfs.Mount
}

// stackVolumes merges the layers of each of the session's volumes, once.
func (g *guest) stackVolumes() error {
	for i, layers := range g.config.Volumes {
		lowers, err := g.stack(layers)
		if err != nil {
			return fmt.Errorf("mount layers of volume %d: %w", i, err)
		}
		s, err := g.mountBelow(lowers)
		if err != nil {
			return fmt.Errorf("mount layers of volume %d: %w", i, err)
		}
		for _, l := range lowers {
			l.DecRef(g.ctx) // the overlay has its own
		}
		g.stacks = append(g.stacks, s)
	}
	return nil
}

// newVolumes makes the volumes as a step sees them: with an upper layer of the step's
// own where one of the mounts is writable.
func (g *guest) newVolumes(r *rootfs) error {
	writable := make([]bool, len(g.stacks))
	for _, m := range g.config.Mounts {
		if m.Kind != wire.KindVolume {
			continue
		}
		if m.Volume < 0 || m.Volume >= len(g.stacks) {
			return fmt.Errorf("there is no volume %d", m.Volume)
		}
		writable[m.Volume] = writable[m.Volume] || m.Writable
	}
	for i, below := range g.stacks {
		v := volume{below: below, merged: below}
		if !writable[i] {
			below.IncRef()
			r.volumes = append(r.volumes, v)
			continue
		}
		var err error
		if v.upper, err = g.newUpper(rootOf(below)); err != nil {
			return err
		}
		v.merged, err = g.mount(overlay.Name, internal(overlay.FilesystemOptions{
			UpperRoot: rootOf(v.upper), LowerRoots: rootsOf([]*vfs.Mount{below}),
		}))
		if err != nil {
			v.upper.DecRef(g.ctx)
			return err
		}
		r.volumes = append(r.volumes, v)
	}
	return nil
}

func (g *guest) releaseVolume(v volume) {
	v.merged.DecRef(g.ctx)
	if v.upper != nil {
		v.upper.DecRef(g.ctx)
	}
}

// releaseVolumes forgets what the last step changed in volumes.
func (g *guest) releaseVolumes() {
	for _, v := range g.volumes {
		g.releaseVolume(v)
	}
	g.volumes = nil
}

// writeVolume writes what the last step changed in a volume.
func (g *guest) writeVolume(n int, out io.Writer) error {
	if n < 0 || n >= len(g.volumes) {
		return fmt.Errorf("there is no volume %d", n)
	}
	upper := g.volumes[n].upper
	if upper == nil { // nothing could be changed
		var err error
		if upper, err = g.newUpper(rootOf(g.volumes[n].below)); err != nil {
			return err
		}
		defer upper.DecRef(g.ctx)
	}
	if err := g.writeChanges(upper, g.volumes[n].below, out); err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	return nil
}
