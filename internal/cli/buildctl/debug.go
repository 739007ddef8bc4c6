package buildctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"text/tabwriter"
	"text/template"

	"github.com/kiln-build/kiln/internal/buildkitd"
	"github.com/kiln-build/kiln/internal/buildkitd/ctl"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/spf13/cobra"
)

const hintHistory = "Only servers remember builds."

func newDebug(s *server) *cobra.Command {
	cmd := &cobra.Command{Use: "debug", Short: "Look into a server", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(newWorkers(s), newInfo(s), newHistories(s), newLogs(s), newCtl(s), newMonitor(s), newDumpLLB(s),
		refused("get", "a blob can be had from the registry that it was pushed to"),
		refused("dump-metadata", "that is about files of BuildKit's server"))
	return cmd
}

// refused is a command of BuildKit's that there is not.
func refused(name, why string) *cobra.Command {
	return &cobra.Command{
		Use: name, Short: "Not supported", Hidden: true, DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return diag.New(diag.ExitUsage, "'%s' is not supported: %s", cmd.CommandPath(), why)
		},
	}
}

func newHistories(s *server) *cobra.Command {
	return historyCommand(s, "histories", "List the builds that a server remembers", nil)
}

func newPruneHistories(s *server) *cobra.Command {
	return historyCommand(s, "prune-histories", "Have a server forget builds, but for those that are pinned", (*ctl.Client).Forget)
}

// historyCommand lists builds, and does something with those that are not pinned.
func historyCommand(s *server, name, short string, do func(c *ctl.Client, ctx context.Context, ref string) error) *cobra.Command {
	var format string
	cmd := &cobra.Command{Use: name, Short: short, Args: cobra.NoArgs}
	cmd.Flags().StringVar(&format, "format", "", formatHelp)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		t, err := parseFormat(format)
		if err != nil {
			return err
		}
		c, err := s.need(cmd.Context(), cmd, hintHistory)
		if err != nil {
			return err
		}
		defer c.Close()
		tw := table(s.Out)
		if t == nil {
			fmt.Fprintln(tw, historyHeader)
		}
		var failed []error
		err = c.Histories(cmd.Context(), func(e *ctl.HistoryEvent) error {
			if do != nil {
				if e.Record == nil || e.Record.Pinned {
					return nil
				}
				if err := do(c, cmd.Context(), e.Record.Ref); err != nil {
					failed = append(failed, err)
					return nil
				}
			}
			return printHistory(s.Out, tw, t, e)
		})
		return errors.Join(append(failed, err, tw.Flush())...)
	}
	return cmd
}

const historyHeader = "TYPE\tREF\tCREATED\tCOMPLETED\tGENERATION\tPINNED"

// printHistory writes a row at once: there may be many.
func printHistory(w io.Writer, tw *tabwriter.Writer, t *template.Template, e *ctl.HistoryEvent) error {
	if t != nil {
		return execute(w, t, e)
	}
	pinned := ""
	if e.Record.GetPinned() {
		pinned = "*"
	}
	r := e.Record
	fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%d\t%s\n", e.Type, r.GetRef(), localTime(r.GetCreatedAt()), localTime(r.GetCompletedAt()), r.GetGeneration(), pinned)
	return tw.Flush()
}

func newLogs(s *server) *cobra.Command {
	var (
		mode  string
		trace bool
	)
	cmd := &cobra.Command{Use: "logs REF", Short: "Show what happened in a build", Args: cobra.ExactArgs(1)}
	cmd.Flags().StringVar(&mode, "progress", "auto", "how to show it: auto, plain, tty, rawjson, quiet")
	cmd.Flags().BoolVar(&trace, "trace", false, "not supported")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if trace {
			return diag.New(diag.ExitUsage, "--trace is not supported: no OpenTelemetry traces are kept")
		}
		c, err := s.need(cmd.Context(), cmd, hintHistory)
		if err != nil {
			return err
		}
		defer c.Close()
		out := *s.Console
		out.Err = s.Out // it is the result
		return out.WithProgress(mode, s.Debug, func(rec *progress.Recorder) error { return c.Logs(cmd.Context(), args[0], rec) })
	}
	return cmd
}

func newCtl(s *server) *cobra.Command {
	var pin, unpin, forget bool
	cmd := &cobra.Command{Use: "ctl REF", Short: "Change what a server remembers of a build", Args: cobra.ExactArgs(1)}
	cmd.Flags().BoolVar(&pin, "pin", false, "keep it")
	cmd.Flags().BoolVar(&unpin, "unpin", false, "do not keep it longer than others")
	cmd.Flags().BoolVar(&forget, "delete", false, "forget it")
	cmd.MarkFlagsOneRequired("pin", "unpin", "delete")
	cmd.MarkFlagsMutuallyExclusive("pin", "unpin", "delete")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := s.need(cmd.Context(), cmd, hintHistory)
		if err != nil {
			return err
		}
		defer c.Close()
		if forget {
			return c.Forget(cmd.Context(), args[0])
		}
		return c.Pin(cmd.Context(), args[0], pin)
	}
	return cmd
}

func newMonitor(s *server) *cobra.Command {
	var (
		completed bool
		ref       string
	)
	cmd := &cobra.Command{Use: "monitor", Short: "Show builds of a server as they come", Args: cobra.NoArgs}
	cmd.Flags().BoolVar(&completed, "completed", false, "those that have ended, too")
	cmd.Flags().StringVar(&ref, "ref", "", "only this one")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := s.need(cmd.Context(), cmd, hintHistory)
		if err != nil {
			return err
		}
		defer c.Close()
		return c.Monitor(cmd.Context(), ref, completed, func(e *ctl.HistoryEvent) error {
			r := e.Record
			fmt.Fprintf(s.Out, "event: %s ref:%s\n", e.Type, r.GetRef())
			if n := r.GetNumTotalSteps(); n != 0 {
				fmt.Fprintf(s.Out, "  cache: %d/%d\n", r.GetNumCachedSteps(), n)
			}
			if n := r.GetNumWarnings(); n != 0 {
				fmt.Fprintf(s.Out, "  warnings: %d\n", n)
			}
			return nil
		})
	}
	return cmd
}

func newDumpLLB(s *server) *cobra.Command {
	var dot bool
	cmd := &cobra.Command{Use: "dump-llb [FILE]", Short: "Show an LLB definition, from a file or standard input", Args: cobra.MaximumNArgs(1)}
	cmd.Flags().BoolVar(&dot, "dot", false, "not supported")
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		if dot {
			return diag.New(diag.ExitUsage, "--dot is not supported").WithHint("Without it, the output has an operation in JSON on each line.")
		}
		in := s.In
		if len(args) > 0 && args[0] != "-" {
			f, err := os.Open(args[0])
			if err != nil {
				return diag.New(diag.ExitUsage, "%w", err)
			}
			defer f.Close()
			in = f
		}
		def, err := frontend.ReadDefinition(in, false)
		if err != nil {
			return diag.New(diag.ExitUsage, "%w", err)
		}
		return ctl.DumpLLB(s.Out, def)
	}
	return cmd
}

// newDialStdio connects standard input and output with the server's socket, for clients on other machines.
func newDialStdio(s *server) *cobra.Command {
	cmd := &cobra.Command{Use: "dial-stdio", Short: "Connect standard input and output with a server's socket", Hidden: true, Args: cobra.NoArgs}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		addr := s.Addr
		if addr == "" {
			addr = s.Getenv("BUILDKIT_HOST")
		}
		if addr == "" {
			addr = buildkitd.DefaultAddr(os.Geteuid(), s.Getenv)
		}
		path, ok := strings.CutPrefix(addr, "unix://")
		if !ok {
			return diag.New(diag.ExitUsage, "address %q is no Unix socket, unix://PATH", addr)
		}
		conn, err := (&net.Dialer{}).DialContext(cmd.Context(), "unix", path)
		if err != nil {
			return fmt.Errorf("connect to the server: %w", err)
		}
		defer conn.Close()
		stop := context.AfterFunc(cmd.Context(), func() { conn.Close() })
		defer stop()
		go func() { // ends with the process: who waits for input cannot be told to stop
			_, _ = io.Copy(conn, s.In)
			if u, ok := conn.(*net.UnixConn); ok {
				_ = u.CloseWrite()
			}
		}()
		_, err = io.Copy(s.Out, conn)
		return err
	}
	return cmd
}
