package cli

import (
	"errors"
	"slices"
	"strings"

	"github.com/agext/levenshtein"
	"github.com/kiln-build/kiln/internal/cli/buildctl"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

const (
	groupBuild   = "build"
	groupImages  = "images"
	groupMachine = "machine"
)

const rootLong = `Kiln builds container images from Dockerfiles and pushes them to registries,
without Docker, without a daemon and without any privilege.

Commands, options and output are those of docker wherever docker has them. Images
are kept in a store of the user's own until they are pushed, saved or pruned.`

const rootExample = `  # Build the Dockerfile in this directory, and push the image
  kiln build -t registry.example/app:1.0 --push .

  # The same with nothing else installed: a registry on this machine
  kiln registry &
  kiln build -t localhost:5000/app --push .

  # Look at what is in the store
  kiln images
  kiln history app`

// usageTemplate is cobra's with docker's words.
const usageTemplate = `Usage:  {{.UseLine}}
{{- if .HasExample}}

Examples:
{{.Example}}
{{- end}}
{{- if .HasAvailableSubCommands}}
{{- $cmds := .Commands}}
{{- range $group := .Groups}}

{{.Title}}
{{- range $cmds}}{{if and (eq .GroupID $group.ID) (or .IsAvailableCommand (eq .Name "help"))}}
  {{rpad .Name .NamePadding}} {{.Short}}
{{- end}}{{end}}
{{- end}}
{{- end}}
{{- if .HasAvailableLocalFlags}}

Options:
{{.LocalFlags.FlagUsages | trimTrailingWhitespaces}}
{{- end}}
{{- if .HasAvailableSubCommands}}

See '{{.CommandPath}} COMMAND --help' for what a command does, with examples.
{{- end}}
`

func newRootCommand(app *App) *cobra.Command {
	root := &cobra.Command{
		Use:     "kiln [OPTIONS] COMMAND",
		Short:   "Build container images without privilege",
		Long:    rootLong,
		Example: rootExample,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknownCommand(cmd, args[0])
			}
			return nil
		},
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		SilenceErrors: true,
		SilenceUsage:  true,

		DisableFlagsInUseLine: true,
		CompletionOptions:     cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.SetFlagErrorFunc(flagError)
	root.SetUsageTemplate(usageTemplate)
	root.AddGroup(
		&cobra.Group{ID: groupBuild, Title: "Build and move images:"},
		&cobra.Group{ID: groupImages, Title: "Images in the store:"},
		&cobra.Group{ID: groupMachine, Title: "This machine:"},
	)
	add := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			c.DisableFlagsInUseLine = true
			c.Flags().SortFlags = false
			root.AddCommand(c)
		}
	}
	add(groupBuild, newBuildCommand(app), newPushCommand(app), newPullCommand(app), newLoginCommand(app), newLogoutCommand(app), buildctl.New(&app.Console))
	add(groupImages, newImagesCommand(app), newTagCommand(app), newRmiCommand(app), newInspectCommand(app),
		newHistoryCommand(app), newSaveCommand(app), newLoadCommand(app), newDuCommand(app), newPruneCommand(app))
	add(groupMachine, newInfoCommand(app), newRegistryCommand(app), newBuildkitdCommand(app), newVersionCommand(app), newCompletionCommand(app))
	root.SetHelpCommandGroupID(groupMachine)
	return root
}

// usageError is an error of the command line, which the hint sends to its help.
func usageError(cmd *cobra.Command, format string, a ...any) *diag.Error {
	return diag.New(diag.ExitUsage, format, a...).WithHint("See '%s --help'.", cmd.CommandPath())
}

func unknownCommand(cmd *cobra.Command, name string) error {
	err := usageError(cmd, "unknown command %q for %q", name, cmd.CommandPath())
	cmd.SuggestionsMinimumDistance = 2
	if s := cmd.SuggestionsFor(name); len(s) > 0 {
		return err.WithHint("Did you mean %s? See '%s --help'.", quoted(s), cmd.CommandPath())
	}
	return err
}

// flagError makes a usage error of what the flag parser says.
func flagError(cmd *cobra.Command, err error) error {
	if errors.Is(err, pflag.ErrHelp) {
		return err
	}
	out := usageError(cmd, "%w", err)
	var unknown *pflag.NotExistError
	if errors.As(err, &unknown) && len(unknown.GetSpecifiedName()) > 1 {
		if s := similarFlags(cmd, unknown.GetSpecifiedName()); len(s) > 0 {
			return out.WithHint("Did you mean %s? See '%s --help'.", quoted(s), cmd.CommandPath())
		}
	}
	return out
}

func similarFlags(cmd *cobra.Command, name string) []string {
	var names []string
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		near := levenshtein.Distance(name, f.Name, nil) <= 2
		if near || strings.HasPrefix(f.Name, name) || strings.HasPrefix(name, f.Name) {
			names = append(names, "--"+f.Name)
		}
	})
	slices.Sort(names)
	return names
}

func quoted(names []string) string { return "'" + strings.Join(names, "' or '") + "'" }

// nargs wants from low to high arguments; high < 0: any number.
func nargs(low, high int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		n := len(args)
		if n >= low && (high < 0 || n <= high) {
			return nil
		}
		want := "no arguments"
		switch {
		case low == high && low == 1:
			want = "exactly 1 argument"
		case low == high && low > 1:
			want = "exactly " + itoa(low) + " arguments"
		case high < 0:
			want = "at least " + itoa(low) + " " + plural(low, "argument")
		case low < high:
			want = "at most " + itoa(high) + " " + plural(high, "argument")
		}
		return diag.New(diag.ExitUsage, "'%s' takes %s, not %d", cmd.CommandPath(), want, n).
			WithHint("Usage: %s; see '%s --help'.", cmd.UseLine(), cmd.CommandPath())
	}
}
