package buildkitd

import (
	"context"
	"errors"
	"strings"

	gatewayapi "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/engine"
	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/sandbox"
)

// explain puts an error into the types that BuildKit's clients know: with the place in the
// Dockerfile, which they print, and the exit code of a RUN step.
func explain(err error) error {
	if err == nil {
		return nil
	}
	said := &message{error: err, text: text(err)}
	var out error = said
	var exit *sandbox.ExitError
	if errors.As(err, &exit) && !hasExit(err) {
		out = &gatewayapi.ExitError{ExitCode: uint32(exit.Code), Err: out}
	}
	var d *diag.Error
	if errors.As(err, &d) {
		if at := place(err); at != nil && len(errdefs.Sources(err)) == 0 {
			out = errdefs.WithSource(out, sourceOf(at))
		}
	}
	if code := grpcerrors.Code(err); code == codes.Unknown && errors.Is(err, context.Canceled) {
		out = grpcerrors.WrapCode(out, codes.Canceled)
	}
	return out
}

func hasExit(err error) bool {
	var e *gatewayapi.ExitError
	return errors.As(err, &e)
}

// message is an error in other words.
type message struct {
	error
	text string
}

func (m *message) Error() string { return m.text }

func (m *message) Unwrap() error { return m.error }

// GRPCStatus is the error's, in these words; or those of a status in its chain would be taken.
func (m *message) GRPCStatus() *status.Status { return status.New(grpcerrors.Code(m.error), m.text) }

// text is what an error says without the file's name and the line in front of it, and without the status code, which clients
// show themselves, and with what there is to do.
func text(err error) string {
	hint := ""
	var d *diag.Error
	for e := err; hint == "" && errors.As(e, &d); e = d.Err {
		hint = d.Hint
	}
	s := frontend.Verbatim(err, diag.Message(err))
	var st interface {
		error
		GRPCStatus() *status.Status
	}
	if errors.As(err, &st) {
		s = strings.Replace(s, st.Error(), st.GRPCStatus().Message(), 1)
	}
	if hint != "" {
		s += " (" + strings.TrimSuffix(hint, ".") + ")"
	}
	return s
}

// place is the one nearest to the outside of err's chain.
func place(err error) *diag.Location {
	var d *diag.Error
	for e := err; errors.As(e, &d); e = d.Err {
		if d.At != nil {
			return d.At
		}
	}
	return nil
}

// maxPlaces and maxPlacesBytes bound the places that an error has, and what is said of their files.
const (
	maxPlaces      = 64
	maxPlacesBytes = 1 << 20
)

// located adds to an error the places that definitions have for the operation that failed, as BuildKit does: with
// all lines, and where the files came from.
func located(err error, defs ...*frontend.Definition) error {
	var failed *engine.OpError
	if !errors.As(err, &failed) {
		return err
	}
	err = errdefs.WrapVertex(err, failed.Op)
	op, places, size := failed.Op.String(), 0, 0
	for _, def := range defs {
		infos := def.GetSource().GetInfos()
		for _, l := range def.GetSource().GetLocations()[op].GetLocations() {
			n := int(l.GetSourceIndex())
			if l == nil || n < 0 || n >= len(infos) || infos[n] == nil {
				continue
			}
			if places, size = places+1, size+infos[n].SizeVT()+l.SizeVT(); places > maxPlaces || size > maxPlacesBytes {
				return err
			}
			err = errdefs.WithSource(err, &errdefs.Source{Info: infos[n], Ranges: l.Ranges})
		}
		if places > 0 {
			break // the same operation in several definitions
		}
	}
	return err
}

func sourceOf(at *diag.Location) *errdefs.Source {
	return &errdefs.Source{
		Info: &pb.SourceInfo{Filename: at.File, Data: []byte(strings.Join(at.Source, "\n")), Language: "Dockerfile"},
		Ranges: []*pb.Range{{
			Start: &pb.Position{Line: int32(at.Line)}, End: &pb.Position{Line: int32(max(at.EndLine, at.Line))},
		}},
	}
}
