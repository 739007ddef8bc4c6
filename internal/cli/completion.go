package cli

import (
	"os"
	"strings"

	"github.com/kiln-build/kiln/internal/cli/console"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/spf13/cobra"
)

const completionLong = `Print a script that makes a shell complete kiln's commands, options and images.

  bash:        source <(kiln completion bash)
               or once: kiln completion bash > /etc/bash_completion.d/kiln
  zsh:         kiln completion zsh > "${fpath[1]}/_kiln"
  fish:        kiln completion fish > ~/.config/fish/completions/kiln.fish
  powershell:  kiln completion powershell | Out-String | Invoke-Expression`

func newCompletionCommand(app *App) *cobra.Command {
	shells := []string{"bash", "zsh", "fish", "powershell"}
	return &cobra.Command{
		Use:       "completion " + strings.Join(shells, "|"),
		Short:     "Print a script for the completion of a shell",
		Long:      completionLong,
		Args:      nargs(1, 1),
		ValidArgs: shells,
		RunE: func(cmd *cobra.Command, args []string) error {
			root := cmd.Root()
			switch args[0] {
			case "bash":
				return root.GenBashCompletionV2(app.Out, true)
			case "zsh":
				return root.GenZshCompletion(app.Out)
			case "fish":
				return root.GenFishCompletion(app.Out, true)
			case "powershell":
				return root.GenPowerShellCompletionWithDesc(app.Out)
			}
			return usageError(cmd, "no completion for the shell %q: use one of %s", args[0], strings.Join(shells, ", "))
		},
	}
}

// completeImages completes the names of images in the store.
func (a *App) completeImages(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	root, _ := cmd.Flags().GetString("root")
	dir, err := console.StoreRoot(root, a.Getenv)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	if _, err := os.Stat(dir); err != nil { // do not make a store for this
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	st, err := store.Open(dir)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	tags, err := st.Tags()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for _, t := range tags {
		if !nameless(t.Ref) {
			names = append(names, familiar(t.Ref))
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
