package buildkitd

import (
	"context"
	"errors"
	"regexp"
	"sync"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/grpchijack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// identifier is what refs of builds and ids of sessions look like: clients choose them.
var identifier = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$`)

// sessions are the open ones. A session is lent to the builds of those who opened it: whoever knows
// its id, and has the same certificate, where there are any.
type sessions struct {
	*session.Manager

	mu     sync.Mutex
	owners map[string]string
}

func newSessions(m *session.Manager) *sessions {
	return &sessions{Manager: m, owners: map[string]string{}}
}

// caller is who makes a request, as far as is known: the name that its certificate gives.
func caller(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return ""
	}
	t, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(t.State.VerifiedChains) == 0 {
		return ""
	}
	return t.State.VerifiedChains[0][0].Subject.String()
}

func (s *sessions) add(id, owner string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.owners[id]; ok {
		return status.Errorf(codes.AlreadyExists, "session %s already exists", id)
	}
	s.owners[id] = owner
	return nil
}

func (s *sessions) remove(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.owners, id)
}

// allowed reports whether owner may use the session, if it is open yet.
func (s *sessions) allowed(id, owner string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	o, ok := s.owners[id]
	return !ok || o == owner
}

// Get is session.Manager's, for a caller whose certificate was checked when its build began; but
// the session may have been opened later, and by somebody else.
func (s *sessions) get(ctx context.Context, id, owner string) (session.Caller, error) {
	c, err := s.Manager.Get(ctx, id, false)
	if err == nil && !s.allowed(id, owner) {
		err = errors.New("the session belongs to another client")
	}
	return c, err
}

// Session implements controlapi.ControlServer: the stream becomes a connection to the client's services.
func (s *Server) Session(stream controlapi.Control_SessionServer) error {
	conn, closed, headers := grpchijack.Hijack(stream)
	defer conn.Close()
	ids := headers["x-docker-expose-session-uuid"]
	if len(ids) != 1 || !identifier.MatchString(ids[0]) {
		return status.Error(codes.InvalidArgument, "a session must have an id")
	}
	if err := s.sessions.add(ids[0], caller(stream.Context())); err != nil {
		return err
	}
	defer s.sessions.remove(ids[0])
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	go func() {
		<-closed
		cancel()
	}()
	return s.sessions.HandleConn(ctx, conn, headers)
}
