// Package auth finds, keeps and removes the credentials for registries where
// docker and podman keep them: docker's config.json (auths, credsStore,
// credHelpers), the DOCKER_AUTH_CONFIG variable and podman's auth.json.
//
// A credential is for the repository it is asked for and nothing else: an entry
// for "quay.io/team" is never sent for "quay.io/other", and an entry for a host
// never for a host that looks like it. Where a credential came from is kept with
// it, so that an error can name it; the secret itself never appears in an error.
package auth

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/registry/auth/ecr"
)

// HubKey is the key under which docker keeps the credentials of Docker Hub.
const HubKey = "https://index.docker.io/v1/"

// Credential is a credential and where it was found. Its String, which fmt and
// slog use as well, names the user and the source and never a secret.
type Credential struct {
	cfg    authn.AuthConfig
	source string
	// renew, if not nil, gives what counts now, for passwords of a short life.
	renew func(context.Context) (authn.AuthConfig, error)
}

// NewCredential returns a user name and password that came from source.
func NewCredential(user, password, source string) *Credential {
	return &Credential{cfg: authn.AuthConfig{Username: user, Password: password}, source: source}
}

// NewIdentityToken returns an identity token, which gets tokens without a password, that came from source.
func NewIdentityToken(token, source string) *Credential {
	return &Credential{cfg: authn.AuthConfig{IdentityToken: token}, source: source}
}

// TokenSource is an authn.Authenticator that gets tokens itself, so that nobody else
// needs the password.
type TokenSource interface {
	// Token gets a token. errors.ErrUnsupported: it is to be got with the credential.
	Token(ctx context.Context, r TokenRequest) (Token, error)
}

// TokenRequest says what for: realm is the token service's URL, service the registry's name there.
type TokenRequest struct {
	Realm, Service string
	Scopes         []string
}

// Token is a bearer token.
type Token struct {
	Value string
	Life  time.Duration // 0: not known
}

// Authorization implements authn.Authenticator.
func (c *Credential) Authorization() (*authn.AuthConfig, error) {
	return c.AuthorizationContext(context.Background())
}

// AuthorizationContext implements authn.ContextAuthenticator.
func (c *Credential) AuthorizationContext(ctx context.Context) (*authn.AuthConfig, error) {
	cfg := c.cfg
	if c.renew == nil {
		return &cfg, nil
	}
	cfg, err := c.renew(ctx)
	return &cfg, err
}

// String is `user "name" from /path/config.json`.
func (c *Credential) String() string {
	switch {
	case c.cfg.RegistryToken != "":
		return "a registry token from " + c.source
	case c.cfg.IdentityToken != "":
		return "an identity token from " + c.source
	default:
		return fmt.Sprintf("user %q from %s", c.cfg.Username, c.source)
	}
}

// GoString keeps %#v from printing the secret.
func (c *Credential) GoString() string { return c.String() }

// Keychain finds credentials in the places that docker and podman use. It reads
// them anew each time, so a login elsewhere is seen.
type Keychain struct {
	inline string // a config as JSON, from DOCKER_AUTH_CONFIG
	paths  []string
	ecr    *ecr.Login
}

// Default returns the keychain for this process's environment. The first place
// that has a credential for a repository is used:
//
//   - $DOCKER_AUTH_CONFIG, the JSON itself
//   - $DOCKER_CONFIG/config.json
//   - $REGISTRY_AUTH_FILE
//   - ~/.docker/config.json, unless $DOCKER_CONFIG is set; without HOME, ~ is what /etc/passwd says
//   - $XDG_RUNTIME_DIR/containers/auth.json
//   - $XDG_CONFIG_HOME/containers/auth.json, or under ~/.config
func Default() *Keychain {
	places := []string{below(dockerDir(), "config.json"), os.Getenv("REGISTRY_AUTH_FILE")}
	if os.Getenv("DOCKER_CONFIG") == "" {
		slices.Reverse(places)
	}
	places = append(places, below(os.Getenv("XDG_RUNTIME_DIR"), "containers", "auth.json"), below(configHome(), "containers", "auth.json"))
	return &Keychain{inline: os.Getenv("DOCKER_AUTH_CONFIG"), paths: existing(places), ecr: ecr.New()}
}

// CertDirs returns where docker and podman look for the certificates of
// registries, each with a directory for a host: the machine's and the user's.
func CertDirs() []string {
	return existing([]string{
		"/etc/docker/certs.d", "/etc/containers/certs.d", below(dockerDir(), "certs.d"),
		below(configHome(), "docker", "certs.d"), below(configHome(), "containers", "certs.d"),
	})
}

// below is a path in dir; "" if there is no dir.
func below(dir string, elem ...string) string {
	if dir == "" {
		return ""
	}
	return filepath.Join(append([]string{dir}, elem...)...)
}

// existing leaves out the places that this process does not have.
func existing(places []string) []string {
	return slices.DeleteFunc(places, func(p string) bool { return p == "" })
}

// dockerDir is the directory of docker's config: $DOCKER_CONFIG or ~/.docker.
func dockerDir() string {
	if d := os.Getenv("DOCKER_CONFIG"); d != "" {
		return d
	}
	return below(home(), ".docker")
}

// configHome is $XDG_CONFIG_HOME or ~/.config.
func configHome() string {
	if d := os.Getenv("XDG_CONFIG_HOME"); d != "" {
		return d
	}
	return below(home(), ".config")
}

// home is $HOME, or without it, in a process that nobody has logged in for,
// what /etc/passwd says; "" if that says nothing.
func home() string {
	if h, err := os.UserHomeDir(); err == nil {
		return h
	}
	if u, err := user.Current(); err == nil {
		return u.HomeDir
	}
	return ""
}

// Resolve implements authn.Keychain.
func (k *Keychain) Resolve(target authn.Resource) (authn.Authenticator, error) {
	return k.ResolveContext(context.Background(), target)
}

// ResolveContext implements authn.ContextKeychain: a *Credential, or
// authn.Anonymous if no place has one.
func (k *Keychain) ResolveContext(ctx context.Context, target authn.Resource) (authn.Authenticator, error) {
	keys := lookupKeys(target.RegistryStr(), target.String())
	if k.inline != "" {
		cf, err := parse([]byte(k.inline), "DOCKER_AUTH_CONFIG")
		if err != nil {
			return nil, err
		}
		if c, err := cf.find(ctx, keys, k.ask); c != nil || err != nil {
			return found(c, err)
		}
	}
	for _, p := range k.paths {
		cf, err := load(p)
		if err != nil {
			return nil, err
		}
		if c, err := cf.find(ctx, keys, k.ask); c != nil || err != nil {
			return found(c, err)
		}
	}
	return authn.Anonymous, nil
}

func found(c *Credential, err error) (authn.Authenticator, error) {
	if err != nil {
		return nil, err
	}
	return c, nil
}

// lookupKeys are the names under which a credential for a repository may be
// kept, the most specific first: host/a/b, host/a, host.
func lookupKeys(host, repository string) []string {
	hosts := []string{host}
	if IsHub(host) {
		hosts = []string{"docker.io", "index.docker.io", "registry-1.docker.io"}
	}
	var keys []string
	path := strings.TrimPrefix(strings.TrimPrefix(repository, host), "/")
	for path != "" {
		for _, h := range hosts {
			keys = append(keys, h+"/"+path)
		}
		i := strings.LastIndexByte(path, '/')
		path = path[:max(i, 0)]
	}
	if IsHub(host) {
		keys = append(keys, HubKey)
	}
	return append(keys, hosts...)
}

// IsHub reports whether host is one of the names of Docker Hub's registry.
func IsHub(host string) bool {
	switch host {
	case "docker.io", "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com":
		return true
	}
	return false
}

type configFile struct {
	Auths       map[string]authEntry `json:"auths"`
	CredsStore  string               `json:"credsStore"`
	CredHelpers map[string]string    `json:"credHelpers"`
	Proxies     map[string]proxies   `json:"proxies"`

	source string
}

type authEntry struct {
	Auth          string `json:"auth"`
	Username      string `json:"username"`
	Password      string `json:"password"`
	IdentityToken string `json:"identitytoken"`
	RegistryToken string `json:"registrytoken"`
}

// load reads a config; one that does not exist is empty.
func load(path string) (*configFile, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &configFile{source: path}, nil
	}
	if err != nil {
		return nil, diag.New(diag.ExitRegistry, "read registry credentials: %w", err)
	}
	return parse(raw, path)
}

func parse(raw []byte, source string) (*configFile, error) {
	cf := &configFile{source: source}
	if len(strings.TrimSpace(string(raw))) == 0 {
		return cf, nil
	}
	if err := json.Unmarshal(raw, cf); err != nil {
		// The text of a json error can quote what it read: only its kind and place are told.
		var syn *json.SyntaxError
		var typ *json.UnmarshalTypeError
		switch {
		case errors.As(err, &syn):
			err = fmt.Errorf("not valid JSON at byte %d", syn.Offset)
		case errors.As(err, &typ):
			err = fmt.Errorf("field %q has the wrong type", typ.Field)
		default:
			err = errors.New("not a docker config")
		}
		return nil, diag.New(diag.ExitRegistry, "parse registry credentials in %s: %w", source, err)
	}
	return cf, nil
}

// find looks the keys up as docker does, helper before file; but an entry of the
// file counts too when the helper knows nothing.
func (cf *configFile) find(ctx context.Context, keys []string, ask askHelper) (*Credential, error) {
	for _, k := range keys {
		if helper := cf.CredHelpers[k]; helper != "" {
			c, err := ask(ctx, helper, k, "credHelpers in "+cf.source)
			if c != nil || err != nil {
				return c, err
			}
		}
		if cf.CredsStore != "" && isServerKey(k) {
			c, err := ask(ctx, cf.CredsStore, k, "credsStore in "+cf.source)
			if c != nil || err != nil {
				return c, err
			}
		}
		c, err := cf.entry(k)
		if c != nil || err != nil {
			return c, err
		}
	}
	return nil, nil
}

// isServerKey tells a host from a path below it: stores know only hosts, and
// asking a store starts a process.
func isServerKey(k string) bool { return k == HubKey || !strings.Contains(k, "/") }

// entry is the credential that the file has under key, also written as an URL.
func (cf *configFile) entry(key string) (*Credential, error) {
	e, ok := cf.Auths[key]
	if !ok {
		for k, v := range cf.Auths {
			if legacyHost(k) == key {
				key, e, ok = k, v, true
				break
			}
		}
	}
	if !ok || e == (authEntry{}) {
		return nil, nil
	}
	c := &Credential{source: cf.source, cfg: authn.AuthConfig{
		Username: e.Username, Password: e.Password,
		IdentityToken: e.IdentityToken, RegistryToken: e.RegistryToken,
	}}
	if e.Auth != "" {
		user, pass, err := decodeAuth(e.Auth)
		if err != nil {
			return nil, diag.New(diag.ExitRegistry, "parse registry credentials in %s: auths[%q].auth: %w", cf.source, key, err)
		}
		c.cfg.Username, c.cfg.Password = user, pass
	}
	if c.cfg.Username == "" && c.cfg.IdentityToken == "" && c.cfg.RegistryToken == "" {
		return nil, nil
	}
	return c, nil
}

// legacyHost is the host of a key that old docker versions wrote as an URL,
// "https://host/v1/". A key with any other path is not for the whole host.
func legacyHost(key string) string {
	s := strings.TrimPrefix(strings.TrimPrefix(key, "https://"), "http://")
	host, path, _ := strings.Cut(s, "/")
	switch strings.Trim(path, "/") {
	case "", "v1", "v2":
		return host
	}
	return ""
}

func decodeAuth(s string) (user, password string, err error) {
	raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(s))
	if err != nil {
		return "", "", errors.New("not valid base64")
	}
	user, password, ok := strings.Cut(strings.TrimRight(string(raw), "\x00\n"), ":")
	if !ok || user == "" {
		return "", "", errors.New(`not "user:password" in base64`)
	}
	return user, password, nil
}
