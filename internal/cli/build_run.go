package cli

import (
	"context"

	"github.com/kiln-build/kiln/internal/diag"
)

// build carries out a build whose flags were checked.
func (a *App) build(_ context.Context, f *buildFlags) error {
	return diag.New(diag.ExitFailure, "build %q: this program was made without a builder", f.Context)
}
