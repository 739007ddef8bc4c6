package sentry

import (
	"embed"
	"encoding/json"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/bpf"
	"gvisor.dev/gvisor/pkg/seccomp"
	"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
	"gvisor.dev/gvisor/pkg/sentry/platform"
	"gvisor.dev/gvisor/runsc/boot/filter/config"
)

// filters are seccomp programs compiled beforehand, as compiling one takes 60 ms
// of a processor, more than the rest of a boot. TestFilters writes them (-update)
// and checks that they are up to date.
//
//go:embed filters
var filters embed.FS

// filter is the seccomp program that confines the sentry itself: once it is
// installed the host kernel serves this process some 80 calls, and no open(2)
// or execve(2) among them.
type filter struct {
	built  chan struct{}
	instrs []bpf.Instruction
	err    error
}

// buildFilter starts to make the program, beside the boot.
func buildFilter(p platform.Platform, hostNetwork bool) *filter {
	f := &filter{built: make(chan struct{})}
	info := p.SeccompInfo()
	go func() {
		defer close(f.built)
		values := filterValues(info)
		if b, err := filters.ReadFile(filterFile(info, hostNetwork)); err == nil {
			var program precompiledseccomp.Program
			if f.err = json.Unmarshal(b, &program); f.err == nil {
				f.instrs, f.err = program.RenderInstructions(values)
			}
			return
		}
		f.instrs, _, f.err = filterProgram(info, hostNetwork, values).Build()
	}()
	return f
}

func filterFile(info platform.SeccompInfo, hostNetwork bool) string {
	network := "own"
	if hostNetwork {
		network = "host"
	}
	return fmt.Sprintf("filters/%s-%s-%s.json", runtime.GOARCH, info.ConfigKey(), network)
}

// selfPID is gVisor's name for the process id in a program.
const selfPID = "self_pid"

// filterValues are what in a program depends on the process.
func filterValues(info platform.SeccompInfo) precompiledseccomp.Values {
	values := info.Variables().Copy()
	values.SetUint64(selfPID, uint64(os.Getpid()))
	return values
}

// withValues has gVisor make its rules with other values than this process's.
type withValues struct {
	platform.SeccompInfo
	values precompiledseccomp.Values
}

// Variables implements platform.SeccompInfo.
func (w withValues) Variables() precompiledseccomp.Values { return w.values }

// filterProgram is gVisor's program for a sentry without a gofer or a control server.
func filterProgram(info platform.SeccompInfo, hostNetwork bool, values precompiledseccomp.Values) *seccomp.Program {
	opts := config.Options{Platform: withValues{info, values}, HostNetwork: hostNetwork}
	allow, deny := config.Rules(opts)
	// Both platforms put the process id of whoever asks into this rule.
	allow.Remove(unix.SYS_RT_TGSIGQUEUEINFO)
	allow.Set(unix.SYS_RT_TGSIGQUEUEINFO, seccomp.PerArg{
		seccomp.EqualTo(values.GetUint64(selfPID)), seccomp.AnyValue{}, seccomp.EqualTo(unix.SIGKILL),
	})
	return &seccomp.Program{
		RuleSets: []seccomp.RuleSet{{Rules: deny}, {Rules: allow, Action: seccomp.Allow}},
		Options:  config.SeccompOptions(opts),
	}
}

// install waits for the program and installs it in all threads, for good.
func (f *filter) install() error {
	<-f.built
	if f.err != nil {
		return fmt.Errorf("build seccomp filter: %w", f.err)
	}
	if err := seccomp.SetFilter(f.instrs); err != nil {
		return fmt.Errorf("install seccomp filter: %w", err)
	}
	return nil
}
