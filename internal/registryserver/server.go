// Package registryserver is an OCI registry in this process: distribution's, on
// its filesystem driver. What is pushed to it is kept across restarts.
//
// It is meant for one machine: it listens on loopback unless told otherwise and
// has no TLS and no users.
package registryserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem" // registers the driver
	"github.com/kiln-build/kiln/internal/diag"
)

// DefaultAddr is where the registry listens if nothing else is said.
const DefaultAddr = "127.0.0.1:5000"

// drainTime is how long requests that run may go on after the end was asked for.
const drainTime = 5 * time.Second

// Options of a registry.
type Options struct {
	// Root is the directory that holds everything. It is made if it is not there.
	Root string
	// Addr is HOST:PORT to listen on; empty: DefaultAddr. Port 0: any free one.
	Addr string
	// Listener is used instead of Addr if it is not nil. The server closes it.
	Listener net.Listener
	// AccessLog gets one line per request. Nil: none.
	AccessLog io.Writer
	// Logger gets warnings and the registry's own internal errors. Nil: none.
	Logger *slog.Logger
}

// Server is a running registry.
type Server struct {
	addr    net.Addr
	http    *http.Server
	handler *Handler
	done    chan struct{}
	err     error
}

// Serve runs a registry until ctx ends, which is no error.
func Serve(ctx context.Context, o Options) error {
	s, err := Start(o)
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return s.Close()
	case <-s.done:
		return errors.Join(s.err, s.Close())
	}
}

// Start returns once the registry accepts connections.
func Start(o Options) (*Server, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	handler, err := NewHandler(o)
	if err != nil {
		return nil, err
	}
	l := o.Listener
	if l == nil {
		if l, err = listen(o); err != nil {
			return nil, errors.Join(err, handler.Close())
		}
	}
	s := &Server{
		addr: l.Addr(), handler: handler, done: make(chan struct{}),
		http: &http.Server{
			Handler:           handler,
			ReadHeaderTimeout: 30 * time.Second,
			IdleTimeout:       2 * time.Minute,
			ErrorLog:          slog.NewLogLogger(o.Logger.Handler(), slog.LevelWarn),
		},
	}
	go func() {
		defer close(s.done)
		if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			s.err = fmt.Errorf("serve registry: %w", err)
		}
	}()
	return s, nil
}

// Addr is where the registry listens, "127.0.0.1:5000".
func (s *Server) Addr() string { return s.addr.String() }

// Close lets running requests end, for a while, and stops the registry.
func (s *Server) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), drainTime)
	defer cancel()
	if err := s.http.Shutdown(ctx); err != nil {
		_ = s.http.Close() // whoever is still there has had its time
	}
	<-s.done
	return s.handler.Close()
}

func listen(o Options) (net.Listener, error) {
	addr := o.Addr
	if addr == "" {
		addr = DefaultAddr
	}
	l, err := net.Listen("tcp", addr) //nolint:noctx // it does not wait
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, diag.New(diag.ExitFailure, "start registry: %s is in use by another program", addr).
			WithHint("Stop that one, or choose another address with --addr HOST:PORT.")
	case err != nil:
		return nil, diag.New(diag.ExitFailure, "start registry: %w", err)
	}
	if tcp, ok := l.Addr().(*net.TCPAddr); !ok || !tcp.IP.IsLoopback() {
		o.Logger.Warn("the registry can be reached from other machines, and has no TLS and no passwords: "+
			"whoever reaches it can read, replace and delete its images", "addr", l.Addr().String())
	}
	return l, nil
}

// Handler is a registry without a server of its own.
type Handler struct {
	http.Handler
	app *handlers.App
}

// Close ends what the handler does in the background.
func (h *Handler) Close() error { return h.app.Shutdown() }

// NewHandler returns the registry for a server of the caller's; Addr and
// Listener are not used. It does not use distribution's registry.NewRegistry,
// which catches signals, starts tracing and logs to the standard output.
func NewHandler(o Options) (*Handler, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Root == "" {
		return nil, diag.New(diag.ExitUsage, "start registry: no directory for its content")
	}
	root, err := filepath.Abs(o.Root)
	if err == nil {
		err = os.MkdirAll(root, 0o755)
	}
	if err != nil {
		return nil, diag.New(diag.ExitFailure, "start registry: %w", err)
	}
	cfg := &configuration.Configuration{Storage: configuration.Storage{
		"filesystem": {"rootdirectory": root},
		"delete":     {"enabled": true},
	}}
	cfg.Catalog.MaxEntries = 1000
	quiet(o.Logger)
	h := &Handler{app: handlers.NewApp(context.Background(), cfg)}
	h.Handler = h.app
	if o.AccessLog != nil {
		h.Handler = &accessLog{next: h.app, w: o.AccessLog}
	}
	return h, nil
}
