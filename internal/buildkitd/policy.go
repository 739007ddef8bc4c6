package buildkitd

import (
	"context"
	"errors"
	"fmt"
	"maps"

	gatewayapi "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	policypb "github.com/moby/buildkit/sourcepolicy/pb"
	"github.com/moby/buildkit/sourcepolicy/policysession"

	"github.com/kiln-build/kiln/internal/frontend"
)

// decider asks a session about sources: it decides, or wants to know more first.
type decider struct {
	check   func(context.Context, *policysession.CheckPolicyRequest) (*policysession.CheckPolicyResponse, error)
	resolve func(context.Context, *gatewayapi.ResolveSourceMetaRequest) (*gatewayapi.ResolveSourceMetaResponse, error)
}

// verify is a frontend.Verifier.
func (v *decider) verify(ctx context.Context, op *pb.SourceOp, p *pb.Platform, questions *int) (*pb.SourceOp, error) {
	req := &policysession.CheckPolicyRequest{Platform: p, Source: &gatewayapi.ResolveSourceMetaResponse{Source: op}}
	for {
		if *questions--; *questions < 0 {
			return nil, errors.New("too many policy requests")
		}
		res, err := v.check(ctx, req)
		if err != nil {
			return nil, err
		}
		asked := res.GetRequest()
		if asked == nil {
			return decide(op, res.GetDecision())
		}
		if src := asked.Source; src.GetIdentifier() != op.Identifier || !maps.Equal(src.GetAttrs(), op.Attrs) {
			return nil, fmt.Errorf("policy requested another source: %q instead of %q", src.GetIdentifier(), op.Identifier)
		}
		if req.Source, err = v.resolve(ctx, asked); err != nil {
			return nil, fmt.Errorf("error resolving source metadata from policy request: %w", err)
		}
	}
}

// decide is what a decision comes to: see frontend.Verifier.
func decide(op *pb.SourceOp, d *policysession.DecisionResponse) (*pb.SourceOp, error) {
	switch {
	case d == nil:
		return nil, errors.New("no decision in policy response")
	case d.Action == policypb.PolicyAction_ALLOW:
		return nil, nil
	case d.Action == policypb.PolicyAction_CONVERT && d.Update != nil:
		return d.Update, nil
	case d.Action == policypb.PolicyAction_CONVERT:
		return nil, errors.New("convert action requires updated source")
	}
	err := fmt.Errorf("source %q not allowed by policy: action %s", op.Identifier, d.Action)
	return nil, policysession.WrapDenyMessages(err, d.GetDenyMessages())
}

// decidedBy is the policy with what the client's session decides; an empty id: none does.
func (r *running) decidedBy(p *frontend.Policy, id string) *frontend.Policy {
	if id == "" {
		return p
	}
	v := &decider{
		check: func(ctx context.Context, req *policysession.CheckPolicyRequest) (*policysession.CheckPolicyResponse, error) {
			return r.peer.CheckPolicy(ctx, id, req)
		},
		resolve: func(ctx context.Context, req *gatewayapi.ResolveSourceMetaRequest) (*gatewayapi.ResolveSourceMetaResponse, error) {
			if i := req.GetImage(); i.GetAttestationChain() || len(i.GetResolveAttestations()) > 0 {
				return nil, errors.New("attestations are not supported")
			}
			res, err := frontend.ResolveSource(ctx, r.build, r.rec, req.Source, metaOptions(req))
			if err != nil {
				return nil, err
			}
			return metaResponse(res), nil
		},
	}
	return p.Verified(v.verify)
}
