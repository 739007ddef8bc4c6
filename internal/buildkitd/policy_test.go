package buildkitd

import (
	"context"
	"errors"
	"strings"
	"testing"

	gatewayapi "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	policypb "github.com/moby/buildkit/sourcepolicy/pb"
	"github.com/moby/buildkit/sourcepolicy/policysession"

	"github.com/kiln-build/kiln/internal/frontend"
)

func decision(a policypb.PolicyAction, to *pb.SourceOp) *policysession.CheckPolicyResponse {
	return &policysession.CheckPolicyResponse{Result: &policysession.CheckPolicyResponse_Decision{
		Decision: &policysession.DecisionResponse{Action: a, Update: to, DenyMessages: []*policysession.DenyMessage{{Message: "because"}}},
	}}
}

func question(src *pb.SourceOp) *policysession.CheckPolicyResponse {
	return &policysession.CheckPolicyResponse{Result: &policysession.CheckPolicyResponse_Request{Request: &gatewayapi.ResolveSourceMetaRequest{Source: src}}}
}

// TestSessionPolicy: a session decides, asks, converts and asks too often; what rules deny it is never asked about.
func TestSessionPolicy(t *testing.T) {
	const allow, deny, convert = policypb.PolicyAction_ALLOW, policypb.PolicyAction_DENY, policypb.PolicyAction_CONVERT
	type answers = []*policysession.CheckPolicyResponse
	other := &pb.SourceOp{Identifier: "https://h/b", Attrs: map[string]string{"k": "v"}}
	source := &pb.SourceOp{Identifier: "https://h/a"}
	for name, c := range map[string]struct {
		answers answers // the last one again and again
		want    string  // what is taken
		err     string
		asked   int
	}{
		"allowed":           {answers{decision(allow, nil)}, "https://h/a", "", 1},
		"denied":            {answers{decision(deny, nil)}, "", `source "https://h/a" not allowed by policy: action DENY`, 1},
		"converted":         {answers{decision(convert, other), decision(allow, nil)}, "https://h/b", "", 2},
		"to nothing":        {answers{decision(convert, nil)}, "", "convert action requires updated source", 1},
		"to what is denied": {answers{decision(convert, &pb.SourceOp{Identifier: "https://evil/x"})}, "", "denied by policy", 1},
		"for ever":          {answers{decision(convert, source)}, "", "too many policy requests", 10},
		"after a question":  {answers{question(source), decision(allow, nil)}, "https://h/a", "", 2},
		"questions alone":   {answers{question(source)}, "", "too many policy requests", 10},
		"another question":  {answers{question(other)}, "", "another source", 1},
		"no answer":         {answers{{}}, "", "no decision in policy response", 1},
	} {
		asked := 0
		v := &decider{
			check: func(_ context.Context, req *policysession.CheckPolicyRequest) (*policysession.CheckPolicyResponse, error) {
				if req.Platform.OS != "linux" || strings.Contains(req.Source.Source.Identifier, "evil") {
					t.Errorf("%s: asked about %v on %v", name, req.Source, req.Platform)
				}
				if asked++; asked == 2 && name == "after a question" && req.Source.GetHTTP().GetChecksum() != "sum" {
					t.Errorf("%s: told %v", name, req.Source)
				}
				return c.answers[min(asked, len(c.answers))-1], nil
			},
			resolve: func(_ context.Context, req *gatewayapi.ResolveSourceMetaRequest) (*gatewayapi.ResolveSourceMetaResponse, error) {
				return &gatewayapi.ResolveSourceMetaResponse{Source: req.Source, HTTP: &gatewayapi.ResolveSourceHTTPResponse{Checksum: "sum"}}, nil
			},
		}
		rules := &frontend.Rules{Rules: []*policypb.Rule{{Action: deny, Selector: &policypb.Selector{Identifier: "https://evil/*"}}}}
		p, err := frontend.NewPolicy(rules)
		if err != nil {
			t.Fatal(err)
		}
		if p, err = p.Verified(v.verify).With(nil); err != nil {
			t.Fatal(err)
		}
		got, err := p.Source(t.Context(), source, &pb.Platform{OS: "linux"})
		if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) || err == nil && got.Identifier != c.want || asked != c.asked {
			t.Errorf("%s: %v, %v, asked %d times", name, got, err, asked)
		}
		if msgs := policysession.DenyMessages(sent(err)); name == "denied" && (len(msgs) != 1 || msgs[0].Message != "because") {
			t.Errorf("the client is told %v", msgs)
		}
	}
	var none *frontend.Policy
	broken := none.Verified((&decider{check: func(context.Context, *policysession.CheckPolicyRequest) (*policysession.CheckPolicyResponse, error) {
		return nil, errors.New("gone")
	}}).verify)
	if _, err := broken.Source(t.Context(), source, nil); err == nil || err.Error() != "gone" {
		t.Error(err)
	}
}
