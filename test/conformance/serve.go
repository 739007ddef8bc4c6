package conformance

import (
	"fmt"
	"net"
	"net/http"
	"net/http/cgi"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// webAddr is where cases find what they serve. It is the same in every run, because
// URLs are in the history of images, and on an address that nobody else is likely to use.
const webAddr = "127.77.0.1:8077"

// web serves a directory of a case's context by http, git repositories
// (DIR/NAME.git) by git's own http backend.
type web struct {
	mu   sync.Mutex
	dirs map[string]string // by case
	git  string            // where git's programs are
}

func startWeb(t *testing.T) *web {
	t.Helper()
	w := &web{dirs: map[string]string{}}
	out, err := exec.Command("git", "--exec-path").Output()
	if err != nil {
		t.Fatalf("find git: %v", err)
	}
	w.git = strings.TrimSpace(string(out))
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

// serve begins to serve a case whose context is in dir, and returns where.
func (w *web) serve(c *Case, dir string) {
	if c.Serve == "" {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dirs[c.Name] = filepath.Join(dir, c.Serve)
}

// webURL is the build argument WEB of a case.
func (c *Case) webURL() string { return fmt.Sprintf("http://%s/%s", webAddr, c.Name) }

func (w *web) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	name, rest, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	w.mu.Lock()
	dir := w.dirs[name]
	w.mu.Unlock()
	switch {
	case dir == "":
		http.NotFound(rw, r)
	case strings.Contains(rest, ".git/"):
		h := cgi.Handler{
			Path: filepath.Join(w.git, "git-http-backend"), Root: "/" + name,
			Env: []string{"GIT_PROJECT_ROOT=" + dir, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*"},
		}
		h.ServeHTTP(rw, r)
	default:
		http.StripPrefix("/"+name, http.FileServer(http.Dir(dir))).ServeHTTP(rw, r)
	}
}
