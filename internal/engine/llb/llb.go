// Package llb decodes BuildKit's graph (LLB, protobuf) into the engine's typed
// operations. What the engine cannot do is refused here, by name and with its
// place in the Dockerfile, never ignored.
package llb

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/engine"
)

// maxOps bounds a graph; BuildKit's own clients stay below some thousands.
const maxOps = 50_000

// Decode decodes a definition. A nil or empty one is the empty file system.
func Decode(def *pb.Definition) (*engine.Graph, error) {
	if def == nil || len(def.Def) == 0 {
		return &engine.Graph{}, nil
	}
	if len(def.Def) > maxOps {
		return nil, fmt.Errorf("the build graph has %d operations: more than %d are refused", len(def.Def), maxOps)
	}
	d := &decoder{def: def, raw: map[string]*pb.Op{}, ops: map[string]*engine.Op{}, graph: &engine.Graph{}}
	var last *pb.Op
	for _, b := range def.Def {
		op := &pb.Op{}
		if err := op.Unmarshal(b); err != nil {
			return nil, fmt.Errorf("decode build graph: %w", err)
		}
		d.raw[digest.FromBytes(b).String()] = op
		last = op
	}
	// The last operation does nothing: its one input is what is wanted.
	if last.Op != nil || len(last.Inputs) != 1 {
		return nil, errors.New("decode build graph: the last operation must name one result")
	}
	in, err := d.input(last.Inputs[0], 0)
	if err != nil {
		return nil, err
	}
	d.graph.Target = in
	return d.graph, nil
}

type decoder struct {
	def   *pb.Definition
	raw   map[string]*pb.Op
	ops   map[string]*engine.Op
	graph *engine.Graph
}

func (d *decoder) input(in *pb.Input, depth int) (engine.Input, error) {
	if in.Index != 0 {
		return engine.Input{}, errors.New("decode build graph: operations with several results are not supported")
	}
	op, err := d.op(in.Digest, depth)
	return engine.Input{Op: op}, err
}

func (d *decoder) op(dgst string, depth int) (*engine.Op, error) {
	if op, ok := d.ops[dgst]; ok {
		return op, nil
	}
	raw, ok := d.raw[dgst]
	if !ok {
		return nil, fmt.Errorf("decode build graph: operation %q is not in it", dgst)
	}
	if depth > maxOps {
		return nil, errors.New("decode build graph: too deep")
	}
	op := &engine.Op{At: d.location(dgst)}
	d.describe(op, dgst)
	for _, in := range raw.Inputs {
		i, err := d.input(in, depth+1)
		if err != nil {
			return nil, err
		}
		op.Inputs = append(op.Inputs, i)
	}
	var err error
	if op.Do, err = d.operation(raw, op); err != nil {
		return nil, &diag.Error{Err: err, At: op.At, Code: diag.ExitDockerfile}
	}
	d.ops[dgst] = op
	d.graph.Ops = append(d.graph.Ops, op)
	return op, nil
}

var stageInName = regexp.MustCompile(`^\[(?:[^\] ]+ )?([^\] ]+) +\d+/\d+\]`)

func (d *decoder) describe(op *engine.Op, dgst string) {
	m := d.def.Metadata[dgst]
	if m == nil {
		return
	}
	op.IgnoreCache = m.IgnoreCache
	op.Name = m.Description["llb.customname"]
	if g := m.ProgressGroup; g != nil && op.Name == "" {
		op.Name = g.Name
	}
	if s := stageInName.FindStringSubmatch(op.Name); s != nil {
		op.Stage = s[1]
	}
}

func (d *decoder) location(dgst string) *diag.Location {
	src := d.def.Source
	if src == nil || src.Locations[dgst] == nil {
		return nil
	}
	for _, l := range src.Locations[dgst].Locations {
		if int(l.SourceIndex) < 0 || int(l.SourceIndex) >= len(src.Infos) || len(l.Ranges) == 0 {
			continue
		}
		info, r := src.Infos[l.SourceIndex], l.Ranges[0]
		return &diag.Location{
			File: info.Filename, Line: int(r.GetStart().GetLine()), EndLine: int(r.GetEnd().GetLine()),
			Source: strings.Split(string(info.Data), "\n"),
		}
	}
	return nil
}

func (d *decoder) operation(raw *pb.Op, op *engine.Op) (engine.Operation, error) {
	switch do := raw.Op.(type) {
	case *pb.Op_Source:
		return source(do.Source, platform(raw.Platform), op)
	case *pb.Op_Exec:
		return exec(do.Exec, raw, op)
	case *pb.Op_File:
		return file(do.File, len(raw.Inputs), op)
	case *pb.Op_Merge:
		for i, in := range do.Merge.Inputs {
			if in.Input != int64(i) {
				return nil, errors.New("a merge must take its inputs in order")
			}
		}
		name(op, "merge")
		return &engine.Merge{}, nil
	case *pb.Op_Diff:
		return nil, errors.New("the diff operation is not supported")
	case *pb.Op_Build:
		return nil, errors.New("the nested build operation is not supported")
	default:
		return nil, fmt.Errorf("operation %T is not supported", do)
	}
}

// name gives an operation a name if its maker did not.
func name(op *engine.Op, s string) {
	if op.Name == "" {
		op.Name = s
	}
}

func platform(p *pb.Platform) ocispec.Platform {
	if p == nil {
		return platforms.Normalize(platforms.DefaultSpec())
	}
	return platforms.Normalize(ocispec.Platform{
		OS: p.OS, Architecture: p.Architecture, Variant: p.Variant, OSVersion: p.OSVersion,
	})
}

func source(s *pb.SourceOp, p ocispec.Platform, op *engine.Op) (engine.Operation, error) {
	kind, rest, ok := strings.Cut(s.Identifier, "://")
	if !ok {
		return nil, fmt.Errorf("source %q has no kind", s.Identifier)
	}
	switch kind {
	case "docker-image":
		name(op, "FROM "+rest)
		return &engine.Image{Ref: rest, Platform: p}, nil
	case "oci-layout":
		name(op, "FROM "+rest)
		_, dg, _ := strings.Cut(rest, "@")
		if err := digest.Digest(dg).Validate(); err != nil {
			return nil, fmt.Errorf("source %q: %w", s.Identifier, err)
		}
		return &engine.Layout{Store: s.Attrs[pb.AttrOCILayoutStoreID], Digest: digest.Digest(dg), Platform: p}, nil
	case "local":
		name(op, "[internal] load build context")
		l := &engine.Local{Name: rest}
		for attr, to := range map[string]*[]string{pb.AttrIncludePatterns: &l.Include, pb.AttrExcludePatterns: &l.Exclude} {
			if v := s.Attrs[attr]; v != "" {
				if err := json.Unmarshal([]byte(v), to); err != nil {
					return nil, fmt.Errorf("source %q: %s: %w", s.Identifier, attr, err)
				}
			}
		}
		return l, nil
	case "http", "https":
		return nil, fmt.Errorf("ADD of a URL (%s) is not supported yet", s.Identifier)
	case "git":
		return nil, fmt.Errorf("ADD of a git repository (%s) is not supported yet", s.Identifier)
	}
	return nil, fmt.Errorf("source of kind %q is not supported", kind)
}
