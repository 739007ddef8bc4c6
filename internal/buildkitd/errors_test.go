package buildkitd

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/internal/diag"
)

// TestExplain: what clients print of errors.
func TestExplain(t *testing.T) {
	refused := status.Error(codes.PermissionDenied, "not for you")
	for want, err := range map[string]error{
		"plain":                                      errors.New("plain"),
		"PermissionDenied: not for you":              refused,
		"PermissionDenied: image x: not for you":     fmt.Errorf("image x: %w", refused),
		"PermissionDenied: front end x: not for you": fmt.Errorf("front end x: %w", grpcerrors.FromGRPC(refused)),
		"bad (mend it)":                              &diag.Error{Err: errors.New("bad"), At: &diag.Location{File: "Dockerfile", Line: 3}, Hint: "mend it."},
	} {
		got := grpcerrors.FromGRPC(grpcerrors.ToGRPC(context.Background(), explain(err)))
		if got.Error() != want {
			t.Errorf("%v: clients get %q, want %q", err, got, want)
		}
		var d *diag.Error
		if s := errdefs.Sources(got); errors.As(err, &d) && (len(s) != 1 || s[0].Ranges[0].Start.Line != 3) {
			t.Errorf("%v has the places %v", err, s)
		}
	}
}
