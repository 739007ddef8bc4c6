package wire

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// Retry says how often a request that failed for a passing reason is tried.
type Retry struct {
	Tries int           // in all; zero: 6
	Base  time.Duration // the first wait, which then doubles; zero: 500ms
	Max   time.Duration // the longest wait, also of a Retry-After; zero: 30s
}

func (r Retry) withDefaults() Retry {
	if r.Tries <= 0 {
		r.Tries = 6
	}
	if r.Base <= 0 {
		r.Base = 500 * time.Millisecond
	}
	if r.Max <= 0 {
		r.Max = 30 * time.Second
	}
	return r
}

// wait before try number n+1, n from 1: half of it fixed, half by chance, so
// that many clients that failed together do not come back together.
func (r Retry) wait(n int, after time.Duration) time.Duration {
	d := r.Max
	if n < 20 {
		d = min(r.Base<<(n-1), r.Max)
	}
	d = d/2 + rand.N(d/2+1) //nolint:gosec // chance, not secrecy
	return max(d, min(after, r.Max))
}

type retryAfterKey struct{}

// Retry runs f until it succeeds, fails for good, or has been tried enough.
func (w *Net) Retry(ctx context.Context, what string, f func(ctx context.Context) error) error {
	for n := 1; ; n++ {
		var after atomic.Int64
		err := f(context.WithValue(ctx, retryAfterKey{}, &after))
		if err == nil || ctx.Err() != nil || !Transient(err) || n >= w.opts.Retry.Tries {
			return err
		}
		if err := w.Pause(ctx, n, time.Duration(after.Load()), what, err); err != nil {
			return err
		}
	}
}

// Pause waits before try number n+1 of what, which failed for why; after is how
// long the registry said to wait.
func (w *Net) Pause(ctx context.Context, n int, after time.Duration, what string, why error) error {
	d := w.opts.Retry.wait(n, after)
	w.opts.Logger.Warn("registry request failed, trying again",
		"request", what, "error", Clean(why.Error()), "try", n, "wait", d)
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// noteRetryAfter keeps what an answer says about when to come back for retry.
func noteRetryAfter(ctx context.Context, resp *http.Response) {
	after, ok := ctx.Value(retryAfterKey{}).(*atomic.Int64)
	if !ok || resp.StatusCode < 400 {
		return
	}
	v := resp.Header.Get("Retry-After")
	if s, err := strconv.ParseUint(v, 10, 31); err == nil {
		after.Store(int64(time.Duration(s) * time.Second))
	} else if t, err := http.ParseTime(v); err == nil {
		after.Store(int64(time.Until(t)))
	}
}

// ErrBeginAnew, in the chain of an error, makes it one to try again after.
var ErrBeginAnew = errors.New("it must begin anew")

// permanentError is an error that comes back however often one tries.
type permanentError struct{ err error }

func (e *permanentError) Error() string { return e.err.Error() }
func (e *permanentError) Unwrap() error { return e.err }

// Permanent is fmt.Errorf for an error that comes back however often one tries.
func Permanent(format string, a ...any) error {
	return &permanentError{fmt.Errorf(format, a...)}
}

// Transient tells errors that can pass by themselves. Unknown ones cannot.
func Transient(err error) bool {
	var (
		final   *permanentError
		plain   *plainHTTPError
		status  *Status
		proxy   *proxyError
		dns     *net.DNSError
		op      *net.OpError
		timeout interface{ Timeout() bool }
		record  tls.RecordHeaderError
		cert    *tls.CertificateVerificationError
		unknown x509.UnknownAuthorityError
	)
	switch {
	case errors.Is(err, ErrBeginAnew):
		return true
	case errors.As(err, &final), errors.As(err, &plain), errors.As(err, &record), errors.As(err, &cert), errors.As(err, &unknown):
		return false
	case errors.As(err, &status):
		return TransientStatus(status.Code)
	case errors.As(err, &proxy) && proxy.code != 0:
		return TransientStatus(proxy.code)
	case errors.As(err, &dns):
		return dns.IsTemporary || dns.IsTimeout
	case errors.Is(err, errStalled), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed):
		return true
	case errors.Is(err, syscall.ECONNREFUSED):
		// A registry on this machine that is not there will not come.
		return !(errors.As(err, &op) && isLoopbackAddr(op.Addr))
	}
	for _, errno := range []syscall.Errno{
		syscall.ECONNRESET, syscall.ECONNABORTED, syscall.EPIPE, syscall.ETIMEDOUT, syscall.EHOSTUNREACH, syscall.ENETUNREACH,
	} {
		if errors.Is(err, errno) {
			return true
		}
	}
	// net/http has no type for these.
	for _, s := range []string{"server closed idle connection", "TLS handshake timeout", "request body closed"} {
		if strings.Contains(err.Error(), s) {
			return true
		}
	}
	return errors.As(err, &timeout) && timeout.Timeout()
}

// TransientStatus tells HTTP statuses that can pass by themselves.
func TransientStatus(code int) bool {
	switch code {
	case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError,
		http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout,
		499, 520, 521, 522, 523, 524: // nginx's "client closed", Cloudflare's troubles with its origin
		return true
	}
	return false
}

func isLoopbackAddr(a net.Addr) bool {
	tcp, ok := a.(*net.TCPAddr)
	return ok && tcp.IP.IsLoopback()
}
