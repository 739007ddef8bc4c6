package http

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func serve(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

func get(t *testing.T, url string, o Options) (string, error) {
	t.Helper()
	resp, err := Get(context.Background(), url, o)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

func TestGet(t *testing.T) {
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Last-Modified", "Fri, 13 Feb 2009 23:31:30 GMT")
		user, password, _ := r.BasicAuth()
		fmt.Fprintf(w, "%s %s %s %q", user, password, r.URL.RawQuery, r.Header.Get("Accept-Encoding"))
	})
	url = strings.Replace(url, "http://", "http://me:secret@", 1) + "/x?token=t"
	resp, err := Get(context.Background(), url, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || string(b) != `me secret token=t "gzip"` {
		t.Errorf("got %q, %v", b, err)
	}
	if resp.LastModified.Unix() != 1234567890 {
		t.Errorf("modified %v", resp.LastModified)
	}
}

func TestStatus(t *testing.T) {
	var tries atomic.Int32
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		n := tries.Add(1)
		switch {
		case r.URL.Path == "/flaky" && n < 3:
			w.WriteHeader(http.StatusBadGateway)
		case r.URL.Path == "/gone":
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, "\x1b[31mnot a Dockerfile")
		case r.URL.Path == "/down":
			w.WriteHeader(http.StatusServiceUnavailable)
		default:
			fmt.Fprint(w, "ok")
		}
	})
	if s, err := get(t, url+"/flaky", Options{}); s != "ok" || err != nil || tries.Load() != 3 {
		t.Errorf("flaky: %q, %v after %d tries", s, err, tries.Load())
	}
	tries.Store(0)
	_, err := get(t, url+"/gone?sig=SECRET", Options{})
	if err == nil || !strings.Contains(err.Error(), "404 Not Found") || strings.Contains(err.Error(), "SECRET") || strings.Contains(err.Error(), "\x1b") || tries.Load() != 1 {
		t.Errorf("gone: %v after %d tries", err, tries.Load())
	}
	tries.Store(0)
	if _, err := get(t, url+"/down", Options{Retries: 1}); err == nil || tries.Load() != 2 {
		t.Errorf("down: %v after %d tries", err, tries.Load())
	}
}

func TestTooLarge(t *testing.T) {
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/announced" {
			w.Header().Set("Content-Length", "1001")
		} else {
			w.(http.Flusher).Flush()
		}
		n := 1001
		if r.URL.Path == "/fits" {
			n = 1000
		}
		_, _ = w.Write(make([]byte, n))
	})
	for _, p := range []string{"/announced", "/streamed"} {
		if _, err := get(t, url+p, Options{MaxBytes: 1000}); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%s: %v", p, err)
		}
	}
	if s, err := get(t, url+"/fits", Options{MaxBytes: 1000}); len(s) != 1000 || err != nil {
		t.Errorf("fits: %d bytes, %v", len(s), err)
	}
}

func TestTruncated(t *testing.T) {
	url := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "100")
		_, _ = w.Write(make([]byte, 50))
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	})
	if _, err := get(t, url, Options{}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %v", err)
	}
}

func TestStall(t *testing.T) {
	release := make(chan struct{})
	t.Cleanup(func() { close(release) })
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/body" {
			_, _ = w.Write(make([]byte, 10))
			w.(http.Flusher).Flush()
		}
		select {
		case <-release:
		case <-r.Context().Done():
		}
	})
	for _, p := range []string{"/header", "/body"} {
		began := time.Now()
		_, err := get(t, url+p, Options{Stall: 100 * time.Millisecond, Retries: -1})
		if err == nil || !strings.Contains(err.Error(), "sent nothing for 100ms") || time.Since(began) > 5*time.Second {
			t.Errorf("%s: %v after %v", p, err, time.Since(began))
		}
	}
}

func TestSlowReaderIsNoStall(t *testing.T) {
	url := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		for range 2 {
			_, _ = w.Write(make([]byte, 10))
			w.(http.Flusher).Flush()
		}
	})
	resp, err := Get(context.Background(), url, Options{Stall: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.ReadFull(resp.Body, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond)
	if b, err := io.ReadAll(resp.Body); len(b) != 10 || err != nil {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

func TestRedirects(t *testing.T) {
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/loop":
			http.Redirect(w, r, "/loop", http.StatusFound)
		case "/once":
			http.Redirect(w, r, "/end", http.StatusMovedPermanently)
		case "/file":
			http.Redirect(w, r, "file:///etc/passwd", http.StatusFound)
		case "/end":
			fmt.Fprintf(w, "end %q", r.Header.Get("Referer"))
		}
	})
	if s, err := get(t, url+"/once?sig=SECRET", Options{}); s != `end ""` || err != nil {
		t.Errorf("once: %q, %v", s, err)
	}
	if _, err := get(t, url+"/loop?sig=SECRET", Options{}); err == nil || !strings.Contains(err.Error(), "more than 10") || strings.Contains(err.Error(), "SECRET") {
		t.Errorf("loop: %v", err)
	}
	if _, err := get(t, url+"/file", Options{}); err == nil || !strings.Contains(err.Error(), `"file"`) {
		t.Errorf("file: %v", err)
	}
	s := httptest.NewTLSServer(http.RedirectHandler(url+"/end", http.StatusFound))
	defer s.Close()
	if _, err := get(t, s.URL, Options{Transport: s.Client().Transport}); err == nil || !strings.Contains(err.Error(), "https to http") {
		t.Errorf("downgrade: %v", err)
	}
	if _, err := get(t, s.URL, Options{}); err == nil || !strings.Contains(err.Error(), "x509") {
		t.Errorf("untrusted certificate: %v", err)
	}
}

func TestProxy(t *testing.T) {
	proxy := serve(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "proxied ", r.URL) })
	env := []string{"HTTP_PROXY=http://old.invalid", "http_proxy=", "HTTP_PROXY=" + proxy, "NO_PROXY=direct.invalid"}
	if s, err := get(t, "http://some.invalid/x", Options{Env: env}); s != "proxied http://some.invalid/x" || err != nil {
		t.Errorf("got %q, %v", s, err)
	}
	if _, err := get(t, "http://direct.invalid/x", Options{Env: env, Retries: -1}); err == nil {
		t.Error("NO_PROXY is not heeded")
	}
}

func TestCancelled(t *testing.T) {
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write(make([]byte, 10))
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	ctx, cancel := context.WithCancel(context.Background())
	resp, err := Get(ctx, url, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := io.ReadAll(resp.Body); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestNoSecretsInErrors(t *testing.T) {
	for _, u := range []string{
		"http://user:SECRET@127.0.0.1:1/x?sig=SECRET#SECRET", "https://SECRET@127.0.0.1:1/", "ftp://SECRET@host/", "http://SECRET:SECRET@/x",
		"http://[SECRET", "http://SECRET%zz@host/",
	} {
		_, err := get(t, u, Options{Retries: -1})
		if err == nil || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%s: %v", u, err)
		}
	}
}

// TestKnown: what has not changed is not sent, also by servers that would, and what has is.
func TestKnown(t *testing.T) {
	var asked []string
	heads, matches, etag := true, true, `"1"`
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.Method+" "+r.Header.Get("Accept-Encoding"))
		if r.Method == http.MethodHead && !heads {
			w.WriteHeader(http.StatusMethodNotAllowed)
			return
		}
		w.Header().Set("ETag", etag)
		if matches && r.Header.Get("If-None-Match") == etag {
			w.WriteHeader(http.StatusNotModified)
			return
		}
		io.WriteString(w, "body")
	}))
	defer s.Close()
	for _, c := range []struct {
		heads, matches bool
		etag           string
		known          bool
		asked          []string
	}{
		{true, true, `"1"`, true, []string{"HEAD gzip"}},
		{true, false, `"1"`, true, []string{"HEAD gzip"}},
		{true, false, `W/"1"`, true, []string{"HEAD gzip"}},
		{true, true, `"2"`, false, []string{"HEAD gzip", "GET gzip"}},
		{false, true, `"1"`, true, []string{"HEAD gzip", "GET gzip"}},
		{false, false, `"1"`, false, []string{"HEAD gzip", "GET gzip"}},
	} {
		asked, heads, matches, etag = nil, c.heads, c.matches, c.etag
		resp, err := Get(t.Context(), s.URL, Options{ETag: `"1"`})
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.NotModified != c.known || (len(body) > 0) == c.known || !slices.Equal(asked, c.asked) {
			t.Errorf("%+v: known %v, body %q, asked %q, %v", c, resp.NotModified, body, asked, err)
		}
	}
}

// TestCompressed: compression for the way is undone, within the bounds.
func TestCompressed(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		defer z.Close()
		z.Write(make([]byte, 100_000))
	}))
	defer s.Close()
	for limit, ok := range map[int64]bool{100_000: true, 99_999: false} {
		resp, err := Get(t.Context(), s.URL, Options{MaxBytes: limit})
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if (err == nil) != ok || ok && n != 100_000 || !ok && !errors.Is(err, ErrTooLarge) {
			t.Errorf("limit %d: %d bytes, %v", limit, n, err)
		}
	}
}
