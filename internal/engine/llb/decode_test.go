package llb_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/engine"
	"github.com/kiln-build/kiln/internal/engine/llb"
	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/source"
	"github.com/kiln-build/kiln/internal/source/remote"
	"github.com/kiln-build/kiln/internal/tree/memtree"
)

var update = flag.Bool("update", false, "write the plans as they are now")

// catalogue resolves any reference to an image without layers.
type catalogue struct{}

func (catalogue) Resolve(_ context.Context, ref string, p ocispec.Platform) (*image.Image, error) {
	if strings.Contains(ref, "nosuch") {
		return nil, diag.New(diag.ExitRegistry, "image %q: not found", ref)
	}
	onbuild := ""
	if strings.Contains(ref, "onbuild") {
		onbuild = `,"OnBuild":["COPY a /onbuild","RUN echo onbuild"]`
	}
	c := fmt.Sprintf(`{"os":%q,"architecture":%q,"config":{"Env":["PATH=/bin"]%s},"rootfs":{"type":"layers","diff_ids":[%q]}}`,
		p.OS, p.Architecture, onbuild, digest.FromString("layer"))
	return &image.Image{Ref: ref, Digest: digest.FromString(ref), RawConfig: []byte(c)}, nil
}

func (catalogue) Describe(context.Context, string, map[string]string, remote.Ask) (remote.Metadata, error) {
	return remote.Metadata{}, errors.New("there is nothing remote")
}

func (catalogue) ResolveLayout(context.Context, string, digest.Digest, ocispec.Platform) (*image.Image, error) {
	return nil, errors.New("there is no layout")
}

func input(dockerfile string) frontend.Input {
	files := map[string]memtree.File{
		"a": {Data: "a"}, "b": {Data: "b"}, "dir/f": {}, "dir/.hidden": {}, "app.tar": {}, ".dockerignore": {Data: "secret\n*.log\n!keep.log\n"},
	}
	return frontend.Input{
		Filename: "Dockerfile", Platforms: []ocispec.Platform{{OS: "linux", Architecture: "amd64"}},
		BuildArgs:     map[string]string{"HTTP_PROXY": "http://proxy.example:3128", "BUILDPLATFORM": "linux/amd64"},
		NamedContexts: map[string]string{"base": "docker-image://alpine:3", "files": "local:named-files"},
		Contexts: source.Trees{
			frontend.ContextName:    memtree.New(files),
			frontend.DockerfileName: memtree.New(map[string]memtree.File{"Dockerfile": {Data: dockerfile}}),
			"named-files":           memtree.New(map[string]memtree.File{"x": {}}),
		},
	}
}

func load(t testing.TB, in frontend.Input) (*frontend.Plan, error) {
	t.Helper()
	return frontend.Load(context.Background(), in, catalogue{}, nil)
}

// TestPlans holds what Dockerfiles become: the graph, or why they are refused.
// Run with -update after a change that is meant.
func TestPlans(t *testing.T) {
	names, err := filepath.Glob("testdata/*.Dockerfile")
	if err != nil || len(names) < 12 {
		t.Fatal(names, err)
	}
	for _, name := range names {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".Dockerfile"), func(t *testing.T) {
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			got := describe(t, string(b))
			golden := strings.TrimSuffix(name, ".Dockerfile") + ".plan"
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("the plan is\n%s\nand was\n%s", got, want)
			}
		})
	}
}

func describe(t *testing.T, dockerfile string) string {
	plan, err := load(t, input(dockerfile))
	if err != nil {
		return failure(err)
	}
	var out strings.Builder
	for _, p := range plan.Platforms {
		g, err := llb.Decode(p.Definition)
		if err != nil {
			return failure(err)
		}
		g.Print(&out)
	}
	return out.String()
}

func failure(err error) string {
	return fmt.Sprintf("error: %v\nexit code %d\n", err, diag.ExitCode(err))
}

// TestDockerfileErrors: each names its line once.
func TestDockerfileErrors(t *testing.T) {
	for _, c := range []struct {
		name, dockerfile, want string
		code                   int
	}{
		{"unknown instruction", "FROM scratch\nCOPPY a b\n", `Dockerfile:2: unknown instruction: COPPY (did you mean COPY?)`, diag.ExitDockerfile},
		{"no image", "FROM scratch\n\nFROM nosuch:1\n", `Dockerfile:3: `, diag.ExitRegistry},
		{"unknown flag", "FROM scratch\nCOPY --foo a b\n", `Dockerfile:2: unknown flag: --foo`, diag.ExitDockerfile},
		{"empty", "# nothing\n", `Dockerfile:1: file with no instructions`, diag.ExitDockerfile},
		{"no stage", "FROM scratch\nCOPY --from=nostage:nosuch a b\n", `Dockerfile:2: `, diag.ExitRegistry},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := load(t, input(c.dockerfile))
			if err == nil {
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), c.want) || strings.Count(err.Error(), "Dockerfile:") > 1 {
				t.Errorf("the error is %q, want %q", err, c.want)
			}
			if diag.ExitCode(err) != c.code {
				t.Errorf("exit code %d, want %d", diag.ExitCode(err), c.code)
			}
		})
	}
}

// definition marshals operations; the last one names the one before it as the result.
func definition(t testing.TB, ops ...*pb.Op) *pb.Definition {
	t.Helper()
	def := &pb.Definition{}
	last := ""
	for _, op := range append(ops, nil) {
		if op == nil {
			op = &pb.Op{Inputs: []*pb.Input{{Digest: last}}}
		}
		b, err := op.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		def.Def = append(def.Def, b)
		last = digest.FromBytes(b).String()
	}
	return def
}

func digestOf(t testing.TB, op *pb.Op) string {
	b, err := op.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return digest.FromBytes(b).String()
}

// TestHostileGraphs: what no front end makes is an error, and no panic.
func TestHostileGraphs(t *testing.T) {
	src := &pb.Op{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "docker-image://docker.io/library/a:1"}}}
	in := []*pb.Input{{Digest: digestOf(t, src)}}
	root := []*pb.Mount{{Dest: "/", Input: 0}}
	meta := &pb.Meta{Args: []string{"true"}}
	exec := func(e *pb.ExecOp, inputs ...*pb.Input) *pb.Op {
		return &pb.Op{Op: &pb.Op_Exec{Exec: e}, Inputs: inputs}
	}
	file := func(as ...*pb.FileAction) *pb.Op {
		return &pb.Op{Op: &pb.Op_File{File: &pb.FileOp{Actions: as}}, Inputs: in}
	}
	mkdir := func(input, output int64) *pb.FileAction {
		return &pb.FileAction{Input: input, Output: output, Action: &pb.FileAction_Mkdir{Mkdir: &pb.FileActionMkDir{Path: "/d"}}}
	}
	many := make([]*pb.FileAction, 20_000)
	for i := range many {
		many[i] = mkdir(0, -1)
	}
	lots := make([]*pb.Input, 2000)
	for i := range lots {
		lots[i] = in[0]
	}
	for name, ops := range map[string][]*pb.Op{
		"a command without arguments":  {src, exec(&pb.ExecOp{Mounts: root, Meta: &pb.Meta{}}, in...)},
		"no meta":                      {src, exec(&pb.ExecOp{Mounts: root}, in...)},
		"no mounts":                    {src, exec(&pb.ExecOp{Meta: meta}, in...)},
		"two roots":                    {src, exec(&pb.ExecOp{Meta: meta, Mounts: []*pb.Mount{{Dest: "/"}, {Dest: "/"}}}, in...)},
		"root is an input that is not": {src, exec(&pb.ExecOp{Meta: meta, Mounts: []*pb.Mount{{Dest: "/", Input: 7}}}, in...)},
		"root is 0 of none":            {exec(&pb.ExecOp{Meta: meta, Mounts: root})},
		"no result":                    {src, exec(&pb.ExecOp{Meta: meta, Mounts: []*pb.Mount{{Dest: "/", Output: -1}}}, in...)},
		"an unknown limit":             {src, exec(&pb.ExecOp{Meta: &pb.Meta{Args: []string{"a"}, Ulimit: []*pb.Ulimit{{Name: "x"}}}, Mounts: root}, in...)},
		"an impossible limit":          {src, exec(&pb.ExecOp{Meta: &pb.Meta{Args: []string{"a"}, Ulimit: []*pb.Ulimit{{Name: "nofile", Soft: 2, Hard: 1}}}, Mounts: root}, in...)},
		"an unknown network":           {src, exec(&pb.ExecOp{Meta: meta, Mounts: root, Network: 9}, in...)},
		"a secret without a name":      {src, exec(&pb.ExecOp{Meta: meta, Mounts: root, Secretenv: []*pb.SecretEnv{{ID: "x"}}}, in...)},
		"an empty operation":           {src, {Inputs: in}, {Inputs: in}},
		"no file actions":              {src, file()},
		"no file result":               {src, file(mkdir(0, -1))},
		"two file results":             {src, file(mkdir(0, 0), mkdir(0, 1))},
		"result twice":                 {src, file(mkdir(0, 0), mkdir(0, 0))},
		"input beyond the last":        {src, file(mkdir(5, 0))},
		"input below the first":        {src, file(mkdir(-2, 0))},
		"action that is to come":       {src, file(mkdir(1, 0))},
		"an action of no kind":         {src, file(&pb.FileAction{})},
		"many actions":                 {src, file(append(many, mkdir(0, 0))...)},
		"many inputs":                  {src, {Op: &pb.Op_Merge{Merge: &pb.MergeOp{}}, Inputs: lots}},
		"merge of other inputs":        {src, {Op: &pb.Op_Merge{Merge: &pb.MergeOp{Inputs: []*pb.MergeInput{{Input: 9}}}}, Inputs: in}},
		"merge of fewer inputs":        {src, {Op: &pb.Op_Merge{Merge: &pb.MergeOp{Inputs: []*pb.MergeInput{{Input: 0}}}}, Inputs: append(in, in...)}},
		"missing input":                {file(mkdir(0, 0))},
		"second output of an input":    {src, {Op: &pb.Op_Merge{Merge: &pb.MergeOp{}}, Inputs: []*pb.Input{{Digest: in[0].Digest, Index: 1}}}},
		"diff of one":                  {src, {Op: &pb.Op_Diff{Diff: &pb.DiffOp{}}, Inputs: in}},
		"diff of what is not": {src, {Op: &pb.Op_Diff{Diff: &pb.DiffOp{
			Lower: &pb.LowerDiffInput{Input: -1}, Upper: &pb.UpperDiffInput{Input: 7},
		}}, Inputs: in}},
		"source of no kind":          {{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "x"}}}},
		"checksum that is none":      {{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "https://y", Attrs: map[string]string{pb.AttrHTTPChecksum: "x"}}}}},
		"signature of a file":        {{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "https://y", Attrs: map[string]string{pb.AttrHTTPSignatureVerify: "x"}}}}},
		"signature of a commit":      {{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "git://h/y", Attrs: map[string]string{pb.AttrGitSignatureVerifyPubKey: "x"}}}}},
		"git option as a ref":        {{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "git://h/y#--upload-pack=x"}}}},
		"git option as a repository": {{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "git://h/y", Attrs: map[string]string{pb.AttrFullRemoteURL: "--upload-pack=x"}}}}},
		"local git repository":       {{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "git://h/y", Attrs: map[string]string{pb.AttrFullRemoteURL: "file:///etc"}}}}},
		"source of unknown kind":     {{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "x://y"}}}},
		"layout without digest":      {{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "oci-layout://y"}}}},
		"patterns that are no JSON":  {{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "local://y", Attrs: map[string]string{pb.AttrExcludePatterns: "x"}}}}},
		"an image's checksum":        {{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "docker-image://y", Attrs: map[string]string{pb.AttrImageChecksum: "x"}}}}},
		"files without content":      {{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "local://y", Attrs: map[string]string{pb.AttrMetadataTransfer: "true"}}}}},
		"a limit of no layers":       {{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "docker-image://y", Attrs: map[string]string{pb.AttrImageLayerLimit: "0"}}}}},
		"a limit that is no number":  {{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "docker-image://y", Attrs: map[string]string{pb.AttrImageLayerLimit: ""}}}}},
		"a limit in a layout": {{Op: &pb.Op_Source{Source: &pb.SourceOp{
			Identifier: "oci-layout://y@" + in[0].Digest, Attrs: map[string]string{pb.AttrOCILayoutLayerLimit: "-1"},
		}}}},
	} {
		t.Run(name, func(t *testing.T) {
			if g, err := llb.Decode(definition(t, ops...)); err == nil {
				t.Errorf("decoded: %+v", g.Target.Op)
			}
		})
	}
	for name, def := range map[string]*pb.Definition{
		"no bytes":  {Def: [][]byte{nil}},
		"no result": {Def: [][]byte{must(src.Marshal())}},
		"garbage":   {Def: [][]byte{{0xff, 0xff}}},
		"too many":  {Def: make([][]byte, 100_000)},
	} {
		if _, err := llb.Decode(def); err == nil {
			t.Errorf("%s: decoded", name)
		}
	}
	for _, def := range []*pb.Definition{nil, {}} {
		if g, err := llb.Decode(def); err != nil || g.Target.Op != nil {
			t.Errorf("an empty definition: %v %v", g, err)
		}
	}
}

func TestImageAttributes(t *testing.T) {
	sum := digest.FromString("x")
	for _, c := range []struct {
		op   *pb.SourceOp
		want engine.Operation
	}{
		{&pb.SourceOp{Identifier: "docker-image://y", Attrs: map[string]string{pb.AttrImageChecksum: sum.String(), pb.AttrImageLayerLimit: "2"}}, &engine.Image{Ref: "y", Checksum: sum, Limit: 2}},
		{
			&pb.SourceOp{Identifier: "oci-layout://y@" + sum.String(), Attrs: map[string]string{pb.AttrOCILayoutStoreID: "s", pb.AttrOCILayoutLayerLimit: "3"}},
			&engine.Layout{Store: "s", Digest: sum, Limit: 3},
		},
	} {
		g, err := llb.Decode(definition(t, &pb.Op{Op: &pb.Op_Source{Source: c.op}}))
		if err != nil {
			t.Fatal(err)
		}
		got := g.Target.Op.Do
		switch do := got.(type) {
		case *engine.Image:
			do.Platform = ocispec.Platform{}
		case *engine.Layout:
			do.Platform = ocispec.Platform{}
		}
		if !reflect.DeepEqual(got, c.want) {
			t.Errorf("got %+v instead of %+v", got, c.want)
		}
	}
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

// TestHostileSourceMap: places that there are not do no harm.
func TestHostileSourceMap(t *testing.T) {
	src := &pb.Op{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "nosuch://x"}}}
	def := definition(t, src)
	at := func(i int32, rs ...*pb.Range) *pb.Locations {
		return &pb.Locations{Locations: []*pb.Location{{SourceIndex: i, Ranges: rs}}}
	}
	for name, l := range map[string]*pb.Locations{
		"nil": nil, "none": {}, "nil in a list": {Locations: []*pb.Location{nil}}, "negative": at(-1, &pb.Range{}), "beyond": at(9, &pb.Range{}),
		"no range": at(0), "nil range": at(0, nil), "empty range": at(0, &pb.Range{}), "nil info": at(1, &pb.Range{}),
	} {
		def.Source = &pb.Source{Infos: []*pb.SourceInfo{{Filename: "F"}, nil}, Locations: map[string]*pb.Locations{digestOf(t, src): l}}
		if _, err := llb.Decode(def); err == nil {
			t.Errorf("%s: decoded", name)
		}
	}
	def.Source = nil
	def.Metadata = map[string]*pb.OpMetadata{digestOf(t, src): nil}
	if _, err := llb.Decode(def); err == nil {
		t.Error("decoded")
	}
}

func FuzzDecode(f *testing.F) {
	names, _ := filepath.Glob("testdata/*.Dockerfile")
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		plan, err := load(f, input(string(b)))
		if err != nil {
			continue
		}
		for _, p := range plan.Platforms {
			if b, err := p.Definition.Marshal(); err == nil {
				f.Add(b)
			}
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		def := &pb.Definition{}
		if def.Unmarshal(b) != nil {
			return
		}
		relink(def)
		g, err := llb.Decode(def)
		if err != nil {
			return
		}
		var out strings.Builder
		g.Print(&out)
	})
}

// relink makes inputs name the operation before, or the fuzzer would find no
// graph that holds together.
func relink(def *pb.Definition) {
	last := ""
	for i, b := range def.Def {
		op := &pb.Op{}
		if op.Unmarshal(b) != nil {
			return
		}
		for _, in := range op.Inputs {
			in.Digest = last
		}
		b, err := op.Marshal()
		if err != nil {
			return
		}
		def.Def[i] = b
		d := digest.FromBytes(b).String()
		if def.Metadata != nil {
			m := maps.Clone(def.Metadata)
			for _, v := range m {
				def.Metadata[d] = v
			}
		}
		last = d
	}
}
