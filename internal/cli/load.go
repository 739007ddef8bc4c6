package cli

import "github.com/spf13/cobra"

func newLoadCommand(app *App) *cobra.Command {
	return &cobra.Command{Use: "load", Run: func(*cobra.Command, []string) {}}
}
