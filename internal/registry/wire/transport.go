package wire

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	maxHeaderBytes = 256 << 10
	// stallBytes must move within the stall timeout, or it is a stall.
	stallBytes = 4 << 10
	// commitFactor is how many stall timeouts a registry may be silent after
	// it has got a whole upload: it may copy and check it before it answers.
	commitFactor = 5
)

var errStalled = errors.New("the registry stopped answering")

// plainHTTPError refuses a request that would go out unencrypted.
type plainHTTPError struct{ host string }

func (e *plainHTTPError) Error() string {
	return fmt.Sprintf("plain HTTP to %q is not allowed", e.host)
}

// hostTransport sends requests with the settings of the host they go to, which
// after a redirect is not the registry's. It keeps the rules on plain HTTP, and
// on how long a host may be silent.
type hostTransport struct {
	net  *Net
	pool *x509.CertPool // nil: the system's

	mu     sync.Mutex
	byHost map[string]*http.Transport // "": hosts without settings of their own
}

// mayBeInsecure reports whether plain HTTP to the host of u is allowed.
func (t *hostTransport) mayBeInsecure(host string) bool {
	return t.isInsecure(host) || isLoopbackHost(hostname(host))
}

// isInsecure reports whether the user listed the host.
func (t *hostTransport) isInsecure(host string) bool {
	host = strings.ToLower(host)
	return t.net.insecure[host] || t.net.insecure[hostname(host)]
}

func hostname(hostport string) string {
	return (&url.URL{Host: hostport}).Hostname()
}

func isLoopbackHost(h string) bool {
	if h == "localhost" || strings.HasSuffix(h, ".localhost") {
		return true
	}
	a, err := netip.ParseAddr(h)
	return err == nil && a.Unmap().IsLoopback()
}

// RoundTrip implements http.RoundTripper.
func (t *hostTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	inner, err := t.forRequest(req)
	if err != nil {
		if req.Body != nil {
			_ = req.Body.Close()
		}
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	w := newWatch(t.net.opts.StallTimeout, func() { cancel(errStalled) })
	r := req.Clone(ctx)
	r.Header.Set("User-Agent", t.net.opts.UserAgent)
	if req.Body != nil && req.Body != http.NoBody {
		r.Body = &sentBody{ReadCloser: req.Body, watch: w}
	}
	w.resume()
	resp, err := inner.RoundTrip(r)
	w.pause()
	if err != nil {
		err = proxyCause(req, stallCause(ctx, err))
		cancel(nil)
		return nil, err
	}
	noteRetryAfter(ctx, resp)
	w.reset()
	resp.Body = &gotBody{ReadCloser: resp.Body, ctx: ctx, cancel: cancel, watch: w}
	return resp, nil
}

func stallCause(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); errors.Is(cause, errStalled) {
		return errStalled
	}
	return err
}

func (t *hostTransport) forRequest(req *http.Request) (*http.Transport, error) {
	host := req.URL.Host
	switch req.URL.Scheme {
	case "https":
	case "http":
		if !t.mayBeInsecure(host) {
			return nil, &plainHTTPError{host}
		}
	default:
		return nil, Permanent("cannot speak %q to %q", req.URL.Scheme, host)
	}
	insecure := t.isInsecure(host)
	dirs := certDirs(t.net.opts.CertDirs, host)
	given, hasGiven := t.net.opts.Certs[host]
	key := ""
	if insecure || len(dirs) > 0 || hasGiven {
		key = host
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if tr := t.byHost[key]; tr != nil {
		return tr, nil
	}
	cfg := &tls.Config{RootCAs: t.pool, InsecureSkipVerify: insecure, MinVersion: tls.VersionTLS12} //nolint:gosec // only where the user asked for it
	for _, d := range dirs {
		dir, err := dirCerts(d)
		if err != nil {
			return nil, err
		}
		given.CAs, given.Pairs = append(slices.Clip(given.CAs), dir.CAs...), append(slices.Clip(given.Pairs), dir.Pairs...)
	}
	if err := given.load(cfg); err != nil {
		return nil, err
	}
	t.byHost[key] = newTransport(cfg, t.net.opts.Parallel)
	return t.byHost[key], nil
}

func newTransport(cfg *tls.Config, parallel int) *http.Transport {
	var http1 http.Protocols
	http1.SetHTTP1(true)
	return &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		OnProxyConnectResponse: proxyAnswer,
		DialContext:            (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSClientConfig:        cfg,
		TLSHandshakeTimeout:    30 * time.Second,
		Protocols:              &http1,
		MaxIdleConns:           64,
		MaxIdleConnsPerHost:    4 * parallel,
		IdleConnTimeout:        90 * time.Second,
		ExpectContinueTimeout:  time.Second,
		MaxResponseHeaderBytes: maxHeaderBytes,
		DisableCompression:     true, // blobs are compressed, and their bytes are what is checked
		WriteBufferSize:        64 << 10,
		ReadBufferSize:         64 << 10,
	}
}

// watch calls stalled when too little has moved while it was running. It is
// paused while it is not the registry that is waited for.
type watch struct {
	limit   time.Duration
	stalled func()

	mu      sync.Mutex
	timer   *time.Timer
	left    time.Duration
	started time.Time
	running bool
	moved   int64
}

func newWatch(limit time.Duration, stalled func()) *watch {
	return &watch{limit: limit, left: limit, stalled: stalled}
}

func (w *watch) resume() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.running {
		return
	}
	w.running, w.started = true, time.Now()
	if w.timer == nil {
		w.timer = time.AfterFunc(w.left, w.stalled)
	} else {
		w.timer.Reset(w.left)
	}
}

func (w *watch) pause() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.running {
		return
	}
	w.running = false
	w.timer.Stop()
	w.left = max(w.left-time.Since(w.started), time.Millisecond)
}

// progress counts n bytes; enough of them start the time anew.
func (w *watch) progress(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.moved += int64(n)
	if w.moved >= stallBytes {
		w.moved, w.left = 0, w.limit
	}
}

func (w *watch) reset() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.left = w.limit
}

func (w *watch) setLimit(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.left = d
}

// sentBody is a request's body: time that its source takes is not the registry's.
type sentBody struct {
	io.ReadCloser
	watch *watch
}

func (b *sentBody) Read(p []byte) (int, error) {
	b.watch.pause()
	n, err := b.ReadCloser.Read(p)
	b.watch.progress(n)
	if err == io.EOF {
		b.watch.setLimit(commitFactor * b.watch.limit)
	}
	b.watch.resume()
	return n, err
}

// gotBody is an answer's body: only time spent in Read is the registry's.
type gotBody struct {
	io.ReadCloser
	ctx    context.Context //nolint:containedctx // of the request that this is the answer to
	cancel context.CancelCauseFunc
	watch  *watch
}

func (b *gotBody) Read(p []byte) (int, error) {
	b.watch.resume()
	n, err := b.ReadCloser.Read(p)
	b.watch.pause()
	b.watch.progress(n)
	if err != nil && err != io.EOF {
		err = stallCause(b.ctx, err)
	}
	return n, err
}

func (b *gotBody) Close() error {
	err := b.ReadCloser.Close()
	b.cancel(nil)
	return err
}
