package sentry

import (
	"fmt"

	"gvisor.dev/gvisor/pkg/bpf"
	"gvisor.dev/gvisor/pkg/seccomp"
	"gvisor.dev/gvisor/pkg/sentry/platform"
	"gvisor.dev/gvisor/runsc/boot/filter/config"
)

// filter is the seccomp program that confines the sentry itself: once it is
// installed the host kernel serves this process some 80 calls, and no open(2)
// or execve(2) among them.
type filter struct {
	built  chan struct{}
	instrs []bpf.Instruction
	err    error
}

// buildFilter starts to compute the program: 40 ms of optimising that need not
// hold up the boot.
func buildFilter(p platform.Platform, hostNetwork bool) *filter {
	f := &filter{built: make(chan struct{})}
	opts := config.Options{Platform: p.SeccompInfo(), HostNetwork: hostNetwork}
	go func() {
		defer close(f.built)
		allow, deny := config.Rules(opts)
		program := &seccomp.Program{
			RuleSets: []seccomp.RuleSet{{Rules: deny}, {Rules: allow, Action: seccomp.Allow}},
			Options:  config.SeccompOptions(opts),
		}
		f.instrs, _, f.err = program.Build()
	}()
	return f
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
