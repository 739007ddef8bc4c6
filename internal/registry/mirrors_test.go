package registry_test

import (
	"context"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/registry/registrytest"
)

// closedPort is an address where nobody listens.
func closedPort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// TestMirrors: what a mirror has comes from there, manifests and layers; what it has not, from
// the next, at last from the registry itself. A mirror that is down is waited for once.
func TestMirrors(t *testing.T) {
	ctx := context.Background()
	upstream, mirror := registrytest.New(t, registrytest.Options{}), registrytest.New(t, registrytest.Options{})
	plain := newClient(t)
	img := pushed(t, plain, mirror.Host()+"/library/app:1", 1000)
	pushed(t, plain, mirror.Host()+"/proxy/team/app:1", 2000)
	pushed(t, plain, upstream.Host()+"/only/here:1", 3000)
	c := newClient(t, func(o *registry.Options) {
		o.Mirrors = map[string][]string{
			"docker.io":     {closedPort(t), mirror.Host()},
			upstream.Host(): {mirror.Host() + "/proxy"},
		}
	})
	got, err := c.Resolve(ctx, "app:1", amd64)
	if err != nil {
		t.Fatal(err)
	}
	if got.Ref != "docker.io/library/app:1" || got.Layers[0].Origin != "docker.io/library/app" {
		t.Errorf("the mirror shows: %q, %q", got.Ref, got.Layers[0].Origin)
	}
	r, err := c.Fetch(ctx, got.Layers[0])
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); err != nil || len(b) != len(img.layers[0]) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	r.Close()
	if d, err := c.Digest(ctx, "app:1"); err != nil || d.Digest != got.Digest {
		t.Errorf("%v, %v", d, err)
	}
	upstream.ResetCounts()
	if _, err := c.Resolve(ctx, upstream.Host()+"/team/app:1", amd64); err != nil || upstream.Counts().Requests != 0 {
		t.Errorf("with a path: %v, the registry was asked %d times", err, upstream.Counts().Requests)
	}
	if _, err := c.Resolve(ctx, upstream.Host()+"/only/here:1", amd64); err != nil {
		t.Errorf("what the mirror does not have: %v", err)
	}
	_, err = c.Resolve(ctx, upstream.Host()+"/no/where:1", amd64)
	if err == nil || !strings.Contains(err.Error(), upstream.Host()) || !strings.Contains(err.Error(), mirror.Host()) {
		t.Errorf("what nobody has: %v", err)
	}
	mirror.ResetCounts()
	pushed(t, c, upstream.Host()+"/pushed:1", 100)
	if n := mirror.Counts().Requests; n != 0 {
		t.Errorf("a push asked the mirror %d times", n)
	}
	for _, bad := range []string{"", "/x", "http://h", "a b"} {
		if _, err := registry.New(registry.Options{Mirrors: map[string][]string{"docker.io": {bad}}}); err == nil {
			t.Errorf("mirror %q is taken", bad)
		}
	}
}

// TestHostCertificates: a certificate authority that is given for a host is trusted there.
func TestHostCertificates(t *testing.T) {
	r := registrytest.New(t, registrytest.Options{TLS: true})
	if _, err := newClient(t).Resolve(context.Background(), r.Host()+"/a:1", amd64); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("without: %v", err)
	}
	c := newClient(t, func(o *registry.Options) {
		o.Certs = map[string]registry.Certs{r.Host(): {CAs: []string{r.CAFile()}}}
	})
	pushed(t, c, r.Host()+"/a:1", 100)
	missing := newClient(t, func(o *registry.Options) {
		o.Certs = map[string]registry.Certs{r.Host(): {CAs: []string{"/nosuch"}}}
	})
	if _, err := missing.Resolve(context.Background(), r.Host()+"/a:1", amd64); err == nil || !strings.Contains(err.Error(), "/nosuch") {
		t.Errorf("with a file that there is not: %v", err)
	}
}
