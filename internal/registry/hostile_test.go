package registry_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/registry/registrytest"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// hostile starts a server that answers /v2/ as it should and leaves the rest to h.
func hostile(t *testing.T, h http.HandlerFunc) (host string) {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/v2/":
		case r.Method == http.MethodHead:
			w.WriteHeader(http.StatusMethodNotAllowed)
		default:
			h(w, r)
		}
	}))
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	return s.Listener.Addr().String()
}

// bounded fails the test if f takes too long or allocates too much.
func bounded(t *testing.T, f func()) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	start := time.Now()
	f()
	runtime.ReadMemStats(&after)
	if d := time.Since(start); d > 10*time.Second {
		t.Errorf("took %s", d)
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > 128<<20 {
		t.Errorf("allocated %d MiB", n>>20)
	}
}

func answer(contentType, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		_, _ = io.WriteString(w, body)
	}
}

// flood sends chunk until the client has enough.
func flood(w http.ResponseWriter, r *http.Request, chunk []byte) {
	for r.Context().Err() == nil {
		if _, err := w.Write(chunk); err != nil {
			return
		}
	}
}

func TestManifestsThatAreWrong(t *testing.T) {
	spaces := bytes.Repeat([]byte(" "), 1<<16)
	valid := string(newImage(t, amd64, 10).manifest)
	deep := `{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageIndex + `","manifests":` + strings.Repeat("[", 1<<20)
	for name, c := range map[string]struct {
		h    http.HandlerFunc
		want string
	}{
		"html":                    {answer("text/html", "<!DOCTYPE html><html><body>Please log in</body></html>"), "web page"},
		"truncated":               {answer(ocispec.MediaTypeImageManifest, valid[:len(valid)/2]), "not valid JSON"},
		"empty":                   {answer(ocispec.MediaTypeImageManifest, ""), "not valid JSON"},
		"null":                    {answer(ocispec.MediaTypeImageManifest, "null"), "digest"},
		"array":                   {answer(ocispec.MediaTypeImageManifest, "[]"), "not valid JSON"},
		"deep":                    {answer(ocispec.MediaTypeImageIndex, deep), "not valid JSON"},
		"schema 1":                {answer("application/vnd.docker.distribution.manifest.v1+prettyjws", `{"schemaVersion":1}`), "schema 1"},
		"schema 1 without a type": {answer("application/json", `{"schemaVersion":1,"fsLayers":[]}`), "schema 1"},
		"both":                    {answer("", `{"schemaVersion":2,"layers":[],"manifests":[]}`), "an index of several at once"},
		"two types":               {answer(ocispec.MediaTypeImageIndex, valid), "announced as"},
		"other type":              {answer("", `{"schemaVersion":2,"mediaType":"application/x-\u001b[31mred"}`), "not an image"},
		"bad digest":              {answer("", strings.Replace(valid, "sha256:", "sha256:../../", 1)), "digest"},
		"negative":                {answer("", strings.Replace(valid, `"size":`, `"size":-`, 1)), "size is -"},
		"giant config":            {answer("", strings.Replace(valid, `"size":`, `"size":9999999`, 1)), "more than"},
		"wrong digest header": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Docker-Content-Digest", digest.FromString("another").String())
			_, _ = io.WriteString(w, valid)
		}, "the content has digest"},
		"garbage digest header": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Docker-Content-Digest", "sha256:zz")
			_, _ = io.WriteString(w, valid)
		}, "digest"},
		"endless":       {func(w http.ResponseWriter, r *http.Request) { flood(w, r, spaces) }, "more than"},
		"endless error": {func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(400); flood(w, r, spaces) }, "400"},
		"says 1 GB": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "1073741824")
			flood(w, r, spaces)
		}, "1073741824 bytes"},
		"short of its length": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "5000")
			_, _ = io.WriteString(w, valid)
		}, "unexpected EOF"},
		"huge headers": {func(w http.ResponseWriter, _ *http.Request) {
			for i := range 1000 {
				w.Header().Set(fmt.Sprintf("X-%d", i), strings.Repeat("x", 1000))
			}
			_, _ = io.WriteString(w, valid)
		}, "headers exceeded"},
		"redirect loop": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
		}, "redirects"},
		"redirect to plain HTTP": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://blobs.example/x", http.StatusTemporaryRedirect)
		}, "--insecure-registry blobs.example"},
		"redirect to a file": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "file:///etc/passwd", http.StatusTemporaryRedirect)
		}, "file"},
		"stalls before the header": {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "stopped answering"},
		"stalls in the body": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "1000")
			_, _ = io.WriteString(w, "{")
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}, "stopped answering"},
		"drips": {func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				_, _ = io.WriteString(w, " ")
				_ = http.NewResponseController(w).Flush()
				time.Sleep(10 * time.Millisecond)
			}
		}, "stopped answering"},
		"resets": {func(w http.ResponseWriter, _ *http.Request) { registrytest.Reset(w) }, "reset"},
		"terminal escapes": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusForbidden)
			_, _ = io.WriteString(w, `{"errors":[{"code":"DENIED","message":"no\u001b]0;title\u0007 way\r\nok"}]}`)
		}, "no ]0;title way ok"},
	} {
		t.Run(name, func(t *testing.T) {
			host := hostile(t, c.h)
			client := newClient(t)
			bounded(t, func() {
				_, err := client.Resolve(t.Context(), host+"/a/b:c", amd64)
				wantError(t, err, c.want, host)
				if err != nil && strings.ContainsAny(err.Error(), "\x1b\x07\r\n") {
					t.Errorf("control characters in %q", err)
				}
				if _, err := client.Digest(t.Context(), host+"/a/b:c"); err == nil {
					t.Error("Digest: no error")
				}
			})
		})
	}
}

// registryWith serves an image, and lets the test answer one kind of request.
func registryWith(t *testing.T, img *testImage, part string, h http.HandlerFunc) image.Layer {
	t.Helper()
	r := registrytest.New(t, registrytest.Options{})
	pushedImage(t, r, img)
	r.Fail(registrytest.Fault{Method: http.MethodGet, Path: part, Serve: func(w http.ResponseWriter, req *http.Request, _ http.Handler) { h(w, req) }})
	return image.Layer{Blob: img.doc.Layers[0], Origin: r.Host() + "/a/b"}
}

func pushedImage(t *testing.T, r *registrytest.Registry, img *testImage) {
	t.Helper()
	p := pusher(t, newClient(t), r.Host()+"/a/b:c")
	img.push(t, p)
	if err := p.Tag(t.Context(), ocispec.MediaTypeImageManifest, img.manifest); err != nil {
		t.Fatal(err)
	}
}

func TestBlobsThatAreWrong(t *testing.T) {
	img := newImage(t, amd64, 100_000)
	good := img.layers[0]
	changed := bytes.Clone(good)
	changed[50_000] ^= 1
	var tries atomic.Int32
	for name, c := range map[string]struct {
		h    http.HandlerFunc
		want string
	}{
		"changed":     {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(changed) }, "digest"},
		"short":       {whole(good[:99_999]), "99999 bytes"},
		"short chunk": {func(w http.ResponseWriter, _ *http.Request) { chunked(w, good[:99_999]) }, "99999 of 100000"},
		"long":        {whole(append(bytes.Clone(good), 'x')), "100001 bytes"},
		"endless":     {func(w http.ResponseWriter, r *http.Request) { flood(w, r, changed) }, "the blob has digest"},
		"html":        {answer("text/html", "<html>"), "6 bytes"},
		"404":         {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) }, "404 Not Found"},
		"stalls": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "100000")
			_, _ = w.Write(good[:5000])
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}, "stopped answering"},
		"always breaks": {func(w http.ResponseWriter, _ *http.Request) {
			tries.Add(1)
			w.Header().Set("Content-Length", "100000")
			_, _ = w.Write(good[:5000])
			panic(http.ErrAbortHandler)
		}, "after 5000 of 100000 bytes"},
		"wrong range": {func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") != "" {
				w.Header().Set("Content-Range", "bytes 7000-99999/100000")
				w.WriteHeader(http.StatusPartialContent)
			}
			_, _ = w.Write(good[:5000])
			panic(http.ErrAbortHandler)
		}, "asked for bytes from"},
	} {
		t.Run(name, func(t *testing.T) {
			l := registryWith(t, img, "/blobs/", c.h)
			bounded(t, func() {
				got, err := fetch(t.Context(), newClient(t), l)
				wantError(t, err, c.want, l.Blob.Digest.String(), `"a/b"`)
				if len(got) > len(good) {
					t.Errorf("%d bytes came out", len(got))
				}
			})
		})
	}
	if n := tries.Load(); n < 2 || n > 8 {
		t.Errorf("a blob that always breaks was asked for %d times", n)
	}
}

// whole answers b with its length.
func whole(b []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(len(b)))
		_, _ = w.Write(b)
	}
}

func chunked(w http.ResponseWriter, b []byte) {
	_ = http.NewResponseController(w).Flush()
	_, _ = w.Write(b)
}

func TestConfigsThatLie(t *testing.T) {
	img := newImage(t, amd64, 10)
	two := newImage(t, amd64, 10, 10)
	for name, c := range map[string]struct{ body, want string }{
		"changed": {strings.Replace(string(img.config), "amd64", "arm64", 1), "digest"},
		"short":   {string(img.config[1:]), "bytes"},
		"long":    {string(img.config) + " ", "bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			l := registryWith(t, img, "/blobs/", answer("", c.body))
			_, err := newClient(t).Resolve(t.Context(), l.Origin+":c", amd64)
			wantError(t, err, c.want)
		})
	}
	// Digests fit, but the manifest does not fit the config.
	for name, change := range map[string]func(*testImage){
		"layers":  func(i *testImage) { i.doc.Layers = i.doc.Layers[:1] },
		"garbage": func(i *testImage) { i.config = []byte("[1,2]") },
		"diff id": func(i *testImage) { i.config = bytes.ReplaceAll(i.config, []byte("sha256:"), []byte("md5:")) },
		"chart":   func(i *testImage) { i.doc.Config.MediaType = "application/vnd.cncf.helm.config.v1+json" },
	} {
		t.Run(name, func(t *testing.T) {
			r := registrytest.New(t, registrytest.Options{})
			bad := *two
			bad.doc.Layers = append([]ocispec.Descriptor{}, two.doc.Layers...)
			change(&bad)
			mt := bad.doc.Config.MediaType
			bad.doc.Config = describe(mt, bad.config)
			bad.manifest = toJSON(t, bad.doc)
			pushedImage(t, r, &bad)
			_, err := newClient(t).Resolve(t.Context(), r.Host()+"/a/b:c", amd64)
			wantError(t, err, map[string]string{
				"layers": "has 1 layers, but its config 2", "garbage": "not valid",
				"diff id": "md5:", "chart": "helm",
			}[name])
		})
	}
}

func TestManifestByDigestMustBeIt(t *testing.T) {
	img, other := newImage(t, amd64, 10), newImage(t, amd64, 20)
	for name, header := range map[string]string{
		"honest header": digest.FromBytes(other.manifest).String(),
		"lying header":  digest.FromBytes(img.manifest).String(),
		"no header":     "",
	} {
		t.Run(name, func(t *testing.T) {
			host := hostile(t, func(w http.ResponseWriter, _ *http.Request) {
				if header != "" {
					w.Header().Set("Docker-Content-Digest", header)
				}
				w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
				_, _ = w.Write(other.manifest)
			})
			_, err := newClient(t).Resolve(t.Context(), host+"/a/b@"+digest.FromBytes(img.manifest).String(), amd64)
			wantError(t, err, digest.FromBytes(img.manifest).String())
		})
	}
}

func TestPingsThatAreWrong(t *testing.T) {
	for name, c := range map[string]struct {
		h    http.HandlerFunc
		want string
	}{
		"html error": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(502)
			_, _ = io.WriteString(w, "<html>oops")
		}, "502 Bad Gateway"},
		"endless": {func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/v2/" {
				flood(w, r, bytes.Repeat([]byte("x"), 1<<16))
				return
			}
			w.WriteHeader(http.StatusNotFound)
		}, "404"},
		"endless error": {func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(500)
			flood(w, r, []byte("xxxxxxxxxxxxxxxxxxxx"))
		}, ""},
		"stall": {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "stopped answering"},
		"no realm": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", "Bearer")
			w.WriteHeader(401)
		}, "realm"},
		"realm inside": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://169.254.169.254/latest/meta-data"`)
			w.WriteHeader(401)
		}, "169.254.169.254"},
		"realm a file": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="file:///etc/passwd"`)
			w.WriteHeader(401)
		}, "scheme"},
		"strange scheme": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", `Negotiate`)
			w.WriteHeader(401)
		}, "401"},
		"token html":            {tokenAnswer("<html>hello</html>"), "not JSON"},
		"token without a token": {tokenAnswer(`{"refresh_token":"secret-refresh"}`), "no token"},
		"token endless":         {tokenAnswer(`{"token":"` + strings.Repeat("x", 1<<20)), "not JSON"},
	} {
		t.Run(name, func(t *testing.T) {
			s := httptest.NewServer(c.h)
			defer s.Close()
			defer s.CloseClientConnections()
			host := s.Listener.Addr().String()
			bounded(t, func() {
				_, err := newClient(t, as("ann", "hunter2")).Pusher(t.Context(), host+"/a/b:c")
				wantError(t, err, c.want, host)
				if err != nil && (strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), "secret-refresh")) {
					t.Errorf("a secret in %v", err)
				}
			})
		})
	}
}

func tokenAnswer(body string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			_, _ = io.WriteString(w, body)
			return
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="x"`, r.Host))
		w.WriteHeader(http.StatusUnauthorized)
	}
}

func TestPlainHTTPOnlyWhereAllowed(t *testing.T) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	var l net.Listener
	for _, a := range addrs {
		if ip, ok := a.(*net.IPNet); ok && ip.IP.To4() != nil && !ip.IP.IsLoopback() {
			if l, err = net.Listen("tcp", net.JoinHostPort(ip.IP.String(), "0")); err == nil { //nolint:noctx // it does not wait
				break
			}
		}
	}
	if l == nil {
		t.Skip("this machine has no address but loopback")
	}
	var requests atomic.Int32
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		if r.URL.Path != "/v2/" {
			w.WriteHeader(http.StatusForbidden)
		}
	}))
	_ = s.Listener.Close()
	s.Listener = l
	s.Start()
	defer s.Close()
	host := l.Addr().String()
	_, err = newClient(t, as("ann", "pw")).Resolve(t.Context(), host+"/a/b", amd64)
	wantError(t, err, "--insecure-registry "+host)
	if n := requests.Load(); n != 0 {
		t.Errorf("%d requests by plain HTTP", n)
	}
	for _, allowed := range []string{host, hostOnly(host), "HTTP://" + host + "/"} {
		c := newClient(t, func(o *registry.Options) { o.Insecure = []string{strings.ToLower(allowed)} })
		_, err = c.Resolve(t.Context(), host+"/a/b", amd64)
		wantError(t, err, "403 Forbidden")
	}
}

func hostOnly(hostport string) string {
	h, _, _ := net.SplitHostPort(hostport)
	return h
}

func TestTLS(t *testing.T) {
	r := registrytest.New(t, registrytest.Options{TLS: true})
	ref := r.Host() + "/a/b:c"
	_, err := newClient(t).Pusher(t.Context(), ref)
	wantError(t, err, "certificate", "--insecure-registry "+r.Host())
	if n := r.Counts().Requests; n != 0 {
		t.Errorf("%d requests got through", n)
	}
	pushed(t, newClient(t, func(o *registry.Options) { o.Insecure = []string{r.Host()} }), ref, 10)
	pushed(t, newClient(t, func(o *registry.Options) { o.CAFile = r.CAFile() }), ref, 10)
	if _, err := registry.New(registry.Options{CAFile: "/dev/null"}); err == nil {
		t.Error("no error for a CA file without certificates")
	}
}

func TestCancel(t *testing.T) {
	r := registrytest.New(t, registrytest.Options{})
	img := newImage(t, amd64, 1<<20)
	pushedImage(t, r, img)
	stop := errors.New("enough")
	for _, f := range []registrytest.Fault{
		{Method: http.MethodGet, Path: "/manifests/", Stall: true},
		{Method: http.MethodGet, Path: "/v2/a/b/manifests/", Status: 503},
	} {
		r.Heal()
		r.Fail(f)
		ctx, cancel := contextWithCause(t)
		time.AfterFunc(50*time.Millisecond, func() { cancel(stop) })
		start := time.Now()
		c := newClient(t, func(o *registry.Options) {
			o.StallTimeout, o.Retry = time.Minute, registry.Retry{Tries: 100, Base: time.Hour, Max: time.Hour}
		})
		_, err := c.Resolve(ctx, r.Host()+"/a/b:c", amd64)
		if !errors.Is(err, stop) || time.Since(start) > 5*time.Second {
			t.Errorf("after %s: %v", time.Since(start), err)
		}
	}
}
