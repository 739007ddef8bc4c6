package ctl

import (
	"os"

	"github.com/containerd/containerd/v2/core/content"
	contentlocal "github.com/containerd/containerd/v2/plugins/content/local"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/session"
	sessioncontent "github.com/moby/buildkit/session/content"
)

// stores lets the server read OCI layouts, and read and write caches in directories.
func (r *Request) stores(s *session.Session, req *controlapi.SolveRequest) error {
	all := map[string]content.Store{}
	for name, dir := range r.Layouts {
		if _, err := os.Stat(dir); err != nil {
			return err
		}
		st, err := contentlocal.NewStore(dir)
		if err != nil {
			return err
		}
		all["oci:"+name] = st
	}
	if len(all) > 0 {
		s.Allow(sessioncontent.NewAttachable(all))
	}
	return nil
}
