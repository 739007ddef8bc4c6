// Package ctl is the client's side of BuildKit's API: what buildctl does when a server is
// addressed, be it Kiln's or BuildKit's own.
package ctl

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"

	"github.com/kiln-build/kiln/internal/diag"
)

// Address says where a server is, and how it and the client know each other. Files are in PEM.
type Address struct {
	Addr       string // unix://PATH or tcp://HOST:PORT
	ServerName string // in the server's certificate; empty: the host in Addr
	CA         string
	Cert, Key  string
	Dir        string        // has CA, Cert and Key, in place of those
	Timeout    time.Duration // how long to wait for the server; 0: as long as it takes
	Wait       bool          // for a server that is not up yet, too
}

// Client speaks to one server.
type Client struct {
	addr    string
	conn    *client.Client
	control controlapi.ControlClient
}

// Dial connects to a server, and makes sure that it answers.
func Dial(ctx context.Context, a Address) (*Client, error) {
	opts, err := a.options()
	if err != nil {
		return nil, diag.New(diag.ExitUsage, "address %q: %w", a.Addr, err)
	}
	conn, err := client.New(ctx, a.Addr, opts...)
	if err != nil {
		return nil, diag.New(diag.ExitUsage, "address %q: %w", a.Addr, err)
	}
	c := &Client{addr: a.Addr, conn: conn, control: conn.ControlClient()}
	if a.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, a.Timeout, fmt.Errorf("there was no answer for %s", a.Timeout))
		defer cancel()
	}
	if err := c.answers(ctx, a.Wait); err != nil {
		conn.Close()
		return nil, diag.New(diag.ExitFailure, "connect to the BuildKit server at %s: %w", a.Addr, err).
			WithHint("Is it running, and its address right (--addr, BUILDKIT_HOST)? Without an address, buildctl builds in its own process.")
	}
	return c, nil
}

// answers waits until the server does. One that is not there is an error, unless it is to be waited for.
func (c *Client) answers(ctx context.Context, wait bool) (err error) {
	if wait {
		err = c.conn.Wait(ctx)
	} else if _, err = c.control.Info(ctx, &controlapi.InfoRequest{}); grpcerrors.Code(err) == codes.Unimplemented {
		err = nil // by a server from before there was this request
	}
	if cause := context.Cause(ctx); err != nil && cause != nil {
		return cause
	}
	return err
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

func (a Address) options() (opts []client.ClientOpt, err error) {
	u, err := url.Parse(a.Addr)
	if err != nil {
		return nil, err
	}
	switch {
	case u.Scheme == "unix" && u.Path != "", u.Scheme == "tcp" && u.Host != "":
	default:
		return nil, errors.New("it is neither unix://PATH nor tcp://HOST:PORT")
	}
	if a.Dir != "" {
		if a.CA+a.Cert+a.Key != "" {
			return nil, errors.New("--tlsdir conflicts with --tlscacert, --tlscert and --tlskey")
		}
		if err := a.fromDir(); err != nil {
			return nil, err
		}
	}
	if a.ServerName == "" {
		a.ServerName = u.Hostname()
	}
	if a.CA != "" {
		opts = append(opts, client.WithServerConfig(a.ServerName, a.CA))
	}
	if a.Cert+a.Key != "" {
		opts = append(opts, client.WithCredentials(a.Cert, a.Key))
	}
	return opts, nil
}

// fromDir finds the files in the directory, by the names that docker or cert-manager give them.
func (a *Address) fromDir() error {
	for _, f := range []struct {
		to     *string
		either [2]string
	}{
		{&a.CA, [2]string{"ca.pem", "ca.crt"}},
		{&a.Cert, [2]string{"cert.pem", "tls.crt"}},
		{&a.Key, [2]string{"key.pem", "tls.key"}},
	} {
		for _, name := range f.either {
			if _, err := os.Stat(filepath.Join(a.Dir, name)); err == nil {
				*f.to = filepath.Join(a.Dir, name)
				break
			}
		}
		if *f.to == "" {
			return fmt.Errorf("there is neither %s nor %s in %q", f.either[0], f.either[1], a.Dir)
		}
	}
	return nil
}
