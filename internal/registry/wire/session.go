package wire

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/kiln-build/kiln/internal/registry/auth"
)

// Session is an authenticated way to one repository, for a set of scopes. It
// is the http.RoundTripper that adds the authorization to requests for its
// registry, and only to those.
type Session struct {
	net    *Net
	repo   Repository
	scopes []string
	key    string
	base   http.RoundTripper
	http   *http.Client

	// Set by open, then constant.
	opened    chan struct{}
	reg       name.Registry
	cred      authn.Authenticator
	challenge *transport.Challenge

	mu      sync.Mutex
	token   string
	expires time.Time
	secrets []string // everything that must not be in an error
}

// Open returns an authenticated way to a repository for actions, "pull" or
// "pull,push"; mount are more repositories of its registry, to read. What is open
// already is used again.
func (n *Net) Open(ctx context.Context, r Repository, actions string, mount ...Repository) (*Session, error) {
	scopes := []string{r.scope(actions)}
	for _, m := range mount {
		scopes = append(scopes, m.scope("pull"))
	}
	key := r.Host + " " + strings.Join(scopes, " ")
	for {
		n.mu.Lock()
		s := n.sessions[key]
		mine := s == nil
		if mine {
			s = n.newSession(r, key, scopes)
			n.sessions[key] = s
		}
		n.mu.Unlock()
		if mine {
			err := n.Retry(ctx, "open "+r.Host, s.open)
			if err != nil {
				s.drop()
			}
			close(s.opened)
			return s, err
		}
		select {
		case <-ctx.Done():
			return s, context.Cause(ctx)
		case <-s.opened:
		}
		if s.challenge != nil {
			return s, nil
		}
		// Whoever opened it failed, and took it away: try ourselves, for our own error.
	}
}

// OpenAs returns a session for the registry of r, with a credential that it has
// accepted.
func (n *Net) OpenAs(ctx context.Context, r Repository, cred authn.Authenticator) (*Session, error) {
	s := n.newSession(r, "", nil)
	s.cred = cred
	err := n.Retry(ctx, "log in to "+r.Host, s.open)
	if err == nil {
		err = n.Retry(ctx, "log in to "+r.Host, s.check)
	}
	return s, err
}

func (n *Net) newSession(r Repository, key string, scopes []string) *Session {
	s := &Session{net: n, repo: r, scopes: scopes, key: key, base: n.transport, opened: make(chan struct{})}
	s.http = &http.Client{Transport: s, CheckRedirect: n.checkRedirect}
	return s
}

// check asks for something that needs the credential, if anything does.
func (s *Session) check(ctx context.Context) error {
	u := s.URL("")
	u.Path = "/v2/"
	req, err := Request(ctx, http.MethodGet, u)
	if err != nil {
		return err
	}
	resp, err := s.Send(req, http.StatusOK)
	if err != nil {
		return err
	}
	Drain(resp)
	return nil
}

// drop forgets the session, so that the next one asks for credentials anew.
func (s *Session) drop() {
	s.net.mu.Lock()
	defer s.net.mu.Unlock()
	if s.net.sessions[s.key] == s {
		delete(s.net.sessions, s.key)
	}
}

// open finds the credential, asks the registry how to use it, and gets the
// first token.
func (s *Session) open(ctx context.Context) error {
	repo, err := s.repo.resource()
	if err != nil {
		return err
	}
	s.reg = repo.Registry
	if s.cred == nil {
		cred, err := authn.Resolve(ctx, s.net.opts.Keychain, repo)
		if err != nil {
			return err
		}
		s.cred = cred
	}
	challenge, err := s.ping(ctx)
	if err != nil {
		return err
	}
	if strings.EqualFold(challenge.Scheme, "bearer") {
		if err := s.refresh(ctx, challenge); err != nil {
			return err
		}
	} else if err := s.hideSecrets(ctx); err != nil {
		return err
	}
	s.challenge = challenge
	return nil
}

func (s *Session) hideSecrets(ctx context.Context) error {
	cfg, err := authn.Authorization(ctx, s.cred)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hide(cfg.Password, cfg.Auth, cfg.IdentityToken, cfg.RegistryToken)
	return nil
}

// hide keeps strings out of errors. s.mu is held.
func (s *Session) hide(secrets ...string) {
	for _, v := range secrets {
		if v != "" && !slices.Contains(s.secrets, v) {
			s.secrets = append(s.secrets, v)
		}
	}
	if n := len(s.secrets); n > 64 { // old tokens
		s.secrets = append(s.secrets[:8:8], s.secrets[n-32:]...)
	}
}

// refresh gets a token from the token service that the registry named.
func (s *Session) refresh(ctx context.Context, challenge *transport.Challenge) error {
	if src, ok := s.cred.(auth.TokenSource); ok {
		tok, err := src.Token(ctx, auth.TokenRequest{
			Realm: challenge.Parameters["realm"], Service: challenge.Parameters["service"], Scopes: s.scopes,
		})
		if err == nil {
			s.keepToken(tok.Value, tok.Life)
		}
		if !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	if err := s.hideSecrets(ctx); err != nil {
		return err
	}
	cfg, err := authn.Authorization(ctx, s.cred)
	if err != nil {
		return err
	}
	if cfg.RegistryToken != "" { // is the token itself
		s.keepToken(cfg.RegistryToken, 0)
		return nil
	}
	tok, err := transport.Exchange(ctx, s.reg, s.cred, s.tokenTransport(challenge), s.scopes, challenge)
	if err != nil {
		return fmt.Errorf("get a token from %s: %w", tokenHost(challenge), fromTransport(err))
	}
	s.keepToken(cmp.Or(tok.AccessToken, tok.Token), time.Duration(tok.ExpiresIn)*time.Second)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hide(tok.Token, tok.RefreshToken)
	return nil
}

// keepToken uses a token from now on, until a little before its life is over; 0: for good.
func (s *Session) keepToken(token string, life time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hide(token)
	s.token, s.expires = token, time.Time{}
	if life > 0 {
		s.expires = time.Now().Add(life - min(life/4, 10*time.Second))
	}
}

func tokenHost(c *transport.Challenge) string {
	if u, err := url.Parse(c.Parameters["realm"]); err == nil && u.Host != "" {
		return Clean(u.Host)
	}
	return "the token service"
}

// authorization is the header for a request. stale is one that was refused.
func (s *Session) authorization(ctx context.Context, stale string) (string, error) {
	if strings.EqualFold(s.challenge.Scheme, "bearer") {
		s.mu.Lock()
		token, expired := s.token, !s.expires.IsZero() && time.Now().After(s.expires)
		s.mu.Unlock()
		if expired || "Bearer "+token == stale {
			if err := s.refresh(ctx, s.challenge); err != nil {
				return "", err
			}
			s.mu.Lock()
			token = s.token
			s.mu.Unlock()
		}
		return "Bearer " + token, nil
	}
	cfg, err := authn.Authorization(ctx, s.cred)
	if err != nil {
		return "", err
	}
	switch {
	case cfg.RegistryToken != "":
		return "Bearer " + cfg.RegistryToken, nil
	case cfg.Username != "" || cfg.Password != "":
		var r http.Request
		r.Header = http.Header{}
		r.SetBasicAuth(cfg.Username, cfg.Password)
		h := r.Header.Get("Authorization")
		s.mu.Lock()
		s.hide(cfg.Password, strings.TrimPrefix(h, "Basic "))
		s.mu.Unlock()
		return h, nil
	case cfg.Auth != "":
		return "Basic " + cfg.Auth, nil
	}
	return "", nil
}

// RoundTrip implements http.RoundTripper. A request that is refused for its
// token is sent once more with a fresh one.
func (s *Session) RoundTrip(req *http.Request) (*http.Response, error) {
	if !s.isRegistry(req.URL) {
		return s.base.RoundTrip(req)
	}
	ctx := req.Context()
	header, err := s.authorization(ctx, "")
	if err != nil {
		if req.Body != nil {
			_ = req.Body.Close()
		}
		return nil, err
	}
	resp, err := s.base.RoundTrip(withAuthorization(req, header))
	if err != nil || resp.StatusCode != http.StatusUnauthorized || !strings.HasPrefix(header, "Bearer ") {
		return resp, err
	}
	fresh, err := s.authorization(ctx, header)
	if err != nil || fresh == header {
		return resp, nil //nolint:nilerr // the registry's refusal says more
	}
	again := withAuthorization(req, fresh)
	if req.Body != nil && req.Body != http.NoBody {
		if req.GetBody == nil {
			return resp, nil
		}
		if again.Body, err = req.GetBody(); err != nil {
			return resp, nil //nolint:nilerr // as above
		}
	}
	Drain(resp)
	return s.base.RoundTrip(again)
}

func withAuthorization(req *http.Request, header string) *http.Request {
	r := req.Clone(req.Context()) // the original, which redirects copy, stays without
	if header != "" {
		r.Header.Set("Authorization", header)
	}
	return r
}

// isRegistry reports whether u is on the session's registry, by the scheme that
// the registry answered to.
func (s *Session) isRegistry(u *url.URL) bool {
	return s.challenge != nil && u.Scheme == s.scheme() && strings.EqualFold(hostPort(u), hostPort(s.URL("")))
}

func (s *Session) scheme() string {
	if s.challenge.Insecure {
		return "http"
	}
	return "https"
}

func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return u.Hostname() + ":" + port
}

// URL is that of something in the session's repository.
func (s *Session) URL(path string) *url.URL {
	return &url.URL{Scheme: s.scheme(), Host: s.repo.Host, Path: "/v2/" + s.repo.Path + path}
}

// Send makes one request and returns its answer if its status is one of ok.
func (s *Session) Send(req *http.Request, ok ...int) (*http.Response, error) {
	resp, err := s.http.Do(req)
	if err != nil {
		return nil, bare(err)
	}
	for _, code := range ok {
		if resp.StatusCode == code {
			return resp, nil
		}
	}
	defer Drain(resp)
	if resp.StatusCode == http.StatusUnauthorized {
		s.drop() // the credential may have been changed: the next session looks again
	}
	return nil, readStatus(resp)
}

// Request makes a request without a body.
func Request(ctx context.Context, method string, u *url.URL) (*http.Request, error) {
	return http.NewRequestWithContext(ctx, method, u.String(), nil)
}

// bare takes the URL off an error of net/http: it can hold a signature.
func bare(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// described says which credential was used.
func (s *Session) described() string {
	switch cred := s.cred.(type) {
	case nil:
		return ""
	case fmt.Stringer:
		return cred.String()
	default:
		if cred == authn.Anonymous {
			return "none"
		}
		return "from the keychain"
	}
}
