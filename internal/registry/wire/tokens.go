package wire

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// handshake is the transport under go-containerregistry's ping and token
// exchange. It bounds the answers, follows no redirect from outside to an
// address inside, and keeps a credential from following a redirect elsewhere.
type handshake struct {
	net   *Net
	base  http.RoundTripper
	first *url.URL // where the handshake was meant to go
}

// RoundTrip implements http.RoundTripper.
func (h *handshake) RoundTrip(req *http.Request) (*http.Response, error) {
	if hostPort(h.first) != hostPort(req.URL) {
		if err := h.net.checkHop(h.first, req.URL); err != nil {
			return nil, refuse(req, err)
		}
		if req.Method != http.MethodGet { // a refresh token is in the body
			return nil, refuse(req, Permanent("refusing to take a token to %s", req.URL.Host))
		}
		req = req.Clone(req.Context())
		req.Header.Del("Authorization")
	}
	resp, err := h.base.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	resp.Body = &boundedBody{ReadCloser: resp.Body, left: maxErrorBody}
	return resp, nil
}

func refuse(req *http.Request, err error) error {
	if req.Body != nil {
		_ = req.Body.Close()
	}
	return err
}

// boundedBody ends, without an error, at its limit: who gets so much where a
// line was expected gives no meaning to the rest.
type boundedBody struct {
	io.ReadCloser
	left int64
}

func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, io.EOF
	}
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

// tokenTransport is the handshake with a challenge's token service.
func (s *Session) tokenTransport(c *transport.Challenge) http.RoundTripper {
	first, err := url.Parse(c.Parameters["realm"])
	if err != nil {
		first = &url.URL{} // which is refused before it is asked
	}
	return &handshake{net: s.net, base: s.base, first: first}
}

// ping asks the registry what it wants for an authorization: by TLS, and if
// that is not what it speaks, and allowed, by plain HTTP.
func (s *Session) ping(ctx context.Context) (*transport.Challenge, error) {
	c, err := s.pingBy(ctx, "https")
	if err == nil || ctx.Err() != nil || !s.net.transport.mayBeInsecure(s.repo.Host) {
		return c, err
	}
	var (
		status *Status
		cert   *tls.CertificateVerificationError
	)
	if errors.As(err, &status) || errors.As(err, &cert) {
		return nil, err // it speaks TLS
	}
	c, plainErr := s.pingBy(ctx, "http")
	if plainErr != nil && !isPlain(err) && !errors.As(plainErr, &status) {
		return nil, err
	}
	return c, plainErr
}

// isPlain reports whether err is that of a TLS client with a plain HTTP server.
func isPlain(err error) bool {
	var record tls.RecordHeaderError
	return errors.As(err, &record) || strings.Contains(err.Error(), "server gave HTTP response to HTTPS client")
}

// standIn is the name that go-containerregistry is given to ping. For some
// names, those of private networks, it would try plain HTTP of its own accord.
const standIn = "registry.invalid"

func (s *Session) pingBy(ctx context.Context, scheme string) (*transport.Challenge, error) {
	reg, err := name.NewRegistry(standIn)
	if err != nil {
		return nil, err
	}
	base := &url.URL{Scheme: scheme, Host: s.repo.Host}
	c, err := transport.Ping(ctx, reg, &redirected{&handshake{net: s.net, base: s.base, first: base}, base})
	if err != nil {
		return nil, fromTransport(err)
	}
	c.Insecure = scheme == "http"
	return c, nil
}

// redirected sends what is for the stand-in to the registry.
type redirected struct {
	next http.RoundTripper
	to   *url.URL
}

// RoundTrip implements http.RoundTripper.
func (r *redirected) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Host == standIn {
		req = req.Clone(req.Context())
		req.URL.Scheme, req.URL.Host, req.Host = r.to.Scheme, r.to.Host, ""
	}
	return r.next.RoundTrip(req)
}
