package registry

import (
	"fmt"
	"io"
	"net/http"
	"net/url"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// handshake is the transport under go-containerregistry's ping and token
// exchange. It bounds the answers, follows no redirect from outside to an
// address inside, and keeps a credential from following a redirect elsewhere.
type handshake struct {
	base  http.RoundTripper
	first *url.URL // where the handshake was meant to go
}

// RoundTrip implements http.RoundTripper.
func (h *handshake) RoundTrip(req *http.Request) (*http.Response, error) {
	if hostPort(h.first) != hostPort(req.URL) {
		if err := checkHop(h.first, req.URL); err != nil {
			return nil, refuse(req, err)
		}
		if req.Method != http.MethodGet { // a refresh token is in the body
			return nil, refuse(req, fmt.Errorf("refusing to take a token to %s: %w", req.URL.Host, errPermanent))
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

// pingTransport and tokenTransport are the handshakes of a session.
func (s *session) pingTransport() http.RoundTripper {
	return &handshake{base: s.base, first: &url.URL{Scheme: "https", Host: s.target.host}}
}

func (s *session) tokenTransport(c *transport.Challenge) http.RoundTripper {
	first, err := url.Parse(c.Parameters["realm"])
	if err != nil {
		first = &url.URL{} // which is refused before it is asked
	}
	return &handshake{base: s.base, first: first}
}
