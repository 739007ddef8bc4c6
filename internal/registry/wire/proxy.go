package wire

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
)

// proxyError is trouble with the proxy on the way to a registry. What the proxy
// is told, a user's password among it, is not in it.
type proxyError struct {
	proxy string // HOST:PORT
	code  int    // what it answered, of HTTP; 0 if it could not be reached
	err   error
}

func (e *proxyError) Error() string {
	if e.code != 0 {
		return fmt.Sprintf("the proxy %s does not connect: %d %s", e.proxy, e.code, http.StatusText(e.code))
	}
	return fmt.Sprintf("the proxy %s cannot be reached: %v", e.proxy, e.err)
}

func (e *proxyError) Unwrap() error { return e.err }

// proxyAnswer is told what a proxy answers to CONNECT; net/http would make an
// error of its status text alone.
func proxyAnswer(_ context.Context, proxy *url.URL, _ *http.Request, resp *http.Response) error {
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	return &proxyError{proxy: proxy.Host, code: resp.StatusCode}
}

// proxyCause is err, told as one of the proxy if it is.
func proxyCause(req *http.Request, err error) error {
	var op *net.OpError
	if !errors.As(err, &op) || op.Op != "proxyconnect" {
		return err
	}
	proxy, perr := http.ProxyFromEnvironment(req)
	if perr != nil || proxy == nil {
		return err
	}
	return &proxyError{proxy: proxy.Host, err: op.Err}
}
