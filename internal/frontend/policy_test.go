package frontend

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/moby/buildkit/solver/pb"
	policypb "github.com/moby/buildkit/sourcepolicy/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/image"
)

func rule(action policypb.PolicyAction, id, to string) *policypb.Rule {
	r := &policypb.Rule{Action: action, Selector: &policypb.Selector{Identifier: id}}
	if action == policypb.PolicyAction_CONVERT {
		r.Updates = &policypb.Update{Identifier: to}
	}
	return r
}

const (
	allow   = policypb.PolicyAction_ALLOW
	deny    = policypb.PolicyAction_DENY
	convert = policypb.PolicyAction_CONVERT
)

func policy(t *testing.T, rules ...*policypb.Rule) *Policy {
	t.Helper()
	p, err := NewPolicy(&Rules{Rules: rules})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// sources are those of a definition.
func sources(t *testing.T, def *Definition) (ids []string) {
	t.Helper()
	for _, b := range def.Def {
		var op pb.Op
		if err := op.Unmarshal(b); err != nil {
			t.Fatal(err)
		}
		if s := op.GetSource(); s != nil {
			ids = append(ids, s.Identifier)
		}
	}
	slices.Sort(ids)
	return ids
}

func TestPolicySource(t *testing.T) {
	regex := rule(convert, `^docker-image://docker\.io/library/(.*)$`, "docker-image://mirror.example/$1")
	regex.Selector.MatchType = policypb.MatchType_REGEX
	exact := rule(deny, "https://h/*", "")
	exact.Selector.MatchType = policypb.MatchType_EXACT
	constrained := rule(deny, "git://h/x.git", "")
	constrained.Selector.Constraints = []*policypb.AttrConstraint{{Key: "git.keepgitdir", Value: "true", Condition: policypb.AttrMatch_EQUAL}}
	for name, c := range map[string]struct {
		rules []*policypb.Rule
		id    string
		attrs map[string]string
		want  string // empty: denied
	}{
		"no rule for it":         {[]*policypb.Rule{rule(deny, "https://h/b", "")}, "https://h/a", nil, "https://h/a"},
		"denied":                 {[]*policypb.Rule{rule(deny, "https://h/*", "")}, "https://h/a", nil, ""},
		"the last rule counts":   {[]*policypb.Rule{rule(deny, "*", ""), rule(allow, "https://h/*", "")}, "https://h/a", nil, "https://h/a"},
		"no wildcard":            {[]*policypb.Rule{exact}, "https://h/a", nil, "https://h/a"},
		"a short name":           {[]*policypb.Rule{rule(deny, "docker-image://docker.io/library/alpine:latest", "")}, "docker-image://alpine", nil, ""},
		"converted":              {[]*policypb.Rule{regex}, "docker-image://alpine:3", nil, "docker-image://mirror.example/alpine:3"},
		"converted, then denied": {[]*policypb.Rule{regex, rule(deny, "docker-image://mirror.example/*", "")}, "docker-image://alpine:3", nil, ""},
		"in a circle":            {[]*policypb.Rule{rule(convert, "https://h/a", "https://h/b"), rule(convert, "https://h/b", "https://h/a")}, "https://h/a", nil, ""},
		"subdirectory":           {[]*policypb.Rule{rule(deny, "git://h/x.git#main:a/b", "")}, "git://h/x.git#main:../a/b", nil, ""},
		"attribute":              {[]*policypb.Rule{constrained}, "git://h/x.git", map[string]string{"git.keepgitdir": "true"}, ""},
		"no such attribute":      {[]*policypb.Rule{constrained}, "git://h/x.git", nil, "git://h/x.git"},
	} {
		in := &pb.SourceOp{Identifier: c.id, Attrs: c.attrs}
		got, err := policy(t, c.rules...).Source(t.Context(), in, nil)
		if (err == nil) != (c.want != "") || err == nil && got.Identifier != c.want || in.Identifier != c.id {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	var none *Policy
	if op := (&pb.SourceOp{Identifier: "x"}); true {
		if got, err := none.Source(t.Context(), op, nil); got != op || err != nil {
			t.Errorf("without a policy: %v, %v", got, err)
		}
	}
}

func TestPolicyRules(t *testing.T) {
	for want, r := range map[string]*policypb.Rule{
		"invalid nil rule in policy": nil, "invalid nil selector in policy": {Action: allow},
		"invalid nil constraint in policy": {Selector: &policypb.Selector{Constraints: []*policypb.AttrConstraint{nil}}},
	} {
		if _, err := NewPolicy(&Rules{Rules: []*policypb.Rule{r}}); err == nil || err.Error() != want {
			t.Errorf("%v instead of %q", err, want)
		}
	}
	if _, err := NewPolicy(&Rules{Rules: make([]*policypb.Rule, maxRules+1)}); err == nil {
		t.Error("any number of rules is taken")
	}
	if p, err := NewPolicy(nil, &Rules{}); p != nil || err != nil {
		t.Errorf("no rules: %v, %v", p, err)
	}
	p := policy(t, rule(deny, "https://h/a", ""))
	more, err := p.With([]*Rules{{Rules: []*policypb.Rule{rule(deny, "https://h/b", "")}}})
	if err != nil {
		t.Fatal(err)
	}
	for id, ok := range map[string]bool{"https://h/a": false, "https://h/b": false, "https://h/c": true} {
		if _, err := more.Source(t.Context(), &pb.SourceOp{Identifier: id}, nil); (err == nil) != ok {
			t.Errorf("%s: %v", id, err)
		}
	}
}

// full resolves any reference to an image that is not empty.
type full struct{ catalogue }

func (full) Resolve(_ context.Context, ref string, p ocispec.Platform) (*image.Image, error) {
	c := fmt.Sprintf(`{"os":%q,"architecture":%q,"config":{},"rootfs":{"type":"layers","diff_ids":[%q]}}`, p.OS, p.Architecture, digest.FromString(ref))
	return &image.Image{Ref: ref, Digest: digest.FromString(ref), RawConfig: []byte(c)}, nil
}

// TestPolicyDefinition: a definition with another source is whole: every input is there, and what is said of operations is of
// those that there are.
func TestPolicyDefinition(t *testing.T) {
	const dockerfile = "FROM busybox AS a\nRUN one\nFROM a\nADD https://h.example/f /f\nCOPY --from=a /x /x\nRUN two\n"
	in := input(dockerfile)
	plain, err := Load(t.Context(), in, full{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	in.Policy = policy(t, rule(convert, "docker-image://docker.io/library/busybox:*", "docker-image://mirror.example/busybox:1"))
	p, err := Load(t.Context(), in, full{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	before, def := plain.Platforms[0].Definition, p.Platforms[0].Definition
	if got := sources(t, def); len(got) != 2 || !strings.HasPrefix(got[0], "docker-image://mirror.example/busybox:1@") || got[1] != "https://h.example/f" {
		t.Errorf("sources %q of %d, before %q of %d", got, len(def.Def), sources(t, before), len(before.Def))
	}
	have := map[string]bool{}
	for _, b := range def.Def {
		have[digest.FromBytes(b).String()] = true
	}
	for _, b := range def.Def {
		var op pb.Op
		if err := op.Unmarshal(b); err != nil {
			t.Fatal(err)
		}
		for _, i := range op.Inputs {
			if !have[i.Digest] {
				t.Errorf("input %s is not there", i.Digest)
			}
		}
	}
	for d := range def.Metadata {
		if !have[d] {
			t.Errorf("metadata of %s, which is not there", d)
		}
	}
	for d := range def.Source.Locations {
		if !have[d] {
			t.Errorf("a location of %s, which is not there", d)
		}
	}
	if len(def.Def) != len(before.Def) || len(def.Metadata) != len(before.Metadata) || len(def.Source.Locations) != len(before.Source.Locations) {
		t.Errorf("%d operations, %d metadata, %d locations", len(def.Def), len(def.Metadata), len(def.Source.Locations))
	}
	// What was resolved is asked for once more when it is built: that changes nothing.
	if again, err := in.Policy.Apply(t.Context(), def); err != nil || again != def {
		t.Errorf("applied twice: %v", err)
	}
	in.Policy = policy(t, rule(deny, "docker-image://*", ""))
	if _, err := Load(t.Context(), in, full{}, nil); err == nil || !strings.Contains(err.Error(), "denied by policy") {
		t.Errorf("denied: %v", err)
	}
	in = input("FROM scratch\nADD https://h.example/x /\n") // nothing is resolved
	in.Policy = policy(t, rule(deny, "https://h.example/*", ""))
	if _, err := Load(t.Context(), in, full{}, nil); err == nil || !strings.Contains(err.Error(), `error evaluating the source policy: source "https://h.example/x" denied by policy`) {
		t.Errorf("denied: %v", err)
	}
	if _, err := in.Policy.Apply(t.Context(), &Definition{Def: [][]byte{{0xff}}}); err == nil {
		t.Error("garbage is taken")
	}
}
