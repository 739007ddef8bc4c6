// Package console is what all of Kiln's command lines share: the streams, how progress and
// errors are shown on them, where the store is.
package console

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/spf13/cobra"
)

// Streams are what a command reads and writes.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
}

// Console is where a command runs.
type Console struct {
	Streams
	// Getenv is asked for the environment variables that commands heed.
	Getenv func(string) string
}

// Execute runs a command and returns the exit code; an error is printed, last. When ctx
// ends, what runs is stopped and the code is ExitInterrupted.
func (c *Console) Execute(ctx context.Context, root *cobra.Command, args []string) int {
	root.SetIn(c.In)
	root.SetOut(c.Out)
	root.SetErr(c.Err)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return diag.ExitOK
	}
	var status ExitStatus
	if errors.As(err, &status) {
		return int(status)
	}
	if ctx.Err() != nil && errors.Is(err, context.Cause(ctx)) {
		err = diag.New(diag.ExitInterrupted, "interrupted")
	}
	PrintError(c.Err, err)
	return diag.ExitCode(err)
}

// ExitStatus is an error that is nothing but an exit code: what there was to say has been said.
type ExitStatus int

func (s ExitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// WithProgress runs f with a Recorder that is shown as mode asks for, warnings
// with all that is known of them if it is to be verbose. When it
// returns, the display is closed, and the last output of failed steps repeated.
func (c *Console) WithProgress(mode string, verbose bool, f func(*progress.Recorder) error) error {
	return c.WithTrace(mode, verbose, nil, f)
}

// WithTrace is WithProgress, and writes what --progress=rawjson would to trace, unless that is nil.
func (c *Console) WithTrace(mode string, verbose bool, trace io.Writer, f func(*progress.Recorder) error) error {
	d, err := progress.Choose(mode, c.Err, verbose, c.Getenv)
	if err != nil {
		return &diag.Error{Err: err, Code: diag.ExitUsage}
	}
	failures := progress.NewFailures(d)
	sink := progress.Sink(failures)
	if trace != nil {
		sink = progress.Tee(failures, progress.NewRawJSON(trace))
	}
	err = f(progress.NewRecorder(sink))
	if e := d.Close(); err == nil && e != nil {
		err = e
	}
	if err != nil { // also if nothing was to be shown: this is why
		_ = failures.Report(c.Err)
	}
	return err
}

// StoreFlag adds --root to a command that uses the store.
func (c *Console) StoreFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("root", "", "directory of the local store (default $KILN_ROOT, or kiln in the user's data directory)")
}

// OpenStore opens the store that --root, or else the environment, names.
func (c *Console) OpenStore(root string) (*store.Store, error) {
	dir, err := StoreRoot(root, c.Getenv)
	if err != nil {
		return nil, err
	}
	return store.Open(dir)
}
