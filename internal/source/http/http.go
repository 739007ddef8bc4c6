// Package http fetches build contexts, Dockerfiles and what ADD names from http servers, with
// bounds on everything that a server decides: how much it sends, how long it
// takes, where it redirects to.
//
// Errors and descriptions never have a URL's user, password or query: presigned
// URLs carry their credentials there.
package http

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/http/httpproxy"
)

// Options say how to fetch. The zero value has the defaults.
type Options struct {
	// Env is where HTTP_PROXY, HTTPS_PROXY and NO_PROXY (or the same in lower
	// case) are taken from, as os.Environ has it.
	Env []string
	// MaxBytes bounds what is read of a response. Default: 64 GiB.
	MaxBytes int64
	// Stall is how long a server may send nothing. Default: a minute.
	Stall time.Duration
	// Retries is how often a request is repeated that failed before its response
	// began, and for a reason that may pass. Default: 3; below 0: never.
	Retries int
	// Transport sends the requests, in place of one that heeds Env.
	Transport http.RoundTripper
	// Header is sent with the request; a redirect to another host does not see its Authorization.
	Header http.Header
	// ETag is what the server called the version that is known already; empty: none is.
	ETag string
}

const (
	maxRedirects    = 10
	defaultMaxBytes = 64 << 30
	defaultStall    = time.Minute
	defaultRetries  = 3
	firstDelay      = 500 * time.Millisecond
)

// ErrTooLarge is what reading a response beyond Options.MaxBytes gives.
var ErrTooLarge = errors.New("response is larger than allowed")

// Response is a server's answer, as far as it matters.
type Response struct {
	Body io.ReadCloser
	// NotModified: what Options.ETag names is what there is. The body is empty then.
	NotModified  bool
	Size         int64     // 0 if the server did not say
	LastModified time.Time // zero if the server did not say
	// ETag and Disposition are the headers ETag and Content-Disposition; empty if there is none.
	ETag, Disposition string
}

// Get fetches an http or https URL. An answer other than success is an error.
func Get(ctx context.Context, rawURL string, o Options) (*Response, error) {
	u, err := url.Parse(rawURL)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("fetch %s: not an http URL", Redact(rawURL))
	}
	c := &client{o: o, u: u}
	c.defaults()
	if o.ETag != "" && c.unchanged(ctx) {
		return &Response{Body: http.NoBody, NotModified: true, ETag: o.ETag}, nil
	}
	delay := firstDelay
	for try := 0; ; try++ {
		resp, again, err := c.get(ctx, http.MethodGet)
		if err == nil {
			return resp, nil
		}
		err = fmt.Errorf("fetch %s: %w", Redact(rawURL), err)
		if !again || try >= c.o.Retries {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(delay):
		}
		delay *= 2
	}
}

type client struct {
	o  Options
	u  *url.URL
	rt http.RoundTripper
}

func (c *client) defaults() {
	if c.o.MaxBytes <= 0 {
		c.o.MaxBytes = defaultMaxBytes
	}
	if c.o.Stall <= 0 {
		c.o.Stall = defaultStall
	}
	if c.o.Retries == 0 {
		c.o.Retries = defaultRetries
	}
	c.rt = c.o.Transport
	if c.rt == nil {
		proxy := proxyFunc(c.o.Env)
		c.rt = &http.Transport{
			Proxy:               func(r *http.Request) (*url.URL, error) { return proxy(r.URL) },
			DialContext:         (&net.Dialer{Timeout: 30 * time.Second}).DialContext,
			TLSHandshakeTimeout: 30 * time.Second,
			ForceAttemptHTTP2:   true,
			DisableKeepAlives:   true, // one request: no connection is to stay
		}
	}
}

// unchanged asks for the headers alone: some servers have ETags, and send a body that was not asked for all the same.
// The answer to a request for the body says what is wrong, if something is.
func (c *client) unchanged(ctx context.Context) bool {
	resp, _, err := c.get(ctx, http.MethodHead)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.NotModified || strong(resp.ETag) == strong(c.o.ETag)
}

// strong is an ETag without what says that it is of equal content, not of equal bytes.
func strong(etag string) string { return strings.TrimPrefix(etag, "W/") }

// get makes one request. again says whether another may fare better.
func (c *client) get(ctx context.Context, method string) (_ *Response, again bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	b := &body{cancel: cancel, left: c.o.MaxBytes, max: c.o.MaxBytes, stall: c.o.Stall}
	b.timer = time.AfterFunc(c.o.Stall, func() { cancel(fmt.Errorf("server sent nothing for %s", c.o.Stall)) })
	defer func() {
		if err != nil {
			b.stop()
		}
	}()
	req, err := http.NewRequestWithContext(ctx, method, c.u.String(), nil)
	if err != nil {
		return nil, false, errors.New("not a valid URL")
	}
	req.Header.Set("User-Agent", "kiln")
	maps.Copy(req.Header, c.o.Header)
	if c.o.ETag != "" {
		req.Header.Set("If-None-Match", c.o.ETag)
	}
	if method == http.MethodHead {
		req.Header.Set("Accept-Encoding", "gzip") // as the request for the body has it, which an ETag may depend on
	}
	hc := http.Client{Transport: c.rt, CheckRedirect: checkRedirect}
	resp, err := hc.Do(req)
	if err != nil {
		return nil, !errors.Is(err, errRedirect) && !permanent(err), reason(ctx, err)
	}
	known := c.o.ETag != "" && resp.StatusCode == http.StatusNotModified
	if resp.StatusCode != http.StatusOK && !known {
		resp.Body.Close()
		again := resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests
		return nil, again, fmt.Errorf("invalid response status %s", status(resp))
	}
	if method != http.MethodHead && resp.ContentLength > c.o.MaxBytes {
		resp.Body.Close()
		return nil, false, fmt.Errorf("%w: %d bytes, the limit is %d", ErrTooLarge, resp.ContentLength, c.o.MaxBytes)
	}
	b.ctx, b.rc = ctx, resp.Body
	b.timer.Reset(c.o.Stall)
	when, _ := http.ParseTime(resp.Header.Get("Last-Modified"))
	return &Response{
		Body: b, NotModified: known, Size: max(resp.ContentLength, 0), LastModified: when,
		ETag: resp.Header.Get("ETag"), Disposition: resp.Header.Get("Content-Disposition"),
	}, false, nil
}

// status is a response's status without what a server may have written into it.
func status(resp *http.Response) string {
	return strings.TrimSpace(fmt.Sprintf("%d %s", resp.StatusCode, http.StatusText(resp.StatusCode)))
}

var errRedirect = errors.New("redirect not followed")

func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) >= maxRedirects {
		return fmt.Errorf("%w: more than %d of them", errRedirect, maxRedirects)
	}
	if s := req.URL.Scheme; s != "http" && s != "https" {
		return fmt.Errorf("%w: it leads to the scheme %q", errRedirect, s)
	}
	if via[len(via)-1].URL.Scheme == "https" && req.URL.Scheme != "https" {
		return fmt.Errorf("%w: it leads from https to http", errRedirect)
	}
	req.Header.Del("Referer") // has the query of where we come from
	return nil
}

// permanent reports whether an error will be the same next time.
func permanent(err error) bool {
	var dns *net.DNSError
	if errors.As(err, &dns) {
		return dns.IsNotFound
	}
	return errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "x509:") || strings.Contains(err.Error(), "tls:")
}

// reason is an error without the URL that net/http puts into it.
func reason(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && errors.Is(err, ctx.Err()) {
		return cause
	}
	var ue *url.Error
	if errors.As(err, &ue) {
		return ue.Err
	}
	return err
}

func proxyFunc(env []string) func(*url.URL) (*url.URL, error) {
	get := func(name string) string {
		for _, n := range []string{name, strings.ToLower(name)} {
			for _, kv := range slices.Backward(env) {
				if v, ok := strings.CutPrefix(kv, n+"="); ok && v != "" {
					return v
				}
			}
		}
		return ""
	}
	c := httpproxy.Config{HTTPProxy: get("HTTP_PROXY"), HTTPSProxy: get("HTTPS_PROXY"), NoProxy: get("NO_PROXY")}
	return c.ProxyFunc()
}

// Redact returns a URL without what may be a credential in it.
func Redact(rawURL string) string {
	u, err := url.Parse(rawURL)
	if err != nil {
		return "(URL that cannot be parsed)"
	}
	if u.User != nil {
		u.User = url.User("xxxxx")
	}
	if u.RawQuery != "" {
		u.RawQuery = "xxxxx"
	}
	u.Fragment = ""
	return u.String()
}

// body is a response's body with the bounds that Options has.
type body struct {
	ctx    context.Context //nolint:containedctx // the request's, to tell why it ended
	cancel context.CancelCauseFunc
	rc     io.ReadCloser
	timer  *time.Timer
	stall  time.Duration
	left   int64
	max    int64
}

func (b *body) Read(p []byte) (int, error) {
	// One byte more than is left tells a response that ends there from one that does not.
	if int64(len(p)) > b.left+1 {
		p = p[:b.left+1]
	}
	b.timer.Reset(b.stall)
	n, err := b.rc.Read(p)
	b.timer.Stop() // the time until the next Read is not the server's
	if b.left -= int64(n); b.left < 0 {
		return 0, fmt.Errorf("%w: more than %d bytes", ErrTooLarge, b.max)
	}
	if err != nil && err != io.EOF {
		err = reason(b.ctx, err)
	}
	return n, err
}

func (b *body) Close() error {
	b.stop()
	return b.rc.Close()
}

func (b *body) stop() {
	b.timer.Stop()
	b.cancel(nil)
}
