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

// Options say how to reach registries. The zero value is what docker does.
type Options struct {
	// Keychain finds credentials. Nil: auth.Default(), docker's and podman's files.
	Keychain authn.Keychain
	// Insecure are the hosts, HOST or HOST:PORT, that may be spoken to by
	// plain HTTP or by TLS with a certificate that nobody vouches for.
	Insecure []string
	// UserAgent of all requests. Empty: "kiln".
	UserAgent string
	// CAFile has certificates in PEM that are trusted beside the system's
	// (SSL_CERT_FILE is honoured as everywhere in Go).
	CAFile string
	// CertDirs have a directory for each host with *.crt, NAME.cert and
	// NAME.key, as docker reads them. Nil: auth.CertDirs().
	CertDirs []string
	// Certs are for hosts, beside what CertDirs have.
	Certs map[string]Certs
	// Mirrors are asked first when something is pulled from a registry, in their order:
	// registry, such as docker.io → HOST[:PORT][/PATH], where PATH goes before the repository's.
	Mirrors map[string][]string
	// Logger gets retries and other things that went wrong but not for good.
	Logger *slog.Logger
	// Retry says how often and how long to try. Zero fields have defaults.
	Retry Retry
	// StallTimeout is how long a registry may be silent, or all but: less than
	// 4 KiB in this time. Zero: one minute.
	StallTimeout time.Duration
	// Parallel is the number of uploads, and of downloads, at once per
	// registry. Zero: 4.
	Parallel int
	// SkipPushCheck: who begins to push does not ask for the permission first.
	SkipPushCheck bool
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
	for reg, ms := range o.Mirrors {
		for _, m := range ms {
			host, _, _ := strings.Cut(m, "/")
			if _, err := name.NewRegistry(host); err != nil || host == "" || strings.Contains(m, "://") {
				return nil, diag.New(diag.ExitUsage, "mirror %q of registry %q: want HOST[:PORT][/PATH]", m, reg)
			}
		}
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

// Options are those that New was given, with the defaults filled in.
func (n *Net) Options() Options { return n.opts }

// cleanHost takes HOST[:PORT], also as people write it, with a scheme or slash.
func cleanHost(s string) (string, error) {
	h := strings.TrimPrefix(strings.TrimPrefix(s, "https://"), "http://")
	h = strings.ToLower(strings.TrimSuffix(h, "/"))
	if h == "" || strings.ContainsAny(h, "/@ ") {
		return "", diag.New(diag.ExitUsage, "insecure registry %q: want HOST or HOST:PORT", s)
	}
	return h, nil
}
