package registryserver_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/registryserver"
	"github.com/opencontainers/go-digest"
)

func start(t *testing.T, o registryserver.Options) *registryserver.Server {
	t.Helper()
	if o.Addr == "" {
		o.Addr = "127.0.0.1:0"
	}
	s, err := registryserver.Start(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func do(t *testing.T, method, url, body string) (status int, header http.Header, answer string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, resp.Header, string(b)
}

func upload(t *testing.T, base, content string) digest.Digest {
	t.Helper()
	d := digest.FromString(content)
	status, h, text := do(t, http.MethodPost, base+"/v2/a/b/blobs/uploads/", "")
	if status != http.StatusAccepted {
		t.Fatal(status, text)
	}
	status, _, text = do(t, http.MethodPut, h.Get("Location")+"&digest="+d.String(), content)
	if status != http.StatusCreated {
		t.Fatal(status, text)
	}
	return d
}

func TestContentOutlivesTheServer(t *testing.T) {
	root := t.TempDir()
	s := start(t, registryserver.Options{Root: root})
	d := upload(t, "http://"+s.Addr(), "hello")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = start(t, registryserver.Options{Root: root})
	defer s.Close()
	blob := "http://" + s.Addr() + "/v2/a/b/blobs/" + d.String()
	if status, _, text := do(t, http.MethodGet, blob, ""); status != http.StatusOK || text != "hello" {
		t.Errorf("after a restart: %d %q", status, text)
	}
	if status, _, text := do(t, http.MethodDelete, blob, ""); status != http.StatusAccepted {
		t.Errorf("delete: %d %s", status, text)
	}
	if status, _, _ := do(t, http.MethodGet, blob, ""); status != http.StatusNotFound {
		t.Errorf("after delete: %d", status)
	}
}

func TestAddressInUse(t *testing.T) {
	s := start(t, registryserver.Options{Root: t.TempDir()})
	defer s.Close()
	_, err := registryserver.Start(registryserver.Options{Root: t.TempDir(), Addr: s.Addr()})
	var d *diag.Error
	if !errors.As(err, &d) || !strings.Contains(err.Error(), s.Addr()+" is in use") || !strings.Contains(d.Hint, "--addr") {
		t.Errorf("got %v", err)
	}
}

func TestBadOptions(t *testing.T) {
	for name, o := range map[string]registryserver.Options{
		"no root":     {},
		"root a file": {Root: "/dev/null/x"},
		"bad address": {Root: t.TempDir(), Addr: "127.0.0.1:99999"},
		"not ours":    {Root: t.TempDir(), Addr: "192.0.2.1:0"},
	} {
		if s, err := registryserver.Start(o); err == nil {
			t.Errorf("%s: no error", name)
			s.Close()
		}
	}
}

func TestServeEndsWithItsContext(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // it does not wait
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done, root := make(chan error, 1), t.TempDir()
	go func() { done <- registryserver.Serve(ctx, registryserver.Options{Root: root, Listener: l}) }()
	if status, _, _ := do(t, http.MethodGet, "http://"+l.Addr().String()+"/v2/", ""); status != http.StatusOK {
		t.Errorf("status %d", status)
	}
	// A request that runs while the end is asked for is answered.
	half := strings.Repeat("x", 1<<20) // more than some buffer between here and the server keeps back
	pr, pw := io.Pipe()
	slow := make(chan int, 1)
	status, h, _ := do(t, http.MethodPost, "http://"+l.Addr().String()+"/v2/a/blobs/uploads/", "")
	if status != http.StatusAccepted {
		t.Fatal(status)
	}
	go func() {
		req, err := http.NewRequestWithContext(context.WithoutCancel(t.Context()), http.MethodPut,
			h.Get("Location")+"&digest="+digest.FromString(half+half).String(), pr)
		if err != nil {
			t.Error(err)
			return
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Error(err)
			slow <- 0
			return
		}
		defer resp.Body.Close()
		slow <- resp.StatusCode
	}()
	if _, err := io.WriteString(pw, half); err != nil {
		t.Fatal(err)
	}
	for begun := false; !begun; time.Sleep(time.Millisecond) {
		data, err := filepath.Glob(root + "/docker/registry/v2/repositories/a/_uploads/*/data")
		if err != nil {
			t.Fatal(err)
		}
		begun = len(data) > 0
	}
	cancel()
	time.Sleep(50 * time.Millisecond)
	_, _ = io.WriteString(pw, half)
	pw.Close()
	if got := <-slow; got != http.StatusCreated {
		t.Errorf("the running upload got %d", got)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if c, err := net.Dial("tcp", l.Addr().String()); err == nil { //nolint:noctx // refused at once
		c.Close()
		t.Error("still listening")
	}
}

type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func TestLogs(t *testing.T) {
	var access, log safeBuffer
	root := t.TempDir()
	s := start(t, registryserver.Options{Root: root, AccessLog: &access, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	defer s.Close()
	base := "http://" + s.Addr()
	d := upload(t, base, "hello")
	do(t, http.MethodHead, base+"/v2/a/b/blobs/"+digest.FromString("none").String(), "")
	do(t, http.MethodGet, base+"/v2/a/b/blobs/"+d.String(), "")
	for _, want := range []string{"PUT \"/v2/a/b/blobs/uploads/", "\" 201 0B", "\" 404 ", "\" 200 5B"} {
		if !strings.Contains(access.String(), want) {
			t.Errorf("%q is not in the access log:\n%s", want, access.String())
		}
	}
	if log.String() != "" {
		t.Errorf("nothing was wrong, but the log says:\n%s", log.String())
	}
}

func TestWarnsWhenNotOnLoopback(t *testing.T) {
	for addr, want := range map[string]bool{"127.0.0.1:0": false, "0.0.0.0:0": true, "localhost:0": false} {
		var log safeBuffer
		s := start(t, registryserver.Options{Root: t.TempDir(), Addr: addr, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		if got := strings.Contains(log.String(), "no passwords"); got != want {
			t.Errorf("%s: warned: %v\n%s", addr, got, log.String())
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}
