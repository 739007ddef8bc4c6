package ctl

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/moby/buildkit/session"
	sessionauth "github.com/moby/buildkit/session/auth"
	"github.com/moby/buildkit/session/filesync"
	"github.com/moby/buildkit/session/secrets"
	"github.com/moby/buildkit/session/sshforward"
	"github.com/tonistiigi/fsutil"
	fstypes "github.com/tonistiigi/fsutil/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/internal/secret"
	"github.com/kiln-build/kiln/internal/sshagent"
)

// open makes the session by which the server reaches what a request lets it have.
func (r *Request) open(ctx context.Context) (*session.Session, error) {
	s, err := session.NewSession(ctx, sharedKey(r.Locals))
	if err != nil {
		return nil, err
	}
	s.Allow(&passwords{keychain: r.Keychain})
	if len(r.Locals) > 0 {
		dirs, err := directories(r.Locals)
		if err != nil {
			return nil, err
		}
		s.Allow(filesync.NewFSSyncProvider(dirs))
	}
	if r.Secrets != nil {
		s.Allow(&secretServer{secrets: r.Secrets})
	}
	if r.SSH != nil {
		s.Allow(&agentServer{agents: r.SSH})
	}
	return s, nil
}

// sharedKey tells directories of this machine from all others: a server that knows from an earlier build what is in
// them need not be sent that again. Empty if there are none.
func sharedKey(locals map[string]string) string {
	if len(locals) == 0 {
		return ""
	}
	host, err := os.Hostname()
	if err != nil {
		return ""
	}
	h := sha256.New()
	fmt.Fprintf(h, "%q %d", host, os.Getuid())
	for _, name := range slices.Sorted(maps.Keys(locals)) {
		dir, err := filepath.Abs(locals[name])
		if err != nil {
			return ""
		}
		fmt.Fprintf(h, " %q=%q", name, dir)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// directories are those that the server may read, by their names. Owners are not told: what is
// copied belongs to root unless the Dockerfile says otherwise.
func directories(locals map[string]string) (filesync.StaticDirSource, error) {
	all := filesync.StaticDirSource{}
	for name, dir := range locals {
		d, err := fsutil.NewFS(dir)
		if err == nil {
			d, err = fsutil.NewFilterFS(d, &fsutil.FilterOpt{Map: func(_ string, st *fstypes.Stat) fsutil.MapResult {
				st.Uid, st.Gid = 0, 0
				return fsutil.MapResultKeep
			}})
		}
		if err != nil {
			return nil, fmt.Errorf("local directory %q: %w", name, err)
		}
		all[name] = d
	}
	return all, nil
}

// passwords gives the server the user's credentials for registries, when it asks for them. It does
// not get tokens for the server, which is why there are no other methods.
type passwords struct {
	sessionauth.UnimplementedAuthServer
	keychain authn.Keychain
}

// Register implements session.Attachable.
func (c *passwords) Register(s *grpc.Server) { sessionauth.RegisterAuthServer(s, c) }

// Credentials implements sessionauth.AuthServer.
func (c *passwords) Credentials(ctx context.Context, req *sessionauth.CredentialsRequest) (*sessionauth.CredentialsResponse, error) {
	reg, err := name.NewRegistry(req.Host)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	a, err := authn.Resolve(ctx, c.keychain, reg)
	if err != nil {
		return nil, err
	}
	cfg, err := authn.Authorization(ctx, a)
	if err != nil {
		return nil, err
	}
	if cfg.IdentityToken != "" { // without a user, as docker keeps them
		return &sessionauth.CredentialsResponse{Secret: cfg.IdentityToken}, nil
	}
	return &sessionauth.CredentialsResponse{Username: cfg.Username, Secret: cfg.Password}, nil
}

// secretServer gives the server secrets, when a step asks for them.
type secretServer struct {
	secrets.UnimplementedSecretsServer
	secrets *secret.Secrets
}

// Register implements session.Attachable.
func (s *secretServer) Register(srv *grpc.Server) { secrets.RegisterSecretsServer(srv, s) }

// GetSecret implements secrets.SecretsServer.
func (s *secretServer) GetSecret(ctx context.Context, req *secrets.GetSecretRequest) (*secrets.GetSecretResponse, error) {
	v, err := s.secrets.Secret(ctx, req.ID)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, status.Error(codes.NotFound, err.Error())
	}
	if err != nil {
		return nil, err
	}
	return &secrets.GetSecretResponse{Data: v}, nil
}

// agentServer connects steps with SSH agents.
type agentServer struct {
	sshforward.UnimplementedSSHServer
	agents *sshagent.Agents
}

// Register implements session.Attachable.
func (s *agentServer) Register(srv *grpc.Server) { sshforward.RegisterSSHServer(srv, s) }

// CheckAgent implements sshforward.SSHServer.
func (s *agentServer) CheckAgent(ctx context.Context, req *sshforward.CheckAgentRequest) (*sshforward.CheckAgentResponse, error) {
	c, err := s.agents.DialAgent(ctx, agentID(req.ID))
	if err != nil {
		return nil, missingAgent(err)
	}
	c.Close()
	return &sshforward.CheckAgentResponse{}, nil
}

// ForwardAgent implements sshforward.SSHServer.
func (s *agentServer) ForwardAgent(stream sshforward.SSH_ForwardAgentServer) error {
	id := ""
	if md, ok := metadata.FromIncomingContext(stream.Context()); ok && len(md[sshforward.KeySSHID]) > 0 {
		id = md[sshforward.KeySSHID][0]
	}
	c, err := s.agents.DialAgent(stream.Context(), agentID(id))
	if err != nil {
		return missingAgent(err)
	}
	return sshforward.Copy(stream.Context(), c, stream, nil)
}

func agentID(id string) string {
	if id == "" {
		return sshagent.DefaultID
	}
	return id
}

func missingAgent(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return status.Error(codes.NotFound, err.Error())
	}
	return err
}
