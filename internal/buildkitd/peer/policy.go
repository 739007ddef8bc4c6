package peer

import (
	"context"

	"github.com/moby/buildkit/sourcepolicy/policysession"
)

// CheckPolicy asks the session with an id about a source.
func (p *Peer) CheckPolicy(ctx context.Context, id string, req *policysession.CheckPolicyRequest) (*policysession.CheckPolicyResponse, error) {
	c, err := p.caller(ctx, id)
	if err != nil {
		return nil, err
	}
	return policysession.NewPolicyVerifierClient(c.Conn()).CheckPolicy(c.Context(ctx), req)
}
