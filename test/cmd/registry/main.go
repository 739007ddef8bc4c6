// Command registry serves a plain-HTTP registry that holds the tests' base
// images, until it is interrupted; with -proxy also a forward proxy for HTTP,
// for pods on a node without a way out.
//
//	registry [-addr HOST:PORT] [-dir DIR] [-proxy HOST:PORT] [-check REF]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/http/httputil"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/kiln-build/kiln/test/baseimages"
	"github.com/kiln-build/kiln/test/compare"
	"github.com/kiln-build/kiln/test/testenv"
)

func main() {
	addr := flag.String("addr", "127.0.0.1:5000", "`HOST:PORT` to listen on")
	dir := flag.String("dir", "", "`directory` of the blobs (default a temporary one)")
	proxy := flag.String("proxy", "", "`HOST:PORT` of a forward proxy for HTTP")
	check := flag.String("check", "", "instead: say whether the image `REF` is complete")
	flag.Parse()
	if *check != "" {
		if err := complete(*check); err != nil {
			fmt.Fprintln(os.Stderr, "registry:", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *addr, *dir, *proxy); err != nil {
		fmt.Fprintln(os.Stderr, "registry:", err)
		os.Exit(1)
	}
}

// complete reads an image whole: equal to itself, every digest verified.
func complete(ref string) error {
	img, err := compare.Open(ref)
	if err != nil {
		return err
	}
	r, err := compare.Images(img, img, compare.Options{})
	if err != nil {
		return err
	}
	d, err := img.Digest()
	if err != nil {
		return err
	}
	fmt.Printf("%s@%s: %d layers, complete\n", ref, d, r.LayersA)
	return nil
}

func run(ctx context.Context, addr, dir, proxy string) (err error) {
	if dir == "" {
		if dir, err = os.MkdirTemp("", "registry-*"); err != nil {
			return err
		}
		defer os.RemoveAll(dir)
	}
	reg, err := testenv.StartRegistry(addr, dir, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, reg.Close()) }()
	cache, err := testenv.CacheDir()
	if err != nil {
		return err
	}
	if err := baseimages.Open(cache, os.Stderr).Push(ctx, reg.Host); err != nil {
		return err
	}
	if proxy != "" {
		s := &http.Server{Addr: proxy, Handler: forward(), ReadHeaderTimeout: time.Minute}
		defer s.Close()
		go func() {
			if err := s.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
				fmt.Fprintln(os.Stderr, "registry: proxy:", err)
			}
		}()
	}
	fmt.Println("ready", reg.Host)
	<-ctx.Done()
	return nil
}

// forward serves absolute http:// requests, as clients of a proxy send them.
func forward() http.Handler {
	p := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.Out.Host = r.In.Host }}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Scheme != "http" || r.URL.Host == "" {
			http.Error(w, "only absolute http requests", http.StatusBadRequest)
			return
		}
		p.ServeHTTP(w, r)
	})
}
