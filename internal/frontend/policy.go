package frontend

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/distribution/reference"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/sourcepolicy"
	policypb "github.com/moby/buildkit/sourcepolicy/pb"
	"github.com/moby/buildkit/util/gitutil"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// Rules are those of one source policy.
type Rules = policypb.Policy

// Policy says what a build's sources may be, and has others taken in the place of some. Nil: there are no
// rules. Safe for concurrent use.
type Policy struct {
	rules  []*Rules
	engine *sourcepolicy.Engine
	verify Verifier // nil: nobody is asked
}

// Verifier decides about a source that the rules allow. It returns what is to be taken in its place, about which it is asked
// then, or nil: the source may be had. Of questions it takes one for each that it asks elsewhere.
type Verifier func(ctx context.Context, op *pb.SourceOp, p *pb.Platform, questions *int) (*pb.SourceOp, error)

// maxQuestions bounds what is asked about one source, maxAsking for how many at the same time.
const (
	maxQuestions = 10
	maxAsking    = 16
)

// maxRules bounds the rules of a build: each is asked for each source.
const maxRules = 10_000

// NewPolicy returns the policy of several sets of rules, of which each has its say.
func NewPolicy(sets ...*Rules) (*Policy, error) {
	p := &Policy{}
	n := 0
	for _, s := range sets {
		if len(s.GetRules()) == 0 {
			continue
		}
		if n += len(s.Rules); n > maxRules {
			return nil, fmt.Errorf("more than %d rules in the source policy", maxRules)
		}
		for _, r := range s.Rules {
			if err := checkRule(r); err != nil {
				return nil, err
			}
		}
		p.rules = append(p.rules, s)
	}
	if n == 0 {
		return nil, nil
	}
	p.engine = sourcepolicy.NewEngine(p.rules)
	return p, nil
}

func checkRule(r *policypb.Rule) error {
	if r == nil {
		return errors.New("invalid nil rule in policy")
	}
	if r.Selector == nil {
		return errors.New("invalid nil selector in policy")
	}
	for _, c := range r.Selector.Constraints {
		if c == nil {
			return errors.New("invalid nil constraint in policy")
		}
	}
	return nil
}

// With is the policy with further rules, which are asked first.
func (p *Policy) With(sets []*Rules) (*Policy, error) {
	if p == nil {
		return NewPolicy(sets...)
	}
	all, err := NewPolicy(append(slices.Clone(sets), p.rules...)...)
	if err != nil || p.verify == nil {
		return all, err
	}
	return all.Verified(p.verify), nil
}

// Verified is the policy with somebody who is asked about what the rules allow.
func (p *Policy) Verified(v Verifier) *Policy {
	if p == nil {
		return &Policy{engine: sourcepolicy.NewEngine(nil), verify: v}
	}
	return &Policy{rules: p.rules, engine: p.engine, verify: v}
}

// Source returns what is to be taken for a source, a copy of op, or an error if it is denied.
func (p *Policy) Source(ctx context.Context, op *pb.SourceOp, platform *pb.Platform) (*pb.SourceOp, error) {
	op, _, err := p.source(ctx, op, platform)
	return op, err
}

func (p *Policy) source(ctx context.Context, op *pb.SourceOp, platform *pb.Platform) (_ *pb.SourceOp, changed bool, err error) {
	if p == nil || op == nil {
		return op, false, nil
	}
	for questions := maxQuestions; ; changed = true {
		op = op.CloneVT()
		op.Identifier = canonical(op.Identifier)
		mutated, err := p.engine.Evaluate(ctx, op)
		changed = changed || mutated
		if err != nil || p.verify == nil {
			return op, changed, err
		}
		to, err := p.verify(ctx, op, platform, &questions)
		if err != nil || to == nil {
			return op, changed, err
		}
		op = to
	}
}

// canonical is the one name of a source that rules know it by.
func canonical(id string) string {
	kind, rest, _ := strings.Cut(id, "://")
	switch kind {
	case "docker-image":
		if n, err := reference.ParseNormalizedNamed(rest); err == nil {
			return kind + "://" + reference.TagNameOnly(n).String()
		}
	case "git":
		return canonicalGit(id, rest)
	}
	return id
}

func canonicalGit(id, rest string) string {
	if !gitutil.IsGitTransport(rest) {
		rest = "https://" + rest
	}
	u, err := gitutil.ParseURL(rest)
	if err != nil {
		return id
	}
	id = "git://" + u.Host + path.Join("/", u.Path)
	if o := u.Opts; o != nil && (o.Ref != "" || o.Subdir != "") {
		id += "#" + o.Ref
		if o.Subdir != "" {
			id += ":" + o.Subdir
		}
	}
	return id
}

// Apply returns a definition whose sources are those that the policy has in their place, or an error if
// one is denied. A definition that is as the policy wants it is returned as it is.
func (p *Policy) Apply(ctx context.Context, def *Definition) (*Definition, error) {
	if p == nil || len(def.GetDef()) == 0 {
		return def, nil
	}
	a := applied{ops: map[string]*pb.Op{}, digests: map[string]string{}}
	var order []string
	var changed atomic.Bool
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(maxAsking)
	for _, b := range def.Def {
		op := &pb.Op{}
		if err := op.Unmarshal(b); err != nil {
			return nil, errors.Join(fmt.Errorf("read the graph: %w", err), g.Wait())
		}
		d := digest.FromBytes(b).String()
		order = append(order, d)
		if a.ops[d] != nil {
			continue
		}
		a.ops[d] = op
		if src, ok := op.Op.(*pb.Op_Source); ok {
			g.Go(func() error {
				to, mutated, err := p.source(gctx, src.Source, op.Platform)
				if err == nil && mutated {
					src.Source = to
					changed.Store(true)
				}
				return err
			})
		}
	}
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("error evaluating the source policy: %w", err)
	}
	if !changed.Load() {
		return def, nil
	}
	return a.definition(def, order)
}

// applied is a graph of which some operations are others than they were.
type applied struct {
	ops     map[string]*pb.Op // by the digest that they had
	digests map[string]string // that they have now
	bytes   map[string][]byte
}

// definition is def with the operations as they are now.
func (a *applied) definition(def *Definition, order []string) (*Definition, error) {
	a.bytes = map[string][]byte{}
	out := &pb.Definition{Metadata: map[string]*pb.OpMetadata{}}
	if def.Source != nil {
		out.Source = &pb.Source{Infos: def.Source.Infos, Locations: map[string]*pb.Locations{}}
	}
	for _, was := range order {
		is, err := a.digest(was)
		if err != nil {
			return nil, err
		}
		out.Def = append(out.Def, a.bytes[was])
		if m := def.Metadata[was]; m != nil {
			out.Metadata[is] = m
		}
		if l := def.Source.GetLocations()[was]; l != nil {
			out.Source.Locations[is] = l
		}
	}
	return out, nil
}

// digest is what an operation has for one now, after those of its inputs. They cannot be a cycle: each names its
// inputs by the digest of their bytes.
func (a *applied) digest(was string) (string, error) {
	if d, ok := a.digests[was]; ok {
		return d, nil
	}
	op := a.ops[was]
	if op == nil {
		return "", fmt.Errorf("read the graph: operation %q is not in it", was)
	}
	for _, in := range op.Inputs {
		d, err := a.digest(in.GetDigest())
		if err != nil {
			return "", err
		}
		in.Digest = d
	}
	b, err := op.Marshal()
	if err != nil {
		return "", err
	}
	a.bytes[was], a.digests[was] = b, digest.FromBytes(b).String()
	return a.digests[was], nil
}
