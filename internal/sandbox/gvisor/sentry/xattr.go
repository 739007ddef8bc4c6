package sentry

import (
	"strings"

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
