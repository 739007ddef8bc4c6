package cli

import "github.com/spf13/cobra"

func newPullCommand(app *App) *cobra.Command {
	return &cobra.Command{Use: "pull", Run: func(*cobra.Command, []string) {}}
}
