package e2e

import (
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/registry/registrytest"
	"github.com/kiln-build/kiln/test/kilnrun"
)

const (
	corp     = "registry.corp.example" // a name that only a proxy, or /etc/hosts, knows
	user     = "robot"
	password = "pass-word-1234"
)

// access is one way in which a pipeline reaches its registry.
type access struct {
	t        *testing.T
	dir      string // the case's own, which the builder can read
	runner   *kilnrun.Runner
	registry *registrytest.Registry
	pem      []byte // of the registry's certificate
	user     string
	port     string
	proxy    *proxy

	host  string // as the image's name has it
	env   []string
	etc   string
	args  []string
	wants []string // what must be in an error
}

// auths is a config.json with a password for each key.
func auths(keys map[string]string) []byte {
	var entries []string
	for k, p := range keys {
		entries = append(entries, fmt.Sprintf(`%q: {"auth": %q}`, k, base64.StdEncoding.EncodeToString([]byte(user+":"+p))))
	}
	return []byte(`{"auths": {` + strings.Join(entries, ", ") + `}}`)
}

func (a *access) config(path string, content []byte) string {
	return filepath.Dir(put(a.t, filepath.Join(a.dir, path), content))
}

// login gives the builder the registry's password, by DOCKER_CONFIG.
func (a *access) login() {
	a.env = append(a.env, "DOCKER_CONFIG="+a.config("docker/config.json", auths(map[string]string{a.host: password})))
}

func (a *access) trust() {
	a.env = append(a.env, "SSL_CERT_FILE="+put(a.t, filepath.Join(a.dir, "ca.pem"), a.pem))
}

// byName calls the registry by its name, on TLS' own port.
func (a *access) byName() {
	a.host = corp
	a.proxy = newProxy(a.t, map[string]string{corp + ":443": a.registry.Host()})
}

// overEtc shows the builder a file of ours in /etc.
func (a *access) overEtc(name string, content []byte) {
	if os.Geteuid() != 0 {
		a.t.Skip("needs root, to show the builder another /etc")
	}
	a.etc = filepath.Join(a.dir, "etc")
	put(a.t, filepath.Join(a.etc, name), content)
}

// hosts lets the name be found without the proxy. It has the registry's port then.
func (a *access) hosts() {
	a.host = corp + ":" + a.port
	a.overEtc("hosts", []byte("127.0.0.1 localhost "+corp+"\n"))
}

// TestRegistryAccess builds an image from a base in a registry and pushes it
// there, in each of the ways in which pipelines are set up.
func TestRegistryAccess(t *testing.T) {
	guard(t)
	basic := registrytest.Options{User: user, Password: password}
	token := registrytest.Options{User: user, Password: password, Token: true}
	secure := registrytest.Options{User: user, Password: password, TLS: true}
	tokenTLS := registrytest.Options{User: user, Password: password, TLS: true, Token: true}
	open := registrytest.Options{TLS: true}
	refused := []string{"401", "robot", "kiln login"}
	shared := kilnrun.Open(t, "library/busybox:latest").Runner
	for _, c := range []struct {
		name    string
		options registrytest.Options
		set     func(a *access)
		fails   bool
		check   func(a *access) // after the build
	}{
		{"password, DOCKER_CONFIG", basic, func(a *access) { a.login() }, false, nil},
		{"token, DOCKER_CONFIG", token, func(a *access) { a.login() }, false, func(a *access) {
			if a.registry.Counts().Tokens == 0 {
				a.t.Error("no token was asked for")
			}
		}},
		{"password, HOME", basic, func(a *access) {
			a.env = []string{"HOME=" + filepath.Dir(a.config(".docker/config.json", auths(map[string]string{a.host: password})))}
		}, false, nil},
		{"password, no HOME, as in a process without a login", basic, func(a *access) {
			home := filepath.Dir(a.config("home/.docker/config.json", auths(map[string]string{a.host: password})))
			a.overEtc("passwd", fmt.Appendf(nil, "root:x:0:0::/root:/bin/sh\nkiln:x:%d:%d::%s:/bin/sh\n", kilnrun.Nobody, kilnrun.Nobody, home))
		}, false, nil},
		{"password, DOCKER_AUTH_CONFIG", basic, func(a *access) {
			a.env = []string{"DOCKER_AUTH_CONFIG=" + string(auths(map[string]string{a.host: password}))}
		}, false, nil},
		{"password, podman's auth.json", basic, func(a *access) {
			dir := a.config("podman/auth.json", auths(map[string]string{a.host: password}))
			a.env = []string{"REGISTRY_AUTH_FILE=" + filepath.Join(dir, "auth.json")}
		}, false, nil},
		{"password for a namespace", token, func(a *access) {
			a.env = []string{"DOCKER_CONFIG=" + a.config("docker/config.json", auths(map[string]string{a.host: "not-this-one", a.host + "/team": password}))}
		}, false, nil},
		{"password for another namespace", basic, func(a *access) {
			a.env = []string{"DOCKER_CONFIG=" + a.config("docker/config.json", auths(map[string]string{a.host + "/other": password}))}
			a.wants = []string{"401", "credentials: none", "kiln login " + a.host}
		}, true, nil},
		{"wrong password", basic, func(a *access) {
			a.env = []string{"DOCKER_CONFIG=" + a.config("docker/config.json", auths(map[string]string{a.host: "pass-word-wrong"}))}
			a.wants = append(refused, "docker/config.json")
		}, true, nil},
		{"wrong password for a token", token, func(a *access) {
			a.env = []string{"DOCKER_CONFIG=" + a.config("docker/config.json", auths(map[string]string{a.host: "pass-word-wrong"}))}
			a.wants = append(refused, "get a token from 127.0.0.1", "docker/config.json")
		}, true, nil},
		{"no password", basic, func(a *access) { a.wants = []string{"401", "credentials: none", "kiln login " + a.host} }, true, nil},
		{"config.json that is none", basic, func(a *access) {
			a.env = []string{"DOCKER_CONFIG=" + a.config("docker/config.json", []byte(`{"auths": {"x": {"auth": "`+password+`}}`))}
			a.wants = []string{"docker/config.json", "not valid JSON"}
		}, true, nil},

		{"certificate, SSL_CERT_FILE", secure, func(a *access) { a.login(); a.trust() }, false, nil},
		{"certificate, token, SSL_CERT_FILE", tokenTLS, func(a *access) { a.login(); a.trust() }, false, nil},
		{"certificate, /etc/docker/certs.d", secure, func(a *access) { a.login(); a.overEtc("docker/certs.d/"+a.host+"/ca.crt", a.pem) }, false, nil},
		{"certificate, /etc/containers/certs.d", secure, func(a *access) { a.login(); a.overEtc("containers/certs.d/"+a.host+"/ca.crt", a.pem) }, false, nil},
		{"certificate, certs.d beside config.json", secure, func(a *access) {
			a.login()
			put(a.t, filepath.Join(a.dir, "docker/certs.d", a.host, "ca.crt"), a.pem)
		}, false, nil},
		{"certificate, podman's certs.d", secure, func(a *access) {
			a.login()
			put(a.t, filepath.Join(a.dir, "home/.config/containers/certs.d", a.host, "ca.crt"), a.pem)
			a.env = append(a.env, "HOME="+filepath.Join(a.dir, "home"))
		}, false, nil},
		{"certificate, --insecure-registry", tokenTLS, func(a *access) { a.login(); a.args = []string{"--insecure-registry", a.host} }, false, nil},
		{"unknown certificate", secure, func(a *access) {
			a.login()
			a.wants = []string{"certificate", "unknown authority", "SSL_CERT_FILE", "certs.d/" + a.host, "--insecure-registry " + a.host}
		}, true, nil},
		{"certificate of another host in certs.d", secure, func(a *access) {
			a.login()
			put(a.t, filepath.Join(a.dir, "docker/certs.d", "127.0.0.2:"+a.port, "ca.crt"), a.pem)
			a.wants = []string{"certificate"}
		}, true, nil},
		{"certificate for another name", open, func(a *access) {
			a.trust()
			a.byName()
			a.host = "other.corp.example"
			a.proxy.routes["other.corp.example:443"] = a.registry.Host()
			a.env = append(a.env, "HTTPS_PROXY="+a.proxy.URL)
			a.wants = []string{"certificate is valid for", "not other.corp.example", "is for another name"}
		}, true, nil},

		{"proxy", secure, func(a *access) {
			a.byName()
			a.login()
			a.trust()
			a.env = append(a.env, "HTTPS_PROXY="+a.proxy.URL)
		}, false, func(a *access) {
			if !a.proxy.saw(corp + ":443") {
				a.t.Error("the proxy was not used")
			}
		}},
		{"proxy, lower case, token", tokenTLS, func(a *access) {
			a.byName()
			a.login()
			a.trust()
			a.env = append(a.env, "https_proxy="+a.proxy.URL)
		}, false, nil},
		{"proxy with a password", secure, func(a *access) {
			a.byName()
			a.login()
			a.trust()
			a.proxy.User, a.proxy.Password = "proxy-user", "proxy-pass-5678"
			a.env = append(a.env, "HTTPS_PROXY="+strings.Replace(a.proxy.URL, "http://", "http://proxy-user:proxy-pass-5678@", 1))
		}, false, nil},
		{"NO_PROXY", secure, func(a *access) {
			a.byName()
			a.hosts()
			a.login()
			a.trust()
			a.env = append(a.env, "HTTPS_PROXY="+a.proxy.URL, "NO_PROXY=localhost,.corp.example")
		}, false, func(a *access) {
			if len(a.proxy.seen) > 0 {
				a.t.Errorf("the proxy was asked for %q", a.proxy.seen)
			}
		}},
		{"proxy that refuses", secure, func(a *access) {
			a.byName()
			a.login()
			a.trust()
			a.proxy.routes = nil
			a.env = append(a.env, "HTTPS_PROXY="+strings.Replace(a.proxy.URL, "http://", "http://proxy-user:proxy-pass-5678@", 1))
			a.wants = []string{"proxy", "403", "NO_PROXY"}
		}, true, nil},
		{"proxy with a wrong password", secure, func(a *access) {
			a.byName()
			a.login()
			a.trust()
			a.proxy.User, a.proxy.Password = "proxy-user", "proxy-pass-5678"
			a.env = append(a.env, "HTTPS_PROXY="+strings.Replace(a.proxy.URL, "http://", "http://proxy-user:proxy-pass-wrong@", 1))
			a.wants = []string{"proxy", "407"}
		}, true, nil},
		{"proxy that is not there", secure, func(a *access) {
			a.byName()
			a.login()
			a.env = append(a.env, "HTTPS_PROXY=http://proxy-user:proxy-pass-5678@127.0.0.1:1")
			a.wants = []string{"proxy", "127.0.0.1:1", "connection refused", "HTTPS_PROXY"}
		}, true, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			a := newAccess(t, shared, c.options, "127.0.0.1", corp)
			c.set(a)
			out, code := a.build()
			if c.fails {
				a.failed(out, code)
			} else if code != 0 {
				t.Fatalf("kiln build exits with %d:\n%s", code, out)
			} else {
				a.pushed()
			}
			a.silent(out)
			if c.check != nil {
				c.check(a)
			}
		})
	}
}

// newAccess starts a registry that with TLS shows a certificate for names.
func newAccess(t *testing.T, shared *kilnrun.Runner, o registrytest.Options, names ...string) *access {
	t.Helper()
	dir, err := os.MkdirTemp("", "kiln-access-*") // t.TempDir is closed to other users
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	a := &access{t: t, dir: dir, user: o.User}
	if o.TLS {
		o.Certificate, a.pem = selfSigned(t, names...)
	}
	a.registry = registrytest.New(t, o)
	a.host = a.registry.Host()
	if _, a.port, err = net.SplitHostPort(a.host); err != nil {
		t.Fatal(err)
	}
	if a.runner, err = shared.At(filepath.Join(dir, "kiln")); err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Join(dir, "context/Dockerfile"), []byte("ARG HOST\nFROM ${HOST}/team/base\nCOPY f /f\n"))
	put(t, filepath.Join(dir, "context/f"), []byte("x\n"))
	base, err := random.Image(2000, 2)
	if err != nil {
		t.Fatal(err)
	}
	cf, err := base.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture = "linux", runtime.GOARCH
	if base, err = mutate.ConfigFile(base, cf); err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(a.name("base"), base, a.direct()...); err != nil {
		t.Fatal(err)
	}
	return a
}

// name is that of a repository in the registry, by its address.
func (a *access) name(repository string) name.Reference {
	a.t.Helper()
	r, err := name.ParseReference(a.registry.Host() + "/team/" + repository)
	if err != nil {
		a.t.Fatal(err)
	}
	return r
}

// direct is how the test itself reaches the registry.
func (a *access) direct() []remote.Option {
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	return []remote.Option{remote.WithTransport(tr), remote.WithAuth(&authn.Basic{Username: a.user, Password: password})}
}

func (a *access) build() (out string, code int) {
	a.t.Helper()
	a.runner.Env, a.runner.Etc = a.env, a.etc
	args := append([]string{"build", "--progress", "plain", "--push", "--build-arg", "HOST=" + a.host, "-t", a.host + "/team/app:1"}, a.args...)
	out, code, err := a.runner.Run(a.t.Context(), append(args, filepath.Join(a.dir, "context"))...)
	if err != nil {
		a.t.Fatalf("run kiln: %v\n%s", err, out)
	}
	return out, code
}

// pushed asserts that the image is in the registry, with its base.
func (a *access) pushed() {
	a.t.Helper()
	img, err := remote.Image(a.name("app:1"), a.direct()...)
	if err != nil {
		a.t.Fatal(err)
	}
	if layers, err := img.Layers(); err != nil || len(layers) != 3 {
		a.t.Errorf("%d layers, %v", len(layers), err)
	}
}

func (a *access) failed(out string, code int) {
	a.t.Helper()
	if code != int(diag.ExitRegistry) {
		a.t.Errorf("exit code %d, want %d", code, diag.ExitRegistry)
	}
	for _, w := range a.wants {
		if !strings.Contains(out, w) {
			a.t.Errorf("no %q in:\n%s", w, out)
		}
	}
	a.t.Log(out[strings.LastIndex(out, "ERROR:"):])
}

// silent asserts that no password was printed.
func (a *access) silent(out string) {
	a.t.Helper()
	for _, s := range []string{password, "pass-word-wrong", "not-this-one", "proxy-pass"} {
		for _, user := range []string{user, "proxy-user"} {
			if coded := base64.StdEncoding.EncodeToString([]byte(user + ":" + s)); strings.Contains(out, s) || strings.Contains(out, coded) {
				a.t.Errorf("%q is in the output:\n%s", s, out)
			}
		}
	}
}
