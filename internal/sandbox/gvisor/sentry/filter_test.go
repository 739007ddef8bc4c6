package sentry

import (
	"encoding/json"
	"flag"
	"maps"
	"os"
	"slices"
	"testing"

	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/bpf"
	"gvisor.dev/gvisor/pkg/seccomp"
	"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
	"gvisor.dev/gvisor/pkg/sentry/platform"
	"gvisor.dev/gvisor/runsc/boot/filter/config"
)

var update = flag.Bool("update", false, "write the filters of this architecture")

// TestFilters: the embedded programs decide as gVisor's rules do. (Compiling
// is not deterministic, so they cannot be compared byte by byte.) An
// architecture without them compiles at every boot.
func TestFilters(t *testing.T) {
	for _, name := range []string{"systrap", "ptrace"} {
		ctor, err := platform.Lookup(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, info := range ctor.PrecompiledSeccompInfo() {
			for _, host := range []bool{false, true} {
				t.Run(filterFile(info, host), func(t *testing.T) { testFilter(t, info, host) })
			}
		}
	}
}

func testFilter(t *testing.T, info platform.SeccompInfo, host bool) {
	file := filterFile(info, host)
	if *update {
		names := slices.Sorted(maps.Keys(filterValues(info)))
		program, err := precompiledseccomp.Precompile(file, names, func(v precompiledseccomp.Values) *seccomp.Program {
			return filterProgram(info, host, v)
		})
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(program)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, append(b, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	b, err := filters.ReadFile(file)
	if err != nil {
		t.Skipf("none for this architecture: %v", err)
	}
	var embedded precompiledseccomp.Program
	if err := json.Unmarshal(b, &embedded); err != nil {
		t.Fatal(err)
	}
	got, err := embedded.RenderInstructions(filterValues(info))
	if err != nil {
		t.Fatal(err)
	}
	// What gVisor itself would install here.
	opts := config.Options{Platform: info, HostNetwork: host}
	allow, deny := config.Rules(opts)
	want, _, err := (&seccomp.Program{
		RuleSets: []seccomp.RuleSet{{Rules: deny}, {Rules: allow, Action: seccomp.Allow}}, Options: config.SeccompOptions(opts),
	}).Build()
	if err != nil {
		t.Fatal(err)
	}
	gotProgram, err := bpf.Compile(got, false)
	if err != nil {
		t.Fatal(err)
	}
	wantProgram, err := bpf.Compile(want, false)
	if err != nil {
		t.Fatal(err)
	}
	cases := append(allow.UsefulTestCases(), deny.UsefulTestCases()...)
	for nr := range int32(500) { // and calls that no rule names
		cases = append(cases, linux.SeccompData{Nr: nr, Arch: seccomp.LINUX_AUDIT_ARCH})
	}
	allowed := 0
	for _, c := range cases {
		g, w := decide(t, gotProgram, c), decide(t, wantProgram, c)
		if g != w {
			t.Fatalf("%s is out of date: for %+v it says %#x, want %#x: go test ./internal/sandbox/gvisor/sentry -run TestFilters -update", file, c, g, w)
		}
		if linux.BPFAction(g) == linux.SECCOMP_RET_ALLOW {
			allowed++
		}
	}
	if allowed == 0 || allowed == len(cases) {
		t.Errorf("%d of %d calls are allowed", allowed, len(cases))
	}
	t.Logf("%d instructions, %d calls tried, %d allowed", len(got), len(cases), allowed)
}

func decide(t *testing.T, p bpf.Program, c linux.SeccompData) uint32 {
	t.Helper()
	r, err := bpf.Exec[bpf.NativeEndian](p, seccomp.DataAsBPFInput(&c, make([]byte, c.SizeBytes())))
	if err != nil {
		t.Fatal(err)
	}
	return r
}
