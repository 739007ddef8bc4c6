package wire

import (
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
)

const maxRedirects = 10

// checkRedirect refuses long chains and those that lead from elsewhere to an
// address inside: a registry must not make us ask the cloud's metadata service.
// Addresses that the user listed as insecure registries are meant.
func (n *Net) checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) >= maxRedirects {
		return Permanent("more than %d redirects", maxRedirects)
	}
	return n.checkHop(via[0].URL, req.URL)
}

func (n *Net) checkHop(from, to *url.URL) error {
	if from.Hostname() == to.Hostname() || isPrivate(from.Hostname()) || !isPrivate(to.Hostname()) || n.transport.isInsecure(to.Host) {
		return nil
	}
	return Permanent("refusing to follow %s to the private address %s", from.Host, to.Host)
}

func isPrivate(host string) bool {
	a, err := netip.ParseAddr(host)
	if err != nil {
		return isLoopbackHost(host)
	}
	a = a.WithZone("").Unmap()
	return a.IsLoopback() || a.IsPrivate() || a.IsLinkLocalUnicast() || a.IsLinkLocalMulticast() || a.IsUnspecified()
}

// Location is where an answer says to go on. On the registry itself the scheme
// stays: many sit behind a proxy that speaks TLS and do not know.
func (s *Session) Location(resp *http.Response) (*url.URL, error) {
	from := resp.Request.URL
	to, err := from.Parse(resp.Header.Get("Location"))
	if err != nil || resp.Header.Get("Location") == "" {
		return nil, Permanent("the registry gave no place to upload to")
	}
	if to.Scheme != from.Scheme && strings.EqualFold(to.Hostname(), from.Hostname()) && to.Port() == from.Port() {
		to.Scheme = from.Scheme
	}
	to.User = nil
	return to, s.net.checkHop(from, to)
}

// Drain reads what little is left of an answer, so that its connection can be
// used again, and closes it.
func Drain(resp *http.Response) {
	_, _ = io.CopyN(io.Discard, resp.Body, 64<<10)
	_ = resp.Body.Close()
}
