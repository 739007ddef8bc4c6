// Package peer is the client of a build as the server sees it: what it lends the build through its
// session, which is a gRPC connection inside of the one that the client opened, in the other direction.
// It has the build contexts, takes the outputs that are files, knows the credentials for registries,
// secrets and ssh agents.
//
// Everything that a client sends is hostile input. Nothing that it says becomes a path on this
// machine, and what it can make the server keep is bounded.
package peer

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/moby/buildkit/session"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/source/statcache"
)

// waitForSession is how long a client has to open its session, which it does at the same time as it
// asks for a build.
const waitForSession = 5 * time.Second

// Sessions gives the session with an id, and waits until it is opened.
type Sessions func(ctx context.Context, id string) (session.Caller, error)

// Options are what a Peer works with.
type Options struct {
	Sessions Sessions
	ID       string // of the client's session
	Owner    string // who the client is, as far as is known
	Scratch  string // directory of the build's own for what the client sends
	// StatCache is a directory for what is known of clients' files; empty: none.
	StatCache string
}

// Peer is the client of one build. Safe for concurrent use.
type Peer struct {
	Options

	ctx    context.Context //nolint:containedctx // what contexts' streams live by: the build's
	cancel context.CancelFunc

	mu       sync.Mutex
	contexts []*files
	caches   []*directory
	stats    *statcache.Cache // of StatCache; nil until it is asked for

	uploads uploads
}

// New returns the client of a build. Close must be called.
func New(ctx context.Context, o Options) *Peer {
	ctx, cancel := context.WithCancel(ctx)
	return &Peer{Options: o, ctx: ctx, cancel: cancel}
}

// Close ends what is under way with the client. Contexts can no longer be read.
func (p *Peer) Close() error {
	p.cancel()
	p.mu.Lock()
	defer p.mu.Unlock()
	var first error
	for _, f := range p.contexts {
		if err := f.close(); err != nil && first == nil {
			first = err
		}
	}
	p.contexts = nil
	if p.stats != nil && first == nil {
		first = p.stats.Flush()
	}
	return first
}

// statCache is what is known of clients' files; nil: nothing is to be.
func (p *Peer) statCache() *statcache.Cache {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stats == nil && p.StatCache != "" {
		p.stats = statcache.Open(p.StatCache)
	}
	return p.stats
}

// caller is the session of the client, or of another that a definition names.
func (p *Peer) caller(ctx context.Context, id string) (session.Caller, error) {
	if id == "" {
		id = p.ID
	}
	if id == "" {
		return nil, diag.New(diag.ExitUsage, "the client has opened no session, so nothing can be had from it or sent to it")
	}
	ctx, cancel := context.WithTimeoutCause(ctx, waitForSession, fmt.Errorf("the client's session was not opened within %s", waitForSession))
	defer cancel()
	return p.Sessions(ctx, id)
}

// supports reports whether the client offers a method of a service of its session.
func supports(c session.Caller, service, method string) bool {
	return c.Supports(session.MethodURL(service, method))
}
