// Package ctl is the client's side of BuildKit's API: what buildctl does when a server is
// addressed, be it Kiln's or BuildKit's own.
package ctl

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

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

// Client speaks to one server. BuildKit's own client is not used for it: with what that links, caches
// of all kinds and tracing, the program would be a megabyte larger.
type Client struct {
	conn    *grpc.ClientConn
	control controlapi.ControlClient
}

// maxMessage bounds one message, as BuildKit's client does.
const maxMessage = 16 << 20

// Dial connects to a server, and makes sure that it answers.
func Dial(ctx context.Context, a Address) (*Client, error) {
	conn, err := a.open()
	if err != nil {
		return nil, diag.New(diag.ExitUsage, "address %q: %w", a.Addr, err)
	}
	c := &Client{conn: conn, control: controlapi.NewControlClient(conn)}
	if a.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, a.Timeout, fmt.Errorf("there was no answer for %s", a.Timeout))
		defer cancel()
	}
	// One that is not there is an error at once, unless it is to be waited for.
	_, err = c.control.Info(ctx, &controlapi.InfoRequest{}, grpc.WaitForReady(a.Wait))
	if grpcerrors.Code(err) == codes.Unimplemented {
		err = nil // by a server from before there was this request
	}
	if err == nil {
		return c, nil
	}
	conn.Close()
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	return nil, diag.New(diag.ExitFailure, "connect to the BuildKit server at %s: %w", a.Addr, &message{error: err}).
		WithHint("Is it running, and its address right (--addr, BUILDKIT_HOST)? Without an address, buildctl builds in its own process.")
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// open makes the connection, which is tried when there is something to be said.
func (a Address) open() (*grpc.ClientConn, error) {
	u, err := url.Parse(a.Addr)
	if err != nil {
		return nil, err
	}
	target := a.Addr
	switch {
	case u.Scheme == "unix" && u.Path != "":
	case u.Scheme == "tcp" && u.Host != "":
		target = u.Host
	default:
		return nil, errors.New("it is neither unix://PATH nor tcp://HOST:PORT")
	}
	creds, err := a.credentials(u.Hostname())
	if err != nil {
		return nil, err
	}
	return grpc.NewClient(target, grpc.WithTransportCredentials(creds),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		grpc.WithUnaryInterceptor(grpcerrors.UnaryClientInterceptor), grpc.WithStreamInterceptor(grpcerrors.StreamClientInterceptor))
}

// credentials are for TLS if there is a certificate to check the server's with, or to show.
func (a Address) credentials(host string) (credentials.TransportCredentials, error) {
	if a.Dir != "" {
		if a.CA+a.Cert+a.Key != "" {
			return nil, errors.New("--tlsdir conflicts with --tlscacert, --tlscert and --tlskey")
		}
		if err := a.fromDir(); err != nil {
			return nil, err
		}
	}
	if a.CA+a.Cert+a.Key == "" {
		return insecure.NewCredentials(), nil
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: cmp.Or(a.ServerName, host)}
	if a.CA != "" {
		pem, err := os.ReadFile(a.CA)
		if err != nil {
			return nil, err
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("there is no certificate in %s", a.CA)
		}
	}
	if a.Cert+a.Key != "" {
		pair, err := tls.LoadX509KeyPair(a.Cert, a.Key)
		if err != nil {
			return nil, err
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return credentials.NewTLS(c), nil
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
