// Package cli is the kiln command: one file for each of its verbs, which
// translate flags into calls of the packages below and print what those say.
//
// Results go to standard output, everything else to standard error. Main
// returns one of the exit codes of package diag; an error is printed once, last.
package cli

import (
	"context"
	"errors"
	"io"
	"os"

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

// App is what the verbs share.
type App struct {
	Streams
	// Getenv is asked for the environment variables that commands heed.
	Getenv func(string) string
}

// Main runs one command line, without the program's name, and returns the exit
// code. When ctx ends, what runs is stopped and the code is ExitInterrupted.
func Main(ctx context.Context, args []string, s Streams) int {
	app := &App{Streams: s, Getenv: os.Getenv}
	root := newRootCommand(app)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return diag.ExitOK
	}
	if ctx.Err() != nil && errors.Is(err, context.Cause(ctx)) {
		err = diag.New(diag.ExitInterrupted, "interrupted")
	}
	PrintError(s.Err, err)
	return diag.ExitCode(err)
}

// withProgress runs f with a Recorder that is shown as mode asks for, warnings
// with all that is known of them if it is to be verbose. When it
// returns, the display is closed, and the last output of failed steps repeated.
func (a *App) withProgress(mode string, verbose bool, f func(*progress.Recorder) error) error {
	d, err := progress.Choose(mode, a.Err, verbose, a.Getenv)
	if err != nil {
		return &diag.Error{Err: err, Code: diag.ExitUsage}
	}
	failures := progress.NewFailures(d)
	err = f(progress.NewRecorder(failures))
	if e := d.Close(); err == nil && e != nil {
		err = e
	}
	if err != nil { // also if nothing was to be shown: this is why
		_ = failures.Report(a.Err)
	}
	return err
}

// storeFlag adds --root to a command that uses the store.
func (a *App) storeFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("root", "", "directory of the local store (default $KILN_ROOT, or kiln in the user's data directory)")
}

// openStore opens the store that --root, or else the environment, names.
func (a *App) openStore(root string) (*store.Store, error) {
	dir, err := storeRoot(root, a.Getenv)
	if err != nil {
		return nil, err
	}
	return store.Open(dir)
}
