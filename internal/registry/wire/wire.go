// Package wire is what lies between a registry's client and the network: who may
// be spoken to how, for how long, with which credential, and what may be tried
// again. It knows HTTP and authorization, and nothing of images.
package wire

import (
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/registry/auth"
)

// Options are those of registry.Options with the same names.
type Options struct {
	Keychain     authn.Keychain
	Insecure     []string
	UserAgent    string
	CAFile       string
	CertDirs     []string
	Logger       *slog.Logger
	Retry        Retry
	StallTimeout time.Duration
	Parallel     int
}

// Net opens sessions with registries. Safe for concurrent use.
type Net struct {
	opts      Options
	insecure  map[string]bool
	transport *hostTransport

	mu       sync.Mutex
	sessions map[string]*Session
}

// Repository is where a session leads.
type Repository struct {
	Host string // of the registry's API
	Name string // of the registry, as people know it
	Path string // of the repository, within the registry
}

// scope for a bearer token.
func (r Repository) scope(actions string) string { return "repository:" + r.Path + ":" + actions }

// resource is r as keychains want it.
func (r Repository) resource() (name.Repository, error) {
	reg, err := name.NewRegistry(r.Host)
	if err != nil {
		return name.Repository{}, diag.New(diag.ExitUsage, "registry %q: %w", r.Name, err)
	}
	return reg.Repo(r.Path), nil
}

// New returns a Net. It opens no connection.
func New(o Options) (*Net, error) {
	o = o.withDefaults()
	n := &Net{opts: o, insecure: map[string]bool{}, sessions: map[string]*Session{}}
	for _, h := range o.Insecure {
		host, err := cleanHost(h)
		if err != nil {
			return nil, err
		}
		n.insecure[host] = true
	}
	pool, err := certPool(o.CAFile)
	if err != nil {
		return nil, err
	}
	n.transport = &hostTransport{net: n, pool: pool, byHost: map[string]*http.Transport{}}
	return n, nil
}

func (o Options) withDefaults() Options {
	if o.Keychain == nil {
		o.Keychain = auth.Default()
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.UserAgent == "" {
		o.UserAgent = "kiln"
	}
	if o.CertDirs == nil {
		o.CertDirs = auth.CertDirs()
	}
	if o.StallTimeout <= 0 {
		o.StallTimeout = time.Minute
	}
	if o.Parallel <= 0 {
		o.Parallel = 4
	}
	o.Retry = o.Retry.withDefaults()
	return o
}

// Tries is how often something is tried at most.
func (n *Net) Tries() int { return n.opts.Retry.Tries }

// cleanHost takes HOST[:PORT], also as people write it, with a scheme or slash.
func cleanHost(s string) (string, error) {
	h := strings.TrimPrefix(strings.TrimPrefix(s, "https://"), "http://")
	h = strings.ToLower(strings.TrimSuffix(h, "/"))
	if h == "" || strings.ContainsAny(h, "/@ ") {
		return "", diag.New(diag.ExitUsage, "insecure registry %q: want HOST or HOST:PORT", s)
	}
	return h, nil
}
