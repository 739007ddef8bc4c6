// Command kiln builds container images without privilege.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/kiln-build/kiln/internal/cli"
	"github.com/kiln-build/kiln/internal/cli/console"
	"github.com/kiln-build/kiln/internal/sandbox/gvisor"
)

func main() {
	// The sandbox is this very program, run again.
	if code, ok := gvisor.Main(os.Args); ok {
		os.Exit(code)
	}
	// The first signal asks everything to stop; a second one kills.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	os.Exit(cli.Main(ctx, os.Args, console.Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}))
}
