// Package buildctl is the command line of BuildKit's buildctl: for builds by a server, and, as
// buildctl-daemonless.sh without its daemon, for builds in this process.
package buildctl

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/cli/console"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/spf13/cobra"
)

const long = `The command line of BuildKit's buildctl and buildctl-daemonless.sh.

With an address (--addr or BUILDKIT_HOST), or where a server listens at BuildKit's own place,
that server builds: Kiln's, which is kiln buildkitd, or BuildKit's. Otherwise the build runs
in this process: no daemon is started, and none is needed. By the name of
buildctl-daemonless.sh it always does.

To have it for pipelines that call buildctl, let that name be a link to kiln.`

const example = `  # Build and push the Dockerfile in this directory
  buildctl build --frontend dockerfile.v0 --local context=. --local dockerfile=. \
    --output type=image,name=docker.io/username/image,push=true

  # The same by a server
  buildctl --addr tcp://buildkitd:1234 --tlsdir /certs build --frontend dockerfile.v0 \
    --local context=. --local dockerfile=. --output type=image,name=docker.io/username/image,push=true`

// New returns the command.
func New(c *console.Console) *cobra.Command { return newRoot(&server{Console: c}) }

// NewDaemonless returns the command as buildctl-daemonless.sh: builds run in this process.
func NewDaemonless(c *console.Console) *cobra.Command {
	return newRoot(&server{Console: c, daemonless: true})
}

func newRoot(s *server) *cobra.Command {
	root := &cobra.Command{
		Use: "buildctl", Short: "Build with buildctl's command line", Long: long, Example: example,
		SilenceErrors: true, SilenceUsage: true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	s.flags(root)
	root.AddCommand(newBuild(s), newDiskUsage(s), newPrune(s), newPruneHistories(s), newDebug(s), newDialStdio(s))
	return root
}

func newBuild(s *server) *cobra.Command {
	cmd := &cobra.Command{
		Use: "build", Aliases: []string{"b"}, Short: "Build", Example: example, Args: cobra.NoArgs,
	}
	cmd.Flags().SortFlags = false
	f := newBuildFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		b := &builder{server: s, buildFlags: f, ref: newRef()}
		return b.run(cmd.Context())
	}
	return cmd
}

// builder carries out one build.
type builder struct {
	*server
	*buildFlags
	ref string
}

func (b *builder) run(ctx context.Context) error {
	if err := b.check(); err != nil {
		return err
	}
	c, way, err := b.connect(ctx)
	if err != nil {
		return err
	}
	if b.RefFile != "" {
		if err := console.WriteText(b.RefFile, b.ref); err != nil {
			return fmt.Errorf("write --ref-file: %w", err)
		}
	}
	if c == nil {
		return b.local(ctx, way)
	}
	defer c.Close()
	return b.remote(ctx, c, way)
}

// check refuses what no build has.
func (b *builder) check() error {
	if err := b.server.check(); err != nil {
		return err
	}
	return b.buildFlags.check()
}

// show calls f with a Recorder that is shown, and written to --trace.
func (b *builder) show(f func(*progress.Recorder) error) error {
	if b.Trace == "" {
		return b.WithProgress(b.Progress, b.Debug, f)
	}
	w, err := os.OpenFile(b.Trace, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return diag.New(diag.ExitUsage, "--trace: %w", err)
	}
	return errors.Join(b.WithTrace(b.Progress, b.Debug, w, f), w.Close())
}

// local builds in this process.
func (b *builder) local(ctx context.Context, way string) error {
	req, err := b.request(b.Getenv)
	if err != nil {
		return err
	}
	if req.Definition, err = b.definition(); err != nil {
		return err
	}
	certs, err := authCerts(b.AuthTLS)
	if err != nil {
		return err
	}
	env, err := b.env(&req, certs)
	if err != nil {
		return err
	}
	if id := req.Attrs[requestID]; id != "" && req.Definition == nil {
		return b.ask(ctx, env, req, id)
	}
	var res *build.Result
	if err := b.show(func(rec *progress.Recorder) (err error) {
		rec.Note(way)
		env.Progress = rec
		res, err = build.Run(ctx, env, req)
		return err
	}); err != nil || b.MetadataFile == "" {
		return err
	}
	meta, err := res.Metadata()
	if err != nil {
		return err
	}
	return writeMetadata(b.MetadataFile, meta)
}

// Arguments are args as the flag package of Go reads them, which BuildKit's programs use:
// a single dash before a long name is as good as two.
func Arguments(args []string) []string {
	out := make([]string, 0, len(args))
	for i, a := range args {
		if a == "--" {
			return append(out, args[i:]...)
		}
		if name, _, _ := strings.Cut(a, "="); len(name) > 2 && name[0] == '-' && name[1] != '-' {
			a = "-" + a
		}
		out = append(out, a)
	}
	return out
}
