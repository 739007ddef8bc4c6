package registry

import (
	"context"
	"fmt"
	"net/http"
	"net/url"

	"github.com/kiln-build/kiln/internal/registry/auth"
)

// Login asks a registry, HOST[:PORT] or "docker.io", whether it takes a user's
// password. It keeps neither: see auth.Store.
func (c *Client) Login(ctx context.Context, host, user, password string) error {
	t := target{host: host}
	if auth.IsHub(host) || host == "docker.io" {
		t.host = hubHost
	}
	s := &session{client: c, target: t, base: c.transport, opened: make(chan struct{})}
	s.cred = auth.NewCredential(user, password, "the login")
	s.http = &http.Client{Transport: s, CheckRedirect: checkRedirect}
	what := fmt.Sprintf("log in to %q as %q", host, user)
	err := c.retry(ctx, "log in to "+host, func(ctx context.Context) error {
		if err := s.open(ctx); err != nil {
			return err
		}
		u := &url.URL{Scheme: s.scheme(), Host: s.target.host, Path: "/v2/"}
		req, err := request(ctx, http.MethodGet, u)
		if err != nil {
			return err
		}
		resp, err := s.send(req, http.StatusOK)
		if err != nil {
			return err
		}
		drain(resp)
		return nil
	})
	return s.fail(ctx, what, err)
}
