package cli

import "github.com/spf13/cobra"

func newPushCommand(app *App) *cobra.Command {
	return &cobra.Command{Use: "push", Run: func(*cobra.Command, []string) {}}
}
