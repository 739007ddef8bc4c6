package llb_test

import (
	"context"
	"strings"
	"testing"

	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	engine "github.com/kiln-build/kiln/internal/engine/llb"
)

// decode marshals a state as front ends do, and decodes it.
func decode(t *testing.T, s llb.State) (string, error) {
	t.Helper()
	def, err := s.Marshal(context.Background(), llb.LinuxAmd64)
	if err != nil {
		t.Fatal(err)
	}
	g, err := engine.Decode(def.ToPB())
	if err != nil {
		return "", err
	}
	var b strings.Builder
	g.Print(&b)
	return b.String(), nil
}

func TestMounts(t *testing.T) {
	root, other, local := llb.Image("root"), llb.Image("other"), llb.Local("context")
	run := func(opts ...llb.RunOption) llb.State {
		return root.Dir("/work").Run(append([]llb.RunOption{llb.Args([]string{"true"})}, opts...)...).Root()
	}
	for name, x := range map[string]struct {
		state llb.State
		want  string
	}{
		"several of one input": {
			run(
				llb.AddMount("/a", other, llb.SourcePath("/x/../y"), llb.Readonly),
				llb.AddMount("rel/b/", local, llb.ForceNoOutput),
				llb.AddMount("/c", other, llb.ForceNoOutput), llb.AddMount("/same", root, llb.Readonly),
			),
			`with "y" of #2 at "/a", read-only | with "." of #2 at "/c" | with "." of #1 at "/same", read-only | with "." of #3 at "/work/rel/b"`,
		},
		"tmpfs": {
			run(llb.AddMount("/t", llb.Scratch(), llb.Tmpfs(llb.TmpfsSize(4096))), llb.AddMount("/u", llb.Scratch(), llb.Tmpfs())),
			`with an empty directory of 4096 bytes at "/t" | with an empty directory at "/u"`,
		},
		"scratch root": {
			llb.Scratch().Run(llb.Args([]string{"/m/true"}), llb.AddMount("/m", other, llb.Readonly)).Root(),
			`with "." of #1 at "/m", read-only`,
		},
		"nothing": {
			run(llb.AddMount("/m", llb.Scratch(), llb.Readonly)),
			`with nothing at "/m", read-only`,
		},
	} {
		got, err := decode(t, x.state)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		var with []string
		for line := range strings.Lines(got) {
			if l := strings.TrimSpace(line); strings.HasPrefix(l, "with ") {
				with = append(with, l)
			}
		}
		if have := strings.Join(with, " | "); have != x.want {
			t.Errorf("%s: got %s\nwant %s\nin\n%s", name, have, x.want, got)
		}
	}
}

func TestMountsRefused(t *testing.T) {
	root := llb.Image("root")
	run := func(opts ...llb.RunOption) llb.ExecState {
		return root.Run(append([]llb.RunOption{llb.Args([]string{"true"})}, opts...)...)
	}
	for want, s := range map[string]llb.State{
		"RUN --mount=type=cache (at /c) is not supported yet":   run(llb.AddMount("/c", llb.Scratch(), llb.AsPersistentCacheDir("id", llb.CacheMountShared))).Root(),
		"RUN --mount=type=secret (at /s) is not supported yet":  run(llb.AddSecret("/s")).Root(),
		"RUN --mount=type=ssh (at /agent) is not supported yet": run(llb.AddSSHSocket(llb.SSHSocketTarget("/agent"))).Root(),
		"operations with several results are not supported":     run(llb.AddMount("/m", llb.Image("other"))).GetMount("/m"),
	} {
		got, err := decode(t, s)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s\n%s", err, want, got)
		}
	}
	// What no client of BuildKit's writes.
	for want, ms := range map[string][]*pb.Mount{
		"without a root":                       {{Dest: "/m", Output: -1}},
		"several root file systems":            {{Dest: "/"}, {Dest: "/"}},
		"a root file system that is read-only": {{Dest: "/", Readonly: true}},
		"a part of another":                    {{Dest: "/", Selector: "/x"}},
		"a RUN step whose result is what it wrote to a mount (at /m)": {{Dest: "/"}, {Dest: "/m"}},
		"mounts input 7":                          {{Dest: "/"}, {Dest: "/m", Input: 7, Output: -1}},
		"mounts input -2":                         {{Dest: "/"}, {Dest: "/m", Input: -2, Output: -1}},
		`invalid mount target "/x/.."`:            {{Dest: "/"}, {Dest: "/x/..", Output: -1}},
		"1001 mounts: more than 1000 are refused": make([]*pb.Mount, 1001),
	} {
		for i := range ms {
			if ms[i] == nil {
				ms[i] = &pb.Mount{Dest: "/"}
			}
		}
		if _, err := decodeMounts(t, ms); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

func decodeMounts(t *testing.T, ms []*pb.Mount) (string, error) {
	t.Helper()
	def, err := llb.Image("root").Run(llb.Args([]string{"true"})).Root().Marshal(context.Background(), llb.LinuxAmd64)
	if err != nil {
		t.Fatal(err)
	}
	p := def.ToPB()
	for i, b := range p.Def {
		op := &pb.Op{}
		if err := op.Unmarshal(b); err != nil {
			t.Fatal(err)
		}
		if op.GetExec() == nil {
			continue
		}
		op.GetExec().Mounts = ms
		if p.Def[i], err = op.Marshal(); err != nil {
			t.Fatal(err)
		}
		last := &pb.Op{Inputs: []*pb.Input{{Digest: digest.FromBytes(p.Def[i]).String()}}}
		if p.Def[len(p.Def)-1], err = last.Marshal(); err != nil {
			t.Fatal(err)
		}
		break
	}
	g, err := engine.Decode(p)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	g.Print(&b)
	return b.String(), nil
}
