// Package llb decodes BuildKit's graph (LLB, protobuf) into the engine's typed
// operations. What the engine cannot do is refused here, by name and with its
// place in the Dockerfile, never ignored.
package llb

import (
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
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/source"
)

// Bounds of a graph. BuildKit's own clients stay far below: a Dockerfile has a few
// operations a line, and an action for each source of a COPY.
const (
	maxOps     = 20_000
	maxInputs  = 1000   // of one operation
	maxActions = 10_000 // of one file operation
)

// Decode decodes a definition. A nil or empty one is the empty file system.
func Decode(def *pb.Definition) (*engine.Graph, error) {
	if def == nil || len(def.Def) == 0 {
		return &engine.Graph{}, nil
	}
	if len(def.Def) > maxOps {
		return nil, fmt.Errorf("the build graph has %d operations: more than %d are refused", len(def.Def), maxOps)
	}
	d := &decoder{
		def: def, raw: map[string]*pb.Op{}, ops: map[string]*engine.Op{}, graph: &engine.Graph{},
		lines: map[int32][]string{},
	}
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
	in, err := d.input(last.Inputs[0])
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
	lines map[int32][]string // of the source files, by their index
}

func (d *decoder) input(in *pb.Input) (engine.Input, error) {
	op, err := d.op(in.Digest)
	if err != nil {
		return engine.Input{}, err
	}
	results := 1
	if x, ok := op.Do.(*engine.Exec); ok {
		results = x.NumResults()
	}
	if in.Index < 0 || in.Index >= int64(results) {
		return engine.Input{}, fmt.Errorf("decode build graph: result %d of an operation that has %d", in.Index, results)
	}
	return engine.Input{Op: op, Index: int(in.Index)}, nil
}

// op decodes an operation after its inputs. They cannot be a cycle: each names its
// inputs by the digest of their bytes.
func (d *decoder) op(dgst string) (*engine.Op, error) {
	if op, ok := d.ops[dgst]; ok {
		return op, nil
	}
	raw, ok := d.raw[dgst]
	if !ok {
		return nil, fmt.Errorf("decode build graph: operation %q is not in it", dgst)
	}
	if len(raw.Inputs) > maxInputs {
		return nil, fmt.Errorf("decode build graph: an operation has %d inputs: more than %d are refused", len(raw.Inputs), maxInputs)
	}
	op := &engine.Op{Digest: digest.Digest(dgst), At: d.location(dgst)}
	d.describe(op, dgst)
	for _, in := range raw.Inputs {
		i, err := d.input(in)
		if err != nil {
			var e *diag.Error
			if errors.As(err, &e) && e.At == nil { // a source has no line of its own
				e.At = op.At
			}
			return nil, err
		}
		if r, ok := i.Op.Do.(*engine.Remote); ok && r != nil && i.Op.At == nil {
			i.Op.At = op.At
		}
		op.Inputs = append(op.Inputs, i)
	}
	var err error
	if d.def.Metadata[dgst].GetLinuxResources() != nil {
		err = errors.New("limits of memory and CPU for a step are not supported: steps have no control group of their own")
	} else {
		op.Do, err = d.operation(raw, op)
	}
	if err != nil {
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
	if g := m.ProgressGroup; g != nil {
		op.Group = &progress.Group{ID: g.Id, Name: g.Name, Weak: g.Weak}
		if op.Name == "" {
			op.Name = g.Name
		}
	}
	if s := stageInName.FindStringSubmatch(op.Name); s != nil {
		op.Stage = s[1]
	}
}

func (d *decoder) location(dgst string) *diag.Location {
	infos := d.def.Source.GetInfos()
	for _, l := range d.def.Source.GetLocations()[dgst].GetLocations() {
		n := l.GetSourceIndex()
		if n < 0 || int(n) >= len(infos) || len(l.GetRanges()) == 0 {
			continue
		}
		if d.lines[n] == nil { // split once, not for each operation
			d.lines[n] = strings.Split(string(infos[n].GetData()), "\n")
		}
		first, last := l.Ranges[0], l.Ranges[len(l.Ranges)-1] // one for each line
		return &diag.Location{
			File: infos[n].GetFilename(), Line: int(first.GetStart().GetLine()), EndLine: int(last.GetEnd().GetLine()), Source: d.lines[n],
		}
	}
	return nil
}

func (d *decoder) operation(raw *pb.Op, op *engine.Op) (engine.Operation, error) {
	if c := raw.Constraints; c != nil && len(c.Filter) > 0 {
		return nil, fmt.Errorf("an operation for workers with %q is not supported: there is one worker", c.Filter)
	}
	switch do := raw.Op.(type) {
	case *pb.Op_Source:
		return sourceOp(do.Source, platform(raw.Platform), op)
	case *pb.Op_Exec:
		return exec(do.Exec, raw, op)
	case *pb.Op_File:
		return file(do.File, len(raw.Inputs), op)
	case *pb.Op_Merge:
		inputs := do.Merge.GetInputs()
		for i, in := range inputs {
			if in.GetInput() != int64(i) || len(inputs) != len(raw.Inputs) {
				return nil, errors.New("a merge must take all its inputs, in order")
			}
		}
		name(op, "merge")
		return &engine.Merge{}, nil
	case *pb.Op_Diff:
		if err := diffInputs(do.Diff, op); err != nil {
			return nil, err
		}
		name(op, "diff")
		return &engine.Diff{}, nil
	case *pb.Op_Build:
		return nil, errors.New("the nested build operation is not supported")
	default:
		return nil, fmt.Errorf("operation %T is not supported", do)
	}
}

// diffInputs puts the inputs of a diff into the engine's order: below, above.
func diffInputs(d *pb.DiffOp, op *engine.Op) error {
	if d.GetLower() == nil || d.GetUpper() == nil {
		return errors.New("a diff of one file system")
	}
	raw := op.Inputs
	op.Inputs = nil
	for _, n := range []int64{d.GetLower().GetInput(), d.GetUpper().GetInput()} {
		switch {
		case n == int64(pb.Empty):
			op.Inputs = append(op.Inputs, engine.Input{})
		case n >= 0 && n < int64(len(raw)):
			op.Inputs = append(op.Inputs, raw[n])
		default:
			return fmt.Errorf("a diff of input %d, which there is not", n)
		}
	}
	return nil
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

func sourceOp(s *pb.SourceOp, p ocispec.Platform, op *engine.Op) (engine.Operation, error) {
	kind, rest, ok := strings.Cut(s.GetIdentifier(), "://")
	if !ok {
		return nil, fmt.Errorf("source %q has no kind", s.Identifier)
	}
	if s.Attrs[pb.AttrMetadataTransfer] != "" {
		return nil, fmt.Errorf("source %q: files without their content are not supported", s.Identifier)
	}
	switch kind {
	case "docker-image":
		name(op, "FROM "+rest)
		return imageSource(rest, s.Attrs, p)
	case "oci-layout":
		name(op, "FROM "+rest)
		return layoutSource(rest, s.Attrs, p)
	case "local":
		name(op, "[internal] load build context")
		sel, err := source.LocalSelection(rest, s.Attrs)
		return &engine.Local{Selection: sel}, err
	}
	r, err := RemoteSource(s.Identifier, s.Attrs)
	if err != nil {
		return nil, err
	}
	return remoteOp(op, r), nil
}
