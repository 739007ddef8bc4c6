package cli

import "github.com/spf13/cobra"

func newSaveCommand(app *App) *cobra.Command {
	return &cobra.Command{Use: "save", Run: func(*cobra.Command, []string) {}}
}
