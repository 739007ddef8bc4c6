// Package registrytest runs the embedded registry for tests: on a free port of
// loopback, counting requests, failing on demand, with passwords, tokens or TLS
// if wanted.
package registrytest

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/kiln-build/kiln/internal/registryserver"
)

// Options of a test registry. The zero value is open to all, by plain HTTP.
type Options struct {
	// User and Password, if set, are wanted of everyone.
	User, Password string
	// Token makes the registry want bearer tokens from a token service, which
	// asks for User and Password.
	Token bool
	// TLS makes it speak TLS, with a certificate of its own making: see CAFile.
	TLS bool
	// Certificate, if set, is what it shows with TLS instead.
	Certificate *tls.Certificate
	// Root keeps the content; empty: a directory that goes with the test.
	Root string
}

// Registry is a running registry.
type Registry struct {
	opts   Options
	server *httptest.Server
	caFile string
	tokens *tokenService

	mu     sync.Mutex
	counts Counts
	faults []*Fault
}

// Counts are the requests so far that got through to the registry and
// succeeded, by what they did.
type Counts struct {
	BlobHeads, BlobGets, BlobMounts, BlobPuts int
	UploadStarts                              int
	ManifestHeads, ManifestGets, ManifestPuts int
	Failed                                    int // injected faults
	Requests                                  int // all
	Tokens                                    int
	BlobBytesSent                             int64 // bodies of successful uploads
}

// New starts a registry that ends with the test.
func New(tb testing.TB, o Options) *Registry {
	tb.Helper()
	if o.Root == "" {
		o.Root = tb.TempDir()
	}
	h, err := registryserver.NewHandler(registryserver.Options{Root: o.Root})
	if err != nil {
		tb.Fatal(err)
	}
	r := &Registry{opts: o}
	r.server = httptest.NewUnstartedServer(r.handler(h))
	r.server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)
	if o.TLS {
		if o.Certificate != nil {
			r.server.TLS = &tls.Config{Certificates: []tls.Certificate{*o.Certificate}}
		}
		r.server.StartTLS()
		r.caFile = filepath.Join(tb.TempDir(), "ca.crt")
		block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.server.Certificate().Raw})
		if err := os.WriteFile(r.caFile, block, 0o600); err != nil {
			tb.Fatal(err)
		}
	} else {
		r.server.Start()
	}
	tb.Cleanup(func() {
		r.server.CloseClientConnections()
		r.server.Close()
		if err := h.Close(); err != nil {
			tb.Error(err)
		}
	})
	return r
}

// Host is the registry's HOST:PORT, the beginning of its images' names.
func (r *Registry) Host() string { return r.server.Listener.Addr().String() }

// URL is the registry's base URL.
func (r *Registry) URL() string { return r.server.URL }

// CAFile has the certificate of a registry with TLS.
func (r *Registry) CAFile() string { return r.caFile }

// Certificate is that of a registry with TLS.
func (r *Registry) Certificate() *x509.Certificate { return r.server.Certificate() }

// Counts returns the requests so far.
func (r *Registry) Counts() Counts {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.counts
}

// ResetCounts sets all counts to zero.
func (r *Registry) ResetCounts() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.counts = Counts{}
}

func (r *Registry) handler(registry http.Handler) http.Handler {
	guarded := r.authorized(registry)
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.mu.Lock()
		r.counts.Requests++
		r.mu.Unlock()
		if f := r.fault(req); f != nil {
			f.serve(w, req, guarded)
			return
		}
		rec := &recorder{ResponseWriter: w, status: http.StatusOK}
		guarded.ServeHTTP(rec, req)
		if rec.status < 300 || rec.status == http.StatusTemporaryRedirect {
			r.count(req, rec.status)
		}
	})
}

func (r *Registry) count(req *http.Request, status int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c, path := &r.counts, req.URL.Path
	is := func(method, part string) bool { return req.Method == method && strings.Contains(path, part) }
	switch {
	case path == tokenPath:
		c.Tokens++
	case is(http.MethodPost, "/blobs/uploads/") && status == http.StatusCreated:
		c.BlobMounts++
	case is(http.MethodPost, "/blobs/uploads/"):
		c.UploadStarts++
	case is(http.MethodPut, "/blobs/uploads/"):
		c.BlobPuts++
		c.BlobBytesSent += req.ContentLength
	case is(http.MethodHead, "/blobs/"):
		c.BlobHeads++
	case is(http.MethodGet, "/blobs/"):
		c.BlobGets++
	case is(http.MethodHead, "/manifests/"):
		c.ManifestHeads++
	case is(http.MethodGet, "/manifests/"):
		c.ManifestGets++
	case is(http.MethodPut, "/manifests/"):
		c.ManifestPuts++
	}
}

type recorder struct {
	http.ResponseWriter
	status int
}

func (r *recorder) WriteHeader(code int) {
	r.status = code
	r.ResponseWriter.WriteHeader(code)
}

// Unwrap lets http.ResponseController reach the connection.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }
