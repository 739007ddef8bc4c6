package conformance

import (
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kiln-build/kiln/test/testenv"
)

// webAddr is where cases find what they serve. It is the same in every run, because
// URLs are in the history of images, and on an address that nobody else is likely to use.
const webAddr = "127.77.0.1:8077"

// web serves a directory of a case's context by http, with the git repositories in it.
type web struct {
	mu    sync.Mutex
	cases map[string]http.Handler // by name
}

func startWeb(t *testing.T) *web {
	t.Helper()
	w := &web{cases: map[string]http.Handler{}}
	l, err := net.Listen("tcp", webAddr)
	for end := time.Now().Add(5 * time.Minute); err != nil && time.Now().Before(end); l, err = net.Listen("tcp", webAddr) {
		time.Sleep(time.Second) // another run of this test has it
	}
	if err != nil {
		t.Fatalf("serve the cases' files: %v", err)
	}
	srv := &http.Server{Handler: w}
	go srv.Serve(l) //nolint:errcheck // says that it was closed
	t.Cleanup(func() { srv.Close() })
	return w
}

// serve begins to serve a case whose context is in dir.
func (w *web) serve(c *Case, dir string) error {
	if c.Serve == "" {
		return nil
	}
	h, err := testenv.Web(filepath.Join(dir, c.Serve))
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cases[c.Name] = http.StripPrefix("/"+c.Name, h)
	return nil
}

// webURL is the build argument WEB of a case.
func (c *Case) webURL() string { return fmt.Sprintf("http://%s/%s", webAddr, c.Name) }

func (w *web) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	name, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	w.mu.Lock()
	h := w.cases[name]
	w.mu.Unlock()
	if h == nil {
		http.NotFound(rw, r)
		return
	}
	h.ServeHTTP(rw, r)
}
