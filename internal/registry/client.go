// Package registry pulls images from and pushes them to OCI registries.
//
// Nothing that a registry says is believed: manifests, configs and blobs are
// checked against their digests and sizes, every answer is bounded in memory,
// and every wait in time. What can pass by itself (a dropped connection, 5xx,
// 429) is tried again with backoff; what cannot (401, 403, 404) fails at once.
//
// Connections use TLS; plain HTTP goes only to loopback and to the hosts of
// Options.Insecure. A credential goes to its registry and that registry's token
// service, and to no place that these redirect to.
//
// HTTP/1.1 is used throughout: a few connections with one transfer each are
// faster than one HTTP/2 connection with Go's flow control, and a reset of one
// transfer does not take the others with it.
//
// Errors are of type *diag.Error with code diag.ExitRegistry, except when the
// caller's context ended: then they wrap its cause.
package registry

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/kiln-build/kiln/internal/registry/wire"
	"golang.org/x/sync/semaphore"
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
	// CertDir has a directory for each host with *.crt, client.cert and
	// client.key, as docker reads them. Empty: /etc/docker/certs.d.
	CertDir string
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
	// SkipPushCheck makes Pusher not ask for the permission to push.
	SkipPushCheck bool
}

// Retry says how often a request that failed for a passing reason is tried.
type Retry = wire.Retry

// Client speaks to registries. Safe for concurrent use.
type Client struct {
	net       *wire.Net
	parallel  int64
	pushCheck bool
	placed    *placed

	mu    sync.Mutex
	slots map[string]*semaphore.Weighted
}

// New returns a client. It opens no connection.
func New(o Options) (*Client, error) {
	if o.Parallel <= 0 {
		o.Parallel = 4
	}
	n, err := wire.New(wire.Options{
		Keychain: o.Keychain, Insecure: o.Insecure, UserAgent: o.UserAgent, CAFile: o.CAFile, CertDir: o.CertDir,
		Logger: o.Logger, Retry: o.Retry, StallTimeout: o.StallTimeout, Parallel: o.Parallel,
	})
	if err != nil {
		return nil, err
	}
	return &Client{net: n, parallel: int64(o.Parallel), pushCheck: !o.SkipPushCheck, placed: newPlaced(), slots: map[string]*semaphore.Weighted{}}, nil
}

// slot waits for one of the registry's places for uploads or downloads and
// returns what gives it back. The two are counted apart: whoever copies from a
// registry to itself holds one of each.
func (c *Client) slot(ctx context.Context, kind, host string) (release func(), err error) {
	c.mu.Lock()
	s := c.slots[kind+" "+host]
	if s == nil {
		s = semaphore.NewWeighted(c.parallel)
		c.slots[kind+" "+host] = s
	}
	c.mu.Unlock()
	if err := s.Acquire(ctx, 1); err != nil {
		return nil, fmt.Errorf("wait for a place to %s: %w", kind, context.Cause(ctx))
	}
	return sync.OnceFunc(func() { s.Release(1) }), nil
}
