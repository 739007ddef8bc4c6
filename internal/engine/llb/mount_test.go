package llb_test

import (
	"context"
	"reflect"
	"strings"
	"testing"

	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/internal/cachemount"
	kiln "github.com/kiln-build/kiln/internal/engine"
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

// TestKindsOfMounts: what clients of BuildKit's ask for.
func TestKindsOfMounts(t *testing.T) {
	root, other := llb.Image("root"), llb.Image("other")
	run := func(opts ...llb.RunOption) llb.ExecState {
		return root.Run(append([]llb.RunOption{llb.Args([]string{"true"})}, opts...)...)
	}
	empty := "/s"
	for name, x := range map[string]struct {
		state llb.State
		want  string
	}{
		"cache": {
			run(llb.AddMount("/c", llb.Scratch(), llb.AsPersistentCacheDir("id", llb.CacheMountShared))).Root(),
			`with cache "id", at first nothing, at "/c"`,
		},
		"cache of a part of a stage": {
			run(llb.AddMount("/c", other, llb.AsPersistentCacheDir("id", llb.CacheMountLocked), llb.SourcePath("/x"), llb.Readonly)).Root(),
			`with cache "id", at first "x" of #2, at "/c", read-only`,
		},
		"secret":  {run(llb.AddSecret("/s", llb.SecretID("top"))).Root(), `with secret "top" at "/s"`},
		"secrets": {run(llb.AddSecretWithDest("a", nil, llb.SecretAsEnvName("A")), llb.AddSecretWithDest("b", &empty)).Root(), `with secret "a" in $A | with secret "b" at "/s"`},
		"agent":   {run(llb.AddSSHSocket()).Root(), `with SSH agent "default" at "/run/buildkit/ssh_agent.0"`},
		"result":  {run(llb.AddMount("/m", other)).GetMount("/m"), `with "." of #2 at "/m", a result | result: #3.2`},
		"read-only root, one result": {
			run(llb.ReadonlyRootFS(), llb.AddMount("/m", llb.Scratch())).GetMount("/m"),
			`which cannot write to its root | with nothing at "/m", a result | result: #2`,
		},
		"results of results": {
			run(llb.AddMount("/m", run(llb.AddMount("/n", other)).GetMount("/n"), llb.Readonly)).Root(),
			`with "." of #2 at "/n", a result | with "." of #3.2 at "/m", read-only | result: #4`,
		},
	} {
		got, err := decode(t, x.state)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		var with []string
		for line := range strings.Lines(got) {
			if l := strings.TrimSpace(line); strings.HasPrefix(l, "with ") || strings.HasPrefix(l, "which ") || strings.HasPrefix(l, "result: ") && strings.Contains(x.want, "result") {
				with = append(with, l)
			}
		}
		if have := strings.Join(with, " | "); have != x.want {
			t.Errorf("%s: got %s\nwant %s\nin\n%s", name, have, x.want, got)
		}
	}
}

// TestExecFields: what a mount, a limit and an exit code say reaches the engine.
func TestExecFields(t *testing.T) {
	hello := "/hello"
	def, err := llb.Image("root").Run(
		llb.Args([]string{"true"}), llb.AddSecretWithDest("s", &hello, llb.SecretFileOpt(1, 2, 0o440)), llb.AddSSHSocket(llb.SSHID("k"), llb.SSHSocketOpt("/k", 3, 4, 0o660), llb.SSHOptional),
		llb.AddMount("/p", llb.Scratch(), llb.AsPersistentCacheDir("p", llb.CacheMountPrivate)), llb.AddUlimit(llb.UlimitNofile, 5, 6), llb.AddUlimit(llb.UlimitCore, -1, -1),
		llb.ValidExitCodes(0, 3), llb.WithCgroupParent("ignored"),
	).Root().Marshal(context.Background(), llb.LinuxAmd64)
	if err != nil {
		t.Fatal(err)
	}
	g, err := engine.Decode(def.ToPB())
	if err != nil {
		t.Fatal(err)
	}
	x, ok := g.Target.Op.Do.(*kiln.Exec)
	if !ok || len(x.Mounts) != 3 {
		t.Fatalf("%+v", g.Target.Op.Do)
	}
	const unlimited = ^uint64(0)
	for name, ok := range map[string]bool{
		"limits":     reflect.DeepEqual(x.Ulimits, []kiln.Ulimit{{Resource: unix.RLIMIT_NOFILE, Soft: 5, Hard: 6}, {Resource: unix.RLIMIT_CORE, Soft: unlimited, Hard: unlimited}}),
		"exit codes": reflect.DeepEqual(x.Success, []int{0, 3}),
		"cache":      *x.Mounts[0].Cache == kiln.CacheMount{ID: "p", Sharing: cachemount.Private},
		"secret":     *x.Mounts[1].Secret == kiln.SecretMount{ID: "s", Owner: kiln.Owner{UID: 1, GID: 2, Mode: 0o440}},
		"agent":      *x.Mounts[2].SSH == kiln.SSHMount{ID: "k", Owner: kiln.Owner{UID: 3, GID: 4, Mode: 0o660}, Optional: true},
	} {
		if !ok {
			t.Errorf("%s: %+v", name, x)
		}
	}
}

// TestLinuxResources: bounds that nobody would keep to are refused.
func TestLinuxResources(t *testing.T) {
	_, err := decode(t, llb.Image("root").Run(llb.Args([]string{"true"}), llb.WithLinuxResources(llb.LinuxResources{Memory: 1 << 20})).Root())
	if err == nil || !strings.Contains(err.Error(), "limits of memory and CPU") {
		t.Error(err)
	}
}

func TestMountsRefused(t *testing.T) {
	// What no client of BuildKit's writes.
	for want, ms := range map[string][]*pb.Mount{
		"without a root":                          {{Dest: "/m", Output: -1}},
		"several root file systems":               {{Dest: "/"}, {Dest: "/"}},
		"a root file system of type tmpfs":        {{Dest: "/", MountType: pb.MountType_TMPFS}},
		"mounts input 7":                          {{Dest: "/"}, {Dest: "/m", Input: 7, Output: -1}},
		"mounts input -2":                         {{Dest: "/"}, {Dest: "/m", Input: -2, Output: -1}},
		`invalid mount target "/x/.."`:            {{Dest: "/"}, {Dest: "/x/..", Output: -1}},
		"1001 mounts: more than 1000 are refused": make([]*pb.Mount, 1001),
		"result 0 of an operation that has 0":     {{Dest: "/", Output: -1}},
		"type=cache (at /c) without its options":  {{Dest: "/"}, {Dest: "/c", MountType: pb.MountType_CACHE}},
		"sharing 7 is not known":                  {{Dest: "/"}, {Dest: "/c", MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{Sharing: 7}}},
		"type=secret (at /s) without an id":       {{Dest: "/"}, {Dest: "/s", MountType: pb.MountType_SECRET}},
		"type=ssh (at /s) without its options":    {{Dest: "/"}, {Dest: "/s", MountType: pb.MountType_SSH}},
		"type=9 (at /s) is not supported":         {{Dest: "/"}, {Dest: "/s", MountType: 9}},
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
