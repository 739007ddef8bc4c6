package registry

import (
	"context"
	"fmt"
	"strings"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/registry/auth"
)

// Stored says where a login is kept.
type Stored struct {
	Path  string // a file, or the name of a credential helper
	Plain bool   // the password can be read by who can read the file
}

// Login checks a user's password with the registry at host, and keeps it where
// docker does: in config.json, or in the credential helper that it names.
func (c *Client) Login(ctx context.Context, host, user, password string) (Stored, error) {
	host, err := loginHost(host)
	if err != nil {
		return Stored{}, err
	}
	if user == "" || password == "" {
		return Stored{}, diag.New(diag.ExitUsage, "log in to %q: user name and password must not be empty", host)
	}
	t, err := parseTarget(host + "/login") // the repository is not used
	if err != nil {
		return Stored{}, err
	}
	if t.repo.Name != host { // "name/login" is one of Docker Hub's: the password must not go there
		return Stored{}, diag.New(diag.ExitUsage, "log in to %q: a registry's name has a dot or a port", host)
	}
	s, err := c.net.OpenAs(ctx, t.repo, auth.NewCredential(user, password, "this login"))
	if err != nil {
		return Stored{}, s.Fail(ctx, fmt.Sprintf("log in to %q", host), err)
	}
	var w Stored
	w.Path, w.Plain, err = auth.Store(ctx, host, user, password)
	return w, err
}

// Logout forgets what Login kept for host; found is false if there was nothing.
func (c *Client) Logout(ctx context.Context, host string) (found bool, err error) {
	if host, err = loginHost(host); err != nil {
		return false, err
	}
	return auth.Erase(ctx, host)
}

// loginHost takes the names that people give to registries; empty is Docker Hub.
func loginHost(s string) (string, error) {
	h := strings.TrimPrefix(strings.TrimPrefix(s, "https://"), "http://")
	h = strings.TrimSuffix(h, "/")
	for _, version := range []string{"/v1", "/v2"} {
		h = strings.TrimSuffix(h, version)
	}
	h = strings.ToLower(h)
	switch {
	case h == "" || auth.IsHub(h):
		return "docker.io", nil
	case strings.ContainsAny(h, "/@ "):
		return "", diag.New(diag.ExitUsage, "registry %q: want HOST or HOST:PORT", s)
	}
	return h, nil
}
