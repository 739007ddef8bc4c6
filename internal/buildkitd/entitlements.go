package buildkitd

import (
	"fmt"

	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/entitlements"

	"github.com/kiln-build/kiln/internal/frontend"
)

// allowed refuses a result that needs what the client was not granted.
func (r *running) allowed(res *frontend.Result) error {
	return res.Each(func(def *frontend.Definition) error { return entitled(def, r.granted) })
}

func entitled(def *frontend.Definition, granted entitlements.Set) error {
	for _, b := range def.GetDef() {
		var op pb.Op
		if err := op.Unmarshal(b); err != nil {
			return fmt.Errorf("decode build graph: %w", err)
		}
		e := op.GetExec()
		if e == nil {
			continue
		}
		v := entitlements.Values{NetworkHost: e.Network == pb.NetMode_HOST, SecurityInsecure: e.Security == pb.SecurityMode_INSECURE}
		if err := granted.Check(v); err != nil {
			return err
		}
	}
	return nil
}
