// Package buildctl is the command line of BuildKit's buildctl, for builds that run in
// this process: buildctl-daemonless.sh without its daemon.
package buildctl

import (
	"context"
	"fmt"
	"strings"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/cli/console"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/spf13/cobra"
)

const long = `The command line of BuildKit's buildctl and buildctl-daemonless.sh.

The build runs in this process: no daemon is started, and none is needed. To have
it for pipelines that call buildctl, let that name be a link to kiln.`

const example = `  # Build and push the Dockerfile in this directory
  buildctl build --frontend dockerfile.v0 --local context=. --local dockerfile=. \
    --output type=image,name=docker.io/username/image,push=true`

// New returns the command.
func New(c *console.Console) *cobra.Command {
	root := &cobra.Command{
		Use: "buildctl", Short: "Build with buildctl's command line", Long: long, Example: example,
		SilenceErrors: true, SilenceUsage: true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.AddCommand(newBuild(c))
	return root
}

func newBuild(c *console.Console) *cobra.Command {
	cmd := &cobra.Command{
		Use: "build", Aliases: []string{"b"}, Short: "Build", Example: example, Args: cobra.NoArgs,
	}
	cmd.Flags().SortFlags = false
	f := newBuildFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), c, f) }
	return cmd
}

func run(ctx context.Context, c *console.Console, f *buildFlags) error {
	req, err := f.request(c.Getenv)
	if err != nil {
		return err
	}
	env, err := c.Env("", "", req.InsecureHosts())
	if err != nil {
		return err
	}
	if f.RefFile != "" {
		if err := console.WriteText(f.RefFile, newRef()); err != nil {
			return fmt.Errorf("write --ref-file: %w", err)
		}
	}
	var res *build.Result
	if err := c.WithProgress(f.Progress, false, func(rec *progress.Recorder) (err error) {
		env.Progress = rec
		res, err = build.Run(ctx, env, req)
		return err
	}); err != nil {
		return err
	}
	if f.MetadataFile != "" {
		return console.WriteMetadata(f.MetadataFile, res, nil)
	}
	return nil
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
