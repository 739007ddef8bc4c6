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
	"sync"

	"github.com/kiln-build/kiln/internal/registry/wire"
	"golang.org/x/sync/semaphore"
)

// Options say how to reach registries. The zero value is what docker does.
type Options = wire.Options

// Certs are the certificates that a host is spoken to with.
type Certs = wire.Certs

// KeyPair names the files of a client certificate and its key.
type KeyPair = wire.KeyPair

// Retry says how often a request that failed for a passing reason is tried.
type Retry = wire.Retry

// Client speaks to registries. Safe for concurrent use.
type Client struct {
	net    *wire.Net
	down   sync.Map // hosts of mirrors that cannot be reached
	placed *placed

	mu    sync.Mutex
	slots map[string]*semaphore.Weighted
}

// New returns a client. It opens no connection.
func New(o Options) (*Client, error) {
	n, err := wire.New(o)
	if err != nil {
		return nil, err
	}
	return &Client{net: n, placed: newPlaced(), slots: map[string]*semaphore.Weighted{}}, nil
}

// slot waits for one of the registry's places for uploads or downloads and
// returns what gives it back. The two are counted apart: whoever copies from a
// registry to itself holds one of each.
func (c *Client) slot(ctx context.Context, kind, host string) (release func(), err error) {
	c.mu.Lock()
	s := c.slots[kind+" "+host]
	if s == nil {
		s = semaphore.NewWeighted(int64(c.net.Options().Parallel))
		c.slots[kind+" "+host] = s
	}
	c.mu.Unlock()
	if err := s.Acquire(ctx, 1); err != nil {
		return nil, fmt.Errorf("wait for a place to %s: %w", kind, context.Cause(ctx))
	}
	return sync.OnceFunc(func() { s.Release(1) }), nil
}
