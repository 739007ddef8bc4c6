// Command nodeproxy is an HTTP proxy that listens on the node's address, for
// pods, which reach the node and nothing beyond it: apt in a RUN step gets its
// packages through it.
//
//	nodeproxy HOST:PORT
package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"time"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "nodeproxy: give HOST:PORT to listen on")
		os.Exit(2)
	}
	if err := serve(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "nodeproxy:", err)
		os.Exit(1)
	}
}

func serve(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	fmt.Println("ready", l.Addr())
	s := &http.Server{Handler: handler(), ReadHeaderTimeout: time.Minute}
	return s.Serve(l)
}

// handler serves what clients send to a proxy: requests for absolute http URLs,
// and CONNECT, which is how they ask for https.
func handler() http.Handler {
	forward := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.Out.Host = r.In.Host }}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodConnect:
			if err := tunnel(w, r); err != nil {
				fmt.Fprintf(os.Stderr, "nodeproxy: connect to %q: %v\n", r.Host, err)
			}
		case r.URL.Scheme == "http" && r.URL.Host != "":
			forward.ServeHTTP(w, r)
		default:
			http.Error(w, "this is a proxy: only absolute http requests and CONNECT", http.StatusBadRequest)
		}
	})
}

func tunnel(w http.ResponseWriter, r *http.Request) error {
	out, err := net.DialTimeout("tcp", r.Host, 30*time.Second)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return err
	}
	defer out.Close()
	h, ok := w.(http.Hijacker)
	if !ok {
		return errors.New("connection cannot be taken over")
	}
	in, buffered, err := h.Hijack()
	if err != nil {
		return err
	}
	defer in.Close()
	if _, err := io.WriteString(in, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		return err
	}
	go func() { // ends when the deferred calls close both
		_, _ = io.Copy(out, buffered)
		out.Close()
	}()
	_, err = io.Copy(in, out)
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
