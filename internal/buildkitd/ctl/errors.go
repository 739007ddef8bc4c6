package ctl

import (
	"errors"
	"strings"

	gatewayapi "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/internal/diag"
)

// explain puts a server's error into our words: with the place in the Dockerfile, and the exit code
// for what failed.
func explain(err error) error {
	d := &diag.Error{Err: &message{error: err}}
	for _, s := range errdefs.Sources(err) {
		if at := location(s.Info, s.Ranges); at != nil {
			d.At = at
		}
	}
	var exit *gatewayapi.ExitError
	switch code := grpcerrors.Code(err); {
	case errors.As(err, &exit):
		d.Code = diag.ExitStep
	case code == codes.InvalidArgument || code == codes.Unimplemented:
		d.Code = diag.ExitUsage
	case d.At != nil:
		d.Code = diag.ExitDockerfile
	}
	return d
}

// message is an error without what gRPC says before it.
type message struct{ error }

// Error implements error.
func (m *message) Error() string {
	s := m.error.Error()
	if st, ok := grpcstatus.FromError(m.error); ok && st.Message() != "" {
		s = st.Message()
	}
	s = strings.TrimPrefix(s, grpcerrors.Code(m.error).String()+": ")
	if rest, ok := strings.CutPrefix(s, "rpc error: code = "); ok {
		if _, after, ok := strings.Cut(rest, "desc = "); ok {
			s = after
		}
	}
	return s
}

// Unwrap gives the error itself.
func (m *message) Unwrap() error { return m.error }

// statusOf is an error as gRPC carries it.
func statusOf(err error) *status.Status {
	st, ok := grpcstatus.FromError(err)
	if !ok {
		st = grpcstatus.New(grpcerrors.Code(err), err.Error())
	}
	return st.Proto()
}
