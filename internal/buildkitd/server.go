// Package buildkitd is BuildKit's control API in front of Kiln's engine, so that buildctl, docker buildx
// and programs that use BuildKit's client build with Kiln and need not know it.
//
// A build is a call of Control.Solve. While it lasts the client follows it by Control.Status, lends it
// files, credentials and secrets through Control.Session (package peer), and may, if it brings its own
// front end, ask for parts of it through the gateway (LLBBridge). docs/design/buildkit-api.md explains how
// these map to package build.
package buildkitd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	controlapi "github.com/moby/buildkit/api/services/control"
	gatewayapi "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthapi "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/sandbox"
	"github.com/kiln-build/kiln/internal/store"
)

// Options are what a server works with.
type Options struct {
	Store   *store.Store
	Sandbox sandbox.Sandbox
	// Registry says how registries are reached; its keychain is not used: credentials are the clients'.
	Registry registry.Options
	Environ  []string // for fetching sources
	Version  string   // of Kiln
	Log      *slog.Logger
	// Entitlements are what clients may be granted beyond the default, by name.
	Entitlements []string
	Labels       map[string]string // of the worker, besides its own
	// Limit is how large the store may become: after a build what was used longest ago goes.
	Limit store.Limit
	// History is how many builds that have ended are remembered; nil: 50. With 0 there is no history.
	History  *int
	Parallel int // RUN steps of a build at the same time; 0: as many as there are CPUs
}

// Server serves the API. Its methods are those of the gRPC services.
type Server struct {
	controlapi.UnimplementedControlServer
	opt      Options
	grpc     *grpc.Server
	health   *health.Server
	sessions *sessions
	jobs     *jobs
	history  *history
	worker   worker
}

// maxMessage bounds one message, in both directions, as BuildKit does.
const maxMessage = 16 << 20

// maxStreams bounds what one connection asks for at the same time.
const maxStreams = 1000

// New returns a server that serves nobody yet.
func New(o Options) (*Server, error) {
	manager, err := session.NewManager()
	if err != nil {
		return nil, err
	}
	s := &Server{opt: o, sessions: newSessions(manager), jobs: newJobs(), history: newHistory(o.History), health: health.NewServer(), worker: newWorker(o)}
	s.grpc = grpc.NewServer(
		grpc.Creds(newTransport(o.Log)),
		grpc.ChainUnaryInterceptor(s.unary), grpc.ChainStreamInterceptor(s.stream),
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage), grpc.MaxConcurrentStreams(maxStreams),
		// A client whose machine is gone says nothing: its builds are to end.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 20 * time.Second, Timeout: 20 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	)
	controlapi.RegisterControlServer(s.grpc, s)
	gatewayapi.RegisterLLBBridgeServer(s.grpc, &gateway{jobs: s.jobs, worker: &s.worker})
	contentapi.RegisterContentServer(s.grpc, noContent{})
	healthapi.RegisterHealthServer(s.grpc, s.health)
	return s, nil
}

// Serve accepts connections until ctx ends. Then it takes no new builds, lets those that run have
// grace to finish, and ends them.
func (s *Server) Serve(ctx context.Context, grace time.Duration, listeners ...net.Listener) error {
	failed := make(chan error, len(listeners))
	for _, l := range listeners {
		go func() { failed <- s.grpc.Serve(l) }()
	}
	var err error
	select {
	case err = <-failed:
	case <-ctx.Done():
	}
	s.health.Shutdown()
	s.jobs.close()
	s.history.close()
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		s.jobs.wait()
	}()
	select {
	case <-stopped:
	case <-time.After(grace):
	}
	s.grpc.Stop() // which ends the builds that are left
	s.jobs.wait()
	if errors.Is(err, grpc.ErrServerStopped) {
		err = nil
	}
	return err
}

// unary puts errors into the clients' form, and contains a panic to its request.
func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (res any, err error) {
	defer func() { err = s.finish(ctx, info.FullMethod, recover(), err) }()
	return next(ctx, req)
}

// stream is unary for streams.
func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	defer func() { err = s.finish(ss.Context(), info.FullMethod, recover(), err) }()
	return next(srv, ss)
}

func (s *Server) finish(ctx context.Context, method string, panicked any, err error) error {
	if panicked != nil {
		s.opt.Log.Error("request failed in an unforeseen way", "method", method, "panic", fmt.Sprint(panicked), "stack", string(debug.Stack()))
		err = status.Error(codes.Internal, "the server failed in an unforeseen way; its log says more")
	}
	if err != nil {
		s.opt.Log.Debug("request failed", "method", method, "error", err.Error())
	}
	return grpcerrors.ToGRPC(ctx, explain(err))
}
