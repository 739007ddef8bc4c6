package peer

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/moby/buildkit/session"
	sessionauth "github.com/moby/buildkit/session/auth"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"

	"github.com/kiln-build/kiln/internal/registry/auth"
)

// authTimeout bounds how long the client may take to find a credential, or to get a token with it.
const authTimeout = time.Minute

// Resolve implements authn.Keychain.
func (p *Peer) Resolve(target authn.Resource) (authn.Authenticator, error) {
	return p.ResolveContext(p.ctx, target)
}

// ResolveContext implements authn.ContextKeychain: the client knows the credentials. A client
// that offers none, or has opened no session, has none.
func (p *Peer) ResolveContext(ctx context.Context, target authn.Resource) (authn.Authenticator, error) {
	if p.ID == "" {
		return authn.Anonymous, nil
	}
	c, err := p.caller(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("find credentials: %w", err)
	}
	if !supports(c, sessionauth.Auth_ServiceDesc.ServiceName, "Credentials") {
		return authn.Anonymous, nil
	}
	return &credential{caller: c, host: clientsName(target.RegistryStr())}, nil
}

// clientsName is the name by which clients know a registry: they find Docker Hub's credentials by this one alone.
func clientsName(host string) string {
	if auth.IsHub(host) {
		return "registry-1.docker.io"
	}
	return host
}

// credential is the client's for one registry. Where registries have tokens the client gets
// them, and the server never sees the password.
type credential struct {
	caller session.Caller
	host   string

	mu    sync.Mutex
	found authn.Authenticator // nil: not asked for yet
}

// String says to people where it comes from.
func (c *credential) String() string { return "the client's, for " + c.host }

// Authorization implements authn.Authenticator.
func (c *credential) Authorization() (*authn.AuthConfig, error) {
	return c.AuthorizationContext(context.Background())
}

// AuthorizationContext implements authn.ContextAuthenticator: user name and password.
func (c *credential) AuthorizationContext(ctx context.Context) (*authn.AuthConfig, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.found == nil {
		var err error
		if c.found, err = c.ask(ctx); err != nil {
			return nil, err
		}
	}
	return c.found.Authorization()
}

func (c *credential) client(ctx context.Context) (sessionauth.AuthClient, context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeoutCause(c.caller.Context(ctx), authTimeout, errors.New("the client did not answer in time"))
	return sessionauth.NewAuthClient(c.caller.Conn()), ctx, cancel
}

func (c *credential) ask(ctx context.Context) (authn.Authenticator, error) {
	client, ctx, cancel := c.client(ctx)
	defer cancel()
	res, err := client.Credentials(ctx, &sessionauth.CredentialsRequest{Host: c.host})
	switch {
	case grpcerrors.Code(err) == codes.Unimplemented:
		return authn.Anonymous, nil
	case err != nil:
		return nil, fmt.Errorf("ask the client for the credentials of %s: %w", c.host, err)
	case res.Secret == "":
		return authn.Anonymous, nil
	case res.Username == "": // as docker keeps identity tokens
		return auth.NewIdentityToken(res.Secret, "the client"), nil
	}
	return auth.NewCredential(res.Username, res.Secret, "the client"), nil
}

// Token implements auth.TokenSource. Clients that leave getting tokens to the
// server say so by having no authority for the host.
func (c *credential) Token(ctx context.Context, r auth.TokenRequest) (auth.Token, error) {
	client, ctx, cancel := c.client(ctx)
	defer cancel()
	salt := make([]byte, 32)
	_, _ = rand.Read(salt) // never fails
	_, err := client.GetTokenAuthority(ctx, &sessionauth.GetTokenAuthorityRequest{Host: c.host, Salt: salt})
	switch code := grpcerrors.Code(err); {
	case code == codes.Unimplemented || code == codes.Unavailable:
		return auth.Token{}, errors.ErrUnsupported
	case err != nil:
		return auth.Token{}, fmt.Errorf("ask the client whether it gets tokens for %s: %w", c.host, err)
	}
	res, err := client.FetchToken(ctx, &sessionauth.FetchTokenRequest{
		ClientID: "buildkit-client", Host: c.host, Realm: r.Realm, Service: r.Service, Scopes: r.Scopes,
	})
	if err != nil {
		return auth.Token{}, fmt.Errorf("the client cannot get a token for %s: %w", c.host, err)
	}
	return auth.Token{Value: res.Token, Life: time.Duration(res.ExpiresIn) * time.Second}, nil
}

var (
	_ authn.ContextKeychain = (*Peer)(nil)
	_ auth.TokenSource      = (*credential)(nil)
)
