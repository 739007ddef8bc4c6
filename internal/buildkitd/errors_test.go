package buildkitd

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/engine"
	"github.com/kiln-build/kiln/internal/frontend"
)

// sent is an error as a client gets it.
func sent(err error) error {
	return grpcerrors.FromGRPC(grpcerrors.ToGRPC(context.Background(), explain(err)))
}

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
		got := sent(err)
		if got.Error() != want {
			t.Errorf("%v: clients get %q, want %q", err, got, want)
		}
		var d *diag.Error
		if s := errdefs.Sources(got); errors.As(err, &d) && (len(s) != 1 || s[0].Ranges[0].Start.Line != 3) {
			t.Errorf("%v has the places %v", err, s)
		}
	}
}

func TestLocated(t *testing.T) {
	op := digest.FromString("op")
	at := func(file int32, lines ...int32) *pb.Location {
		l := &pb.Location{SourceIndex: file}
		for _, n := range lines {
			l.Ranges = append(l.Ranges, &pb.Range{Start: &pb.Position{Line: n}, End: &pb.Position{Line: n}})
		}
		return l
	}
	def := func(infos []*pb.SourceInfo, ls ...*pb.Location) *frontend.Definition {
		return &pb.Definition{Source: &pb.Source{Infos: infos, Locations: map[string]*pb.Locations{op.String(): {Locations: ls}}}}
	}
	made := &pb.Definition{Def: [][]byte{[]byte("x")}}
	infos := []*pb.SourceInfo{{Filename: "a", Language: "mine", Data: []byte("one\ntwo\n"), Definition: made}, {Filename: "b"}, nil}
	cause := &diag.Error{Err: errors.New("went wrong"), At: &diag.Location{File: "a", Line: 1}, Hint: "Do better."}
	failed := fmt.Errorf("build: %w", &engine.OpError{Op: op, Err: cause})
	many := make([]*pb.Location, 1000)
	for i := range many {
		many[i] = at(0, 1)
	}
	for name, c := range map[string]struct {
		err  error
		defs []*frontend.Definition
		want []string
	}{
		"every place":        {failed, []*frontend.Definition{def(infos, at(0, 1, 2), at(1, 7))}, []string{"b 7", "a 1 2"}},
		"of one of several":  {failed, []*frontend.Definition{nil, {}, def(infos, at(1, 7)), def(infos, at(0, 1))}, []string{"b 7"}},
		"none there":         {failed, []*frontend.Definition{def(infos)}, []string{"a 1"}},
		"hostile":            {failed, []*frontend.Definition{def(infos, at(-1, 1), at(2, 1), at(9, 1), nil, at(1))}, []string{"b"}},
		"of no operation":    {cause, []*frontend.Definition{def(infos, at(1, 7))}, []string{"a 1"}},
		"another definition": {failed, nil, []string{"a 1"}},
	} {
		err := sent(located(c.err, c.defs...))
		var got []string
		for _, s := range errdefs.Sources(err) {
			line := s.Info.Filename
			for _, r := range s.Ranges {
				line += fmt.Sprintf(" %d", r.Start.Line)
			}
			got = append(got, line)
		}
		if fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("%s: %q instead of %q", name, got, c.want)
		}
	}
	err := sent(located(failed, def(infos, at(0, 1))))
	if s := errdefs.Sources(err); s[0].Info.Language != "mine" || string(s[0].Info.Data) != "one\ntwo\n" || s[0].Info.Definition == nil {
		t.Errorf("the file is %+v", s[0].Info)
	}
	if err.Error() != "build: went wrong (Do better)" {
		t.Errorf("message %q", err)
	}
	var v *errdefs.VertexError
	if !errors.As(err, &v) || v.Digest != op.String() {
		t.Errorf("the operation is not said: %v", v)
	}
	if n := len(errdefs.Sources(located(failed, def(infos, many...)))); n > maxPlaces {
		t.Errorf("%d places", n)
	}
}
