// Package cli is the kiln command: one file for each of its verbs, which
// translate flags into calls of the packages below and print what those say.
//
// Results go to standard output, everything else to standard error. Main
// returns one of the exit codes of package diag; an error is printed once, last.
package cli

import (
	"context"
	"os"
	"path/filepath"

	"github.com/kiln-build/kiln/internal/cli/buildctl"
	"github.com/kiln-build/kiln/internal/cli/console"
)

// App is what the verbs share.
type App struct{ console.Console }

// Main runs one command line and returns the exit code. It is the command line of
// another builder's if the program is called by the name of that.
func Main(ctx context.Context, args []string, s console.Streams) int {
	app := &App{console.Console{Streams: s, Getenv: os.Getenv}}
	switch filepath.Base(args[0]) {
	case "buildctl":
		return app.Execute(ctx, buildctl.New(&app.Console), buildctl.Arguments(args[1:]))
	case "buildctl-daemonless.sh", "buildctl-daemonless":
		return app.Execute(ctx, buildctl.NewDaemonless(&app.Console), buildctl.Arguments(args[1:]))
	case "buildkitd":
		return app.Execute(ctx, newRootCommand(app), append([]string{"buildkitd"}, args[1:]...))
	}
	return app.Execute(ctx, newRootCommand(app), args[1:])
}
