package cli

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/sandbox/gvisor"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// machineInfo is what decides how builds run here.
type machineInfo struct {
	Version  Version
	Kernel   string
	CPUs     int
	UID      int
	Process  map[string]string // of /proc/self/status: capabilities, seccomp, no_new_privs
	Sandbox  sandboxInfo
	Store    string
	Free     int64 // bytes free for the store
	Usage    store.Usage
	StoreErr string `json:",omitempty"`
}

// sandboxInfo is what --sandbox=auto takes here, and why.
type sandboxInfo struct {
	Name     string
	Platform string `json:",omitempty"`
	Detail   string `json:",omitempty"`
	Err      string `json:",omitempty"` // why it cannot run; empty: it does
}

// probeTime is many times what a probe takes where the sandbox can run.
const probeTime = 10 * time.Second

func probeSandbox(ctx context.Context) sandboxInfo {
	ctx, cancel := context.WithTimeoutCause(ctx, probeTime, fmt.Errorf("no answer within %v", probeTime))
	defer cancel()
	s := gvisor.New(gvisor.Options{})
	i := sandboxInfo{Name: s.Name()}
	p, err := s.Probe(ctx)
	if err != nil {
		i.Err, _, _ = strings.Cut(err.Error(), "\n") // what follows is the sandbox's log
		return i
	}
	i.Platform, i.Detail = p.Platform, p.Detail
	return i
}

func newInfoCommand(app *App) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "info [OPTIONS]",
		Short: "Show what this machine allows, and what the store holds",
		Long: `Show what kiln finds here: its version, the privileges that it has, the sandbox that
would run the RUN steps of a build (which is tried out), and what the store holds.`,
		Example: "  kiln info --format json",
		Args:    nargs(0, 0),
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", "format of the output: json or a Go template")
	root := app.StoreFlag(cmd)
	completeFormats(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		i := app.machine(cmd, *root)
		switch format {
		case "":
			return app.printInfo(i)
		case "json":
			return json.NewEncoder(app.Out).Encode(i)
		}
		return printTemplate(app.Out, unescape(format), []machineInfo{i})
	}
	return cmd
}

func (a *App) machine(cmd *cobra.Command, root string) machineInfo {
	i := machineInfo{
		Version: buildVersion(), Kernel: kernel(), CPUs: runtime.GOMAXPROCS(0), UID: os.Geteuid(), Process: privileges(),
		Sandbox: probeSandbox(cmd.Context()),
	}
	st, err := a.OpenStore(root)
	if err == nil {
		i.Store = st.Root()
		i.Usage, err = st.Usage(cmd.Context())
		var fs unix.Statfs_t
		if e := unix.Statfs(i.Store, &fs); e == nil {
			i.Free = int64(fs.Bavail) * fs.Bsize
		}
	}
	if err != nil {
		i.StoreErr = err.Error()
	}
	return i
}

func kernel() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Sysname[:]) + " " + unix.ByteSliceToString(u.Release[:])
}

// privileges are the lines of /proc/self/status that tell what this process may do.
func privileges() map[string]string {
	m := map[string]string{}
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return m
	}
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		key, value, _ := strings.Cut(s.Text(), ":")
		switch key {
		case "CapEff", "CapBnd", "NoNewPrivs", "Seccomp":
			m[key] = strings.TrimSpace(value)
		}
	}
	return m
}

func (a *App) printInfo(i machineInfo) error {
	seccomp := map[string]string{"0": "none", "1": "strict", "2": "filter"}[i.Process["Seccomp"]]
	caps := i.Process["CapEff"]
	if strings.Trim(caps, "0") == "" {
		caps = "none"
	}
	gain := "may gain privileges"
	if i.Process["NoNewPrivs"] == "1" {
		gain = "may gain none (no_new_privs)"
	}
	lines := [][2]string{
		{"Version", i.Version.String()},
		{"Kernel", i.Kernel},
		{"CPUs", itoa(i.CPUs)},
		{"User", fmt.Sprintf("uid %d, %s", i.UID, gain)},
		{"Capabilities", caps},
		{"Seccomp", seccomp},
		{"Sandbox", i.Sandbox.String()},
		{"Store", i.Store},
	}
	if i.StoreErr != "" {
		lines[len(lines)-1][1] = "cannot be used: " + i.StoreErr
	} else {
		lines = append(lines,
			[2]string{" Free", humanSize(i.Free)},
			[2]string{" Images", fmt.Sprintf("%d %s", i.Usage.Tags.Count, plural(i.Usage.Tags.Count, "name"))},
			[2]string{" Blobs", amount(i.Usage.Blobs)},
			[2]string{" Layers", amount(i.Usage.Layers)},
			[2]string{" Total", humanSize(i.Usage.Total())},
		)
	}
	for _, l := range lines {
		if _, err := fmt.Fprintf(a.Out, "%-14s%s\n", l[0]+":", l[1]); err != nil {
			return fmt.Errorf("write output: %w", err)
		}
	}
	return nil
}

// String is one line.
func (i sandboxInfo) String() string {
	if i.Err != "" {
		return progress.Clean(i.Name + " cannot run here: " + i.Err)
	}
	s := i.Name + ", platform " + i.Platform + "; it needs no privilege"
	if i.Detail != "" {
		s += " (" + i.Detail + ")"
	}
	return s
}

func amount(a store.Amount) string { return fmt.Sprintf("%d, %s", a.Count, humanSize(a.Bytes)) }
