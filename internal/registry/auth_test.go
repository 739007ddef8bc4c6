package registry_test

import (
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/registry/registrytest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// listener notes what it is sent.
type listener struct {
	mu   sync.Mutex
	seen []string
	next http.HandlerFunc
}

func (l *listener) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	var head strings.Builder
	_ = r.Header.Write(&head)
	l.mu.Lock()
	l.seen = append(l.seen, r.Method+" "+r.URL.String()+"\n"+head.String()+"\n"+string(body))
	l.mu.Unlock()
	l.next(w, r)
}

func (l *listener) check(t *testing.T, secrets ...string) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.seen) == 0 {
		t.Error("was not asked at all: the test tests nothing")
	}
	for _, s := range l.seen {
		if strings.Contains(s, "Authorization") {
			t.Errorf("an authorization was sent on:\n%s", s)
		}
		for _, secret := range secrets {
			if strings.Contains(s, secret) {
				t.Errorf("a secret was sent on:\n%s", s)
			}
		}
	}
}

// Another port of the same host is another host.
func TestRedirectsGetNoCredential(t *testing.T) {
	for name, token := range map[string]bool{"password": false, "token": true} {
		t.Run(name, func(t *testing.T) {
			r := registrytest.New(t, registrytest.Options{User: "ann", Password: "hunter2", Token: token})
			c := newClient(t, as("ann", "hunter2"))
			img := pushed(t, c, r.Host()+"/a/b:c", 1000)
			elsewhere := &listener{next: func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(img.layers[0]) }}
			s := httptest.NewServer(elsewhere)
			defer s.Close()
			r.Fail(registrytest.Fault{Method: http.MethodGet, Path: "/blobs/", Serve: func(w http.ResponseWriter, req *http.Request, _ http.Handler) {
				if req.Header.Get("Authorization") == "" {
					t.Error("the registry itself got no authorization")
				}
				http.Redirect(w, req, s.URL+"/blob?signature=x", http.StatusTemporaryRedirect)
			}})
			if _, err := fetch(t.Context(), c, image.Layer{Blob: img.doc.Layers[0], Origin: r.Host() + "/a/b"}); err != nil {
				t.Error(err)
			}
			elsewhere.check(t, "hunter2")
		})
	}
}

func TestUploadsElsewhereGetNoCredential(t *testing.T) {
	r := registrytest.New(t, registrytest.Options{User: "ann", Password: "hunter2"})
	c := newClient(t, as("ann", "hunter2"), func(o *registry.Options) { o.SkipPushCheck = true })
	p := pusher(t, c, r.Host()+"/a/b:c")
	b := noise(t, 100)
	desc := describe("", b)
	elsewhere := &listener{next: func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Docker-Content-Digest", desc.Digest.String())
		w.WriteHeader(http.StatusCreated)
	}}
	s := httptest.NewServer(elsewhere)
	defer s.Close()
	r.Fail(registrytest.Fault{Method: http.MethodPost, Serve: func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		w.Header().Set("Location", strings.Replace(s.URL, "http://", "http://user:pw@", 1)+"/put?signature=x")
		w.WriteHeader(http.StatusAccepted)
	}})
	if _, err := p.Blob(t.Context(), desc, "", opener(b), nil); err != nil {
		t.Error(err)
	}
	elsewhere.check(t, "hunter2")
}

func TestTokenServiceRedirectsGetNoCredential(t *testing.T) {
	for _, identity := range []bool{false, true} {
		elsewhere := &listener{next: func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{"token":"t0ken"}`) }}
		s := httptest.NewServer(elsewhere)
		defer s.Close()
		reg := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/token" {
				http.Redirect(w, r, strings.Replace(s.URL, "127.0.0.1", "localhost", 1)+"/t", http.StatusTemporaryRedirect)
				return
			}
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="x"`, r.Host))
			w.WriteHeader(http.StatusUnauthorized)
		}))
		defer reg.Close()
		host := reg.Listener.Addr().String()
		cred := `{"username":"ann","password":"hunter2"}`
		if identity {
			cred = `{"identitytoken":"hunter2"}`
		}
		t.Setenv("DOCKER_CONFIG", t.TempDir())
		t.Setenv("DOCKER_AUTH_CONFIG", `{"auths":{"`+host+`":`+cred+`}}`)
		c := newClient(t, func(o *registry.Options) { o.Keychain = nil })
		_, err := c.Pusher(t.Context(), host+"/a/b")
		if identity {
			wantError(t, err, "refusing to take a token to localhost")
			if len(elsewhere.seen) != 0 {
				t.Errorf("was sent %q", elsewhere.seen)
			}
			continue
		}
		wantError(t, err, "401")
		elsewhere.check(t, "hunter2")
	}
}

func TestRefusedCredentialIsNamedButNotShown(t *testing.T) {
	for name, token := range map[string]bool{"password": false, "token": true} {
		t.Run(name, func(t *testing.T) {
			r := registrytest.New(t, registrytest.Options{User: "ann", Password: "right", Token: token})
			dir := t.TempDir()
			t.Setenv("DOCKER_CONFIG", dir)
			t.Setenv("DOCKER_AUTH_CONFIG", "")
			basic := base64.StdEncoding.EncodeToString([]byte("ann:wr0ng-pass"))
			config := `{"auths":{"` + r.Host() + `":{"auth":"` + basic + `"}}}`
			if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o600); err != nil {
				t.Fatal(err)
			}
			c := newClient(t, func(o *registry.Options) { o.Keychain = nil })
			_, err := c.Pusher(t.Context(), r.Host()+"/a/b")
			wantError(t, err, "401 Unauthorized", `user "ann" from `+dir+"/config.json", "kiln login "+r.Host())
			if strings.Contains(err.Error(), "wr0ng") || strings.Contains(err.Error(), basic) {
				t.Error("shows the secret")
			}
			_, err = newClient(t).Resolve(t.Context(), r.Host()+"/a/b", amd64)
			wantError(t, err, "401 Unauthorized", "credentials: none", "kiln login "+r.Host())
		})
	}
}

func TestEchoedSecretsAreNotShown(t *testing.T) {
	r := registrytest.New(t, registrytest.Options{User: "ann", Password: "hunter2!", Token: true})
	p := pusher(t, newClient(t, as("ann", "hunter2!")), r.Host()+"/a/b")
	var token string
	r.Fail(registrytest.Fault{Method: http.MethodPut, Serve: func(w http.ResponseWriter, req *http.Request, _ http.Handler) {
		token = strings.TrimPrefix(req.Header.Get("Authorization"), "Bearer ")
		w.WriteHeader(http.StatusForbidden)
		_, _ = fmt.Fprintf(w, `{"errors":[{"code":"DENIED","message":"token %s of ann:hunter2! is no good"}]}`, token)
	}})
	_, err := p.Manifest(t.Context(), ocispec.MediaTypeImageManifest, []byte("{}"))
	wantError(t, err, "token *** of ann:*** is no good")
	if token == "" || strings.Contains(err.Error(), token) {
		t.Error("shows the token")
	}
}

func TestPushPermissionIsCheckedAtOnce(t *testing.T) {
	r := registrytest.New(t, registrytest.Options{})
	r.Fail(registrytest.Fault{Method: http.MethodPost, Status: 403, Body: `{"errors":[{"code":"DENIED","message":"read only"}]}`})
	_, err := newClient(t, as("ann", "pw")).Pusher(t.Context(), r.Host()+"/a/b")
	wantError(t, err, "403 Forbidden: read only", `user "ann" from the test`)
	if _, err := newClient(t, func(o *registry.Options) { o.SkipPushCheck = true }).Pusher(t.Context(), r.Host()+"/a/b"); err != nil {
		t.Error(err)
	}
	r.Heal()
	r.Fail(registrytest.Fault{Method: http.MethodPost, Times: 2, Status: 503})
	pusher(t, newClient(t), r.Host()+"/a/b")
	if n := r.Counts(); n.UploadStarts != 1 || n.BlobPuts != 0 {
		t.Errorf("%+v", n)
	}
}

func TestLoginAndLogout(t *testing.T) {
	for name, o := range map[string]registrytest.Options{
		"password": {User: "ann", Password: "pw"},
		"token":    {User: "ann", Password: "pw", Token: true},
		"tls":      {User: "ann", Password: "pw", TLS: true},
	} {
		t.Run(name, func(t *testing.T) {
			r := registrytest.New(t, o)
			dir := t.TempDir()
			t.Setenv("DOCKER_CONFIG", dir)
			t.Setenv("DOCKER_AUTH_CONFIG", "")
			open := func() *registry.Client {
				return newClient(t, func(o *registry.Options) { o.Keychain, o.CAFile = nil, r.CAFile() })
			}
			_, err := open().Login(t.Context(), r.Host(), "ann", "wrong")
			wantError(t, err, "401", r.Host())
			if _, err := os.Stat(filepath.Join(dir, "config.json")); err == nil {
				t.Error("a refused login was kept")
			}
			where, err := open().Login(t.Context(), "https://"+r.Host()+"/", "ann", "pw")
			if err != nil || where.Path != filepath.Join(dir, "config.json") || !where.Plain {
				t.Fatalf("%+v, %v", where, err)
			}
			pusher(t, open(), r.Host()+"/a/b")
			for _, want := range []bool{true, false} {
				found, err := open().Logout(t.Context(), r.Host())
				if err != nil || found != want {
					t.Errorf("logout: %v, %v", found, err)
				}
			}
			_, err = open().Pusher(t.Context(), r.Host()+"/a/b")
			wantError(t, err, "401", "credentials: none")
		})
	}
}

func TestLoginToWhatIsNoRegistry(t *testing.T) {
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	for _, host := range []string{"registry", "a b", "host/path", "user@host.example", "UPPER"} {
		if _, err := newClient(t).Login(t.Context(), host, "ann", "pw"); err == nil {
			t.Errorf("%q: no error", host)
		}
	}
	if _, err := newClient(t).Login(t.Context(), "localhost:1", "ann", ""); err == nil {
		t.Error("no error without a password")
	}
}

// TestHTTP1Alone: a registry that would speak HTTP/2 is spoken to by HTTP/1.1.
func TestHTTP1Alone(t *testing.T) {
	var (
		mu     sync.Mutex
		protos = map[string]int{}
	)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		protos[r.Proto]++
		mu.Unlock()
		if r.URL.Path != "/v2/" {
			http.NotFound(w, r)
		}
	}))
	s.EnableHTTP2 = true
	s.StartTLS()
	defer s.Close()
	resp, err := s.Client().Get(s.URL + "/v2/") // as others do
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if protos["HTTP/2.0"] != 1 {
		t.Fatalf("the server does not speak HTTP/2: %v", protos)
	}
	host := s.Listener.Addr().String()
	c := newClient(t, func(o *registry.Options) { o.Insecure = []string{host} })
	_, err = c.Resolve(t.Context(), host+"/a/b:c", amd64)
	wantError(t, err, "404")
	if protos["HTTP/2.0"] != 1 || protos["HTTP/1.1"] < 2 {
		t.Errorf("spoke %v", protos)
	}
}

// TestPathScopedCredential: what is for one namespace of a registry is not sent when it is
// about another, siblings and longer names included.
func TestPathScopedCredential(t *testing.T) {
	var (
		mu   sync.Mutex
		seen = map[string]string{} // the last credential by repository
	)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user, password, _ := r.BasicAuth()
		if repo, _, ok := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/manifests/"); ok {
			mu.Lock()
			seen[repo] = user + ":" + password
			mu.Unlock()
			http.NotFound(w, r)
			return
		}
		if user == "" {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	defer s.Close()
	host := s.Listener.Addr().String()
	auth := func(user string) string {
		return base64.StdEncoding.EncodeToString([]byte(user + ":secret-of-" + user))
	}
	dir := t.TempDir()
	config := fmt.Sprintf(`{"auths":{%q:{"auth":%q},%q:{"auth":%q}}}`, host+"/team", auth("team"), host+"/team/app", auth("app"))
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, v := range []string{"DOCKER_AUTH_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"} {
		t.Setenv(v, "")
	}
	t.Setenv("HOME", dir)
	t.Setenv("DOCKER_CONFIG", dir)
	c := newClient(t, func(o *registry.Options) { o.Keychain = nil })
	for repo, want := range map[string]string{
		"team/other": "team:secret-of-team", "team/app": "app:secret-of-app", "team/app/sub": "app:secret-of-app",
		"teamster/app": ":", "sibling/app": ":", "app": ":",
	} {
		if _, err := c.Resolve(t.Context(), host+"/"+repo+":1", amd64); err == nil {
			t.Errorf("%s: no error", repo)
		}
		if want == ":" && seen[repo] == "" {
			continue // it was not even asked for: nobody may
		}
		if seen[repo] != want {
			t.Errorf("%s was asked for with %q, want %q", repo, seen[repo], want)
		}
	}
}
