package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/kiln-build/kiln/internal/registry/auth"
)

// session is an authenticated way to one repository, for a set of scopes. It
// is the http.RoundTripper that adds the authorization to requests for its
// registry, and only to those.
type session struct {
	client *Client
	target target
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

// session returns the opened session for the target's repository; extra scopes
// are for repositories to mount from.
func (c *Client) session(ctx context.Context, t target, actions string, extra ...string) (*session, error) {
	scopes := append([]string{t.scope(actions)}, extra...)
	key := t.host + " " + strings.Join(scopes, " ")
	for {
		c.mu.Lock()
		s := c.sessions[key]
		mine := s == nil
		if mine {
			s = &session{client: c, target: t, scopes: scopes, key: key, base: c.transport, opened: make(chan struct{})}
			s.http = &http.Client{Transport: s, CheckRedirect: checkRedirect}
			c.sessions[key] = s
		}
		c.mu.Unlock()
		if mine {
			err := c.retry(ctx, "open "+t.host, s.open)
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

// drop forgets the session, so that the next one asks for credentials anew.
func (s *session) drop() {
	s.client.mu.Lock()
	defer s.client.mu.Unlock()
	if s.client.sessions[s.key] == s {
		delete(s.client.sessions, s.key)
	}
}

// open finds the credential, asks the registry how to use it, and gets the
// first token.
func (s *session) open(ctx context.Context) error {
	repo, err := s.target.resource()
	if err != nil {
		return err
	}
	s.reg = repo.Registry
	if s.cred == nil {
		cred, err := authn.Resolve(ctx, s.client.opts.Keychain, repo)
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

func (s *session) hideSecrets(ctx context.Context) error {
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
func (s *session) hide(secrets ...string) {
	for _, v := range secrets {
		if v != "" && !contains(s.secrets, v) {
			s.secrets = append(s.secrets, v)
		}
	}
	if n := len(s.secrets); n > 64 { // old tokens
		s.secrets = append(s.secrets[:8:8], s.secrets[n-32:]...)
	}
}

func contains(list []string, s string) bool {
	for _, v := range list {
		if v == s {
			return true
		}
	}
	return false
}

// refresh gets a token from the token service that the registry named.
func (s *session) refresh(ctx context.Context, challenge *transport.Challenge) error {
	if err := s.hideSecrets(ctx); err != nil {
		return err
	}
	cfg, err := authn.Authorization(ctx, s.cred)
	if err != nil {
		return err
	}
	if cfg.RegistryToken != "" { // is the token itself
		s.mu.Lock()
		defer s.mu.Unlock()
		s.token, s.expires = cfg.RegistryToken, time.Time{}
		return nil
	}
	tok, err := transport.Exchange(ctx, s.reg, s.cred, s.tokenTransport(challenge), s.scopes, challenge)
	if err != nil {
		return fmt.Errorf("get a token from %s: %w", tokenHost(challenge), fromTransport(err))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.token = tok.Token
	if tok.AccessToken != "" {
		s.token = tok.AccessToken
	}
	s.hide(tok.Token, tok.AccessToken, tok.RefreshToken)
	s.expires = time.Time{}
	if tok.ExpiresIn > 0 {
		life := time.Duration(tok.ExpiresIn) * time.Second
		s.expires = time.Now().Add(life - min(life/4, 10*time.Second))
	}
	return nil
}

func tokenHost(c *transport.Challenge) string {
	if u, err := url.Parse(c.Parameters["realm"]); err == nil && u.Host != "" {
		return clean(u.Host)
	}
	return "the token service"
}

// authorization is the header for a request. stale is one that was refused.
func (s *session) authorization(ctx context.Context, stale string) (string, error) {
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
		s.hide(strings.TrimPrefix(h, "Basic "))
		s.mu.Unlock()
		return h, nil
	case cfg.Auth != "":
		return "Basic " + cfg.Auth, nil
	}
	return "", nil
}

// RoundTrip implements http.RoundTripper. A request that is refused for its
// token is sent once more with a fresh one.
func (s *session) RoundTrip(req *http.Request) (*http.Response, error) {
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
	drain(resp)
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
func (s *session) isRegistry(u *url.URL) bool {
	return s.challenge != nil && u.Scheme == s.scheme() && strings.EqualFold(hostPort(u), hostPort(s.url("")))
}

func (s *session) scheme() string {
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

// url is that of something in the session's repository.
func (s *session) url(path string) *url.URL {
	return &url.URL{Scheme: s.scheme(), Host: s.target.host, Path: "/v2/" + s.target.path + path}
}

const maxRedirects = 10

// checkRedirect refuses long chains and those that lead from elsewhere to an
// address inside: a registry must not make us ask the cloud's metadata service.
func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) >= maxRedirects {
		return permanent("more than %d redirects", maxRedirects)
	}
	return checkHop(via[0].URL, req.URL)
}

func checkHop(from, to *url.URL) error {
	if from.Hostname() == to.Hostname() || isPrivate(from.Hostname()) || !isPrivate(to.Hostname()) {
		return nil
	}
	return permanent("refusing to follow %s to the private address %s", from.Host, to.Host)
}

func isPrivate(host string) bool {
	a, err := netip.ParseAddr(host)
	if err != nil {
		return isLoopbackHost(host)
	}
	a = a.WithZone("").Unmap()
	return a.IsLoopback() || a.IsPrivate() || a.IsLinkLocalUnicast() || a.IsLinkLocalMulticast() || a.IsUnspecified()
}

// drain reads what little is left of an answer, so that its connection can be
// used again, and closes it.
func drain(resp *http.Response) {
	_, _ = io.CopyN(io.Discard, resp.Body, 64<<10)
	_ = resp.Body.Close()
}

// send makes one request and returns its answer if its status is one of ok.
func (s *session) send(req *http.Request, ok ...int) (*http.Response, error) {
	resp, err := s.http.Do(req)
	if err != nil {
		return nil, bare(err)
	}
	for _, code := range ok {
		if resp.StatusCode == code {
			return resp, nil
		}
	}
	defer drain(resp)
	if resp.StatusCode == http.StatusUnauthorized {
		s.drop() // the credential may have been changed: the next session looks again
	}
	return nil, readStatus(resp)
}

// request makes a request without a body.
func request(ctx context.Context, method string, u *url.URL) (*http.Request, error) {
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
func (s *session) described() string {
	switch cred := s.cred.(type) {
	case nil:
		return ""
	case *auth.Credential:
		return cred.String()
	default:
		if cred == authn.Anonymous {
			return "none"
		}
		return "from the keychain"
	}
}
