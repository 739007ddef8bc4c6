package frontend

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/progress"
)

// execs are the RUN steps of a plan, by their command.
func execs(t *testing.T, p *Plan) map[string]*pb.ExecOp {
	t.Helper()
	all := map[string]*pb.ExecOp{}
	for _, b := range p.Platforms[0].Definition.Def {
		var op pb.Op
		if err := op.Unmarshal(b); err != nil {
			t.Fatal(err)
		}
		if x := op.GetExec(); x != nil {
			all[x.Meta.Args[len(x.Meta.Args)-1]] = x
		}
	}
	return all
}

// anew are the commands of RUN steps that are not to be taken from the cache.
func anew(t *testing.T, p *Plan) (all []string) {
	t.Helper()
	for _, b := range p.Platforms[0].Definition.Def {
		var op pb.Op
		if err := op.Unmarshal(b); err != nil {
			t.Fatal(err)
		}
		m := p.Platforms[0].Definition.Metadata[digest.FromBytes(b).String()]
		if x := op.GetExec(); x != nil && m.GetIgnoreCache() {
			all = append(all, x.Meta.Args[len(x.Meta.Args)-1])
		}
	}
	slices.Sort(all)
	return all
}

func TestNoCacheFilter(t *testing.T) {
	const dockerfile = "FROM busybox AS one\nRUN echo one\nFROM busybox AS two\nRUN echo two\nFROM one\nCOPY --from=two /a /\nRUN echo three\n"
	for _, c := range []struct {
		all    bool
		filter []string
		want   []string
	}{
		{false, nil, nil},
		{true, nil, []string{"echo one", "echo three", "echo two"}},
		{false, []string{"ONE"}, []string{"echo one"}},
		{false, []string{"one", "two"}, []string{"echo one", "echo two"}},
		{false, []string{"nosuch"}, nil},
	} {
		in := input(dockerfile)
		in.NoCache, in.NoCacheFilter = c.all, c.filter
		var b bytes.Buffer
		p, err := Load(t.Context(), in, catalogue{}, progress.NewRecorder(progress.NewJSON(&b)))
		if err != nil {
			t.Fatal(err)
		}
		if got := anew(t, p); !slices.Equal(got, c.want) {
			t.Errorf("%v %q: runs %q anew, want %q", c.all, c.filter, got, c.want)
		}
		if warned := strings.Contains(b.String(), `no stage \"nosuch\"`); warned != slices.Contains(c.filter, "nosuch") {
			t.Errorf("%q: %s", c.filter, &b)
		}
	}
}

// Every build argument that means something to the builder rather than to the
// Dockerfile shows in the plan.
func TestBuilderArgs(t *testing.T) {
	const dockerfile = "# syntax=elsewhere/frontend\nFROM busybox\nRUN --mount=type=cache,target=/c,id=x true\n"
	load := func(args ...string) (*Plan, error) {
		in := input(dockerfile)
		in.BuildArgs["BUILDKIT_SYNTAX"] = "docker/dockerfile:1"
		for _, a := range args {
			k, v, _ := strings.Cut(a, "=")
			in.BuildArgs[k] = v
		}
		return Load(t.Context(), in, catalogue{}, nil)
	}
	p, err := load("BUILDKIT_SANDBOX_HOSTNAME=builder", "BUILDKIT_CACHE_MOUNT_NS=team", "BUILDKIT_MULTI_PLATFORM=1", "SOURCE_DATE_EPOCH=1700000000")
	if err != nil {
		t.Fatal(err)
	}
	x := execs(t, p)["true"]
	if x.Meta.Hostname != "builder" {
		t.Errorf("BUILDKIT_SANDBOX_HOSTNAME: the host name is %q", x.Meta.Hostname)
	}
	if id := x.Mounts[1].CacheOpt.GetID(); id != "team/x" {
		t.Errorf("BUILDKIT_CACHE_MOUNT_NS: the cache is %q", id)
	}
	if !p.Multi || len(p.Platforms) != 1 {
		t.Errorf("BUILDKIT_MULTI_PLATFORM: %t, %d", p.Multi, len(p.Platforms))
	}
	if e := p.Platforms[0].Epoch; e == nil || e.Unix() != 1_700_000_000 {
		t.Errorf("SOURCE_DATE_EPOCH: %v", e)
	}
	if p, err = load(); err != nil || p.Multi || p.Platforms[0].Epoch != nil {
		t.Errorf("without: %+v, %v", p, err)
	}
	for arg, want := range map[string]string{
		"BUILDKIT_SYNTAX=other/frontend:1":            `syntax "other/frontend:1" is not supported: it would be a program`,
		"BUILDKIT_SYNTAX=docker/dockerfilex":          "is not supported",
		"BUILDKIT_SYNTAX=":                            "invalid reference",
		"BUILDKIT_DOCKERFILE_CHECK=nonsense":          "failed to parse build-arg:BUILDKIT_DOCKERFILE_CHECK",
		"BUILDKIT_DOCKERFILE_CHECK=skip=none;error=1": "",
		"BUILDKIT_MULTI_PLATFORM=maybe":               "invalid boolean value for multi-platform",
		"SOURCE_DATE_EPOCH=yesterday":                 "invalid SOURCE_DATE_EPOCH: yesterday",
		"SOURCE_DATE_EPOCH=context":                   "",
	} {
		if _, err := load(arg); want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", arg, err, want)
		}
	}
}

func TestSyntax(t *testing.T) {
	for syntax, ok := range map[string]bool{
		"docker/dockerfile:1": true, "docker/dockerfile": true, "docker/dockerfile:1.7-labs": true, "docker.io/docker/dockerfile-upstream:master": true,
		"docker/dockerfile@" + digest.FromString("x").String(): true,
		"docker/dockerfile-evil":                               false, "evil/docker/dockerfile": false, "registry.example/docker/dockerfile:1": false, "other": false, "UPPER": false,
	} {
		_, err := Load(t.Context(), input("# syntax="+syntax+"\nFROM busybox\n"), catalogue{}, nil)
		if ok && err != nil {
			t.Errorf("%s: %v", syntax, err)
		}
		var d *diag.Error
		if !ok && (!errors.As(err, &d) || d.At == nil || d.At.Line != 1 || !strings.Contains(err.Error(), "syntax \""+syntax+"\"")) {
			t.Errorf("%s: %v", syntax, err)
		}
	}
}

// The Dockerfile's own epoch counts where the build has none.
func TestEpochOfDockerfile(t *testing.T) {
	for arg, want := range map[string]int64{"": 0, "5": 5} {
		in := input("ARG SOURCE_DATE_EPOCH=3\nFROM busybox\n")
		if arg != "" {
			in.BuildArgs["SOURCE_DATE_EPOCH"] = arg
		} else {
			want = 3
		}
		p, err := Load(t.Context(), in, catalogue{}, nil)
		if err != nil || p.Platforms[0].Epoch == nil || p.Platforms[0].Epoch.Unix() != want {
			t.Errorf("%q: %+v, %v", arg, p, err)
		}
	}
}
