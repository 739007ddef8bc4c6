package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/test/kilnrun"
)

// authority is a CA that issues certificates to servers and clients. All are called the same: a client has no
// use for a certificate of a CA that the server does not name.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, dir string) *authority {
	t.Helper()
	a := &authority{t: t, dir: dir, cert: &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
	}}
	a.key = a.sign("ca", a.cert)
	return a
}

// issue makes a certificate for 127.0.0.1, and its key, in files that anybody may read.
func (a *authority) issue(name string) (cert, key string) {
	a.t.Helper()
	a.sign(name, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotBefore: a.cert.NotBefore, NotAfter: a.cert.NotAfter, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
	return a.file(name + ".pem"), a.file(name + "-key.pem")
}

func (a *authority) file(name string) string { return filepath.Join(a.dir, name) }

func (a *authority) sign(name string, c *x509.Certificate) *ecdsa.PrivateKey {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	by := a.key
	if by == nil {
		by = key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, a.cert, key.Public(), by)
	if err != nil {
		a.t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	put(a.t, a.file(name+".pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	put(a.t, a.file(name+"-key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}))
	return key
}

// TestClientsTLS: who has a certificate of the server's CA can build, and nobody else; clients verify the server.
func TestClientsTLS(t *testing.T) {
	guard(t)
	t.Parallel()
	bed := kilnrun.Open(t, busybox)
	ca, foreign := newAuthority(t, filepath.Join(bed.Dir, "ca")), newAuthority(t, filepath.Join(bed.Dir, "foreign"))
	serverCert, serverKey := ca.issue("server")
	clientCert, clientKey := ca.issue("client")
	foreignCert, foreignKey := foreign.issue("client")
	s := startServer(t, bed.Runner, "--addr", "tcp://127.0.0.1:0", "--tlscert", serverCert, "--tlskey", serverKey, "--tlscacert", ca.file("ca.pem"), "--insecure-registry", bed.Host)
	if strings.HasSuffix(s.addr, ":0") || strings.Contains(s.log(), "anyone") {
		t.Errorf("the server says: %s", s.log())
	}
	dir := files{"Dockerfile": "FROM " + bed.Host + "/library/busybox:latest\nRUN echo done > /made\n"}.write(t, filepath.Join(bed.Dir, "context"))
	for _, c := range []struct {
		name          string
		ca, cert, key string
		says          string // by buildctl; empty: it works
		logs          string // by the server
	}{
		{"certificate", ca.file("ca.pem"), clientCert, clientKey, "", ""},
		{"none", ca.file("ca.pem"), "", "", "certificate required", "client didn't provide a certificate"},
		{"of another CA", ca.file("ca.pem"), foreignCert, foreignKey, "unknown certificate authority", "certificate signed by unknown authority"},
		{"server of another CA", foreign.file("ca.pem"), clientCert, clientKey, "certificate signed by unknown authority", "bad certificate"},
		{"no TLS", "", "", "", "error reading server preface", "does not look like a TLS handshake"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var ctl, x []string
			if c.ca != "" {
				ctl, x = []string{"--tlscacert", c.ca}, []string{"cacert=" + c.ca}
			}
			if c.cert != "" {
				ctl, x = append(ctl, "--tlscert", c.cert, "--tlskey", c.key), append(x, "cert="+c.cert, "key="+c.key)
			}
			if len(x) > 0 {
				x = []string{"--driver-opt", strings.Join(x, ",")}
			}
			buildctl, buildx := s.buildctl(ctl...).in(t), s.buildx(x...).in(t)
			out := t.TempDir()
			o := order{dir: dir, more: []string{"--output", "type=local,dest=" + out}}
			said, code := buildctl.try(o.line(buildctl)...)
			if c.says == "" {
				if got := read(t, filepath.Join(out, "made")); code != 0 || got != "done\n" {
					t.Errorf("buildctl exits with %d, and makes %q:\n%s", code, got, said)
				}
				buildx.build(o)
				return
			}
			if code == 0 || !strings.Contains(said, c.says) {
				t.Errorf("buildctl exits with %d, and does not say %q:\n%s", code, c.says, said)
			}
			// buildx tries for 20 s, and does not tell why it failed: the server does.
			if said, _ := buildx.try("inspect", "--timeout", "2s"); !strings.Contains(said, "inactive") {
				t.Errorf("buildx has a builder:\n%s", said)
			}
			if !strings.Contains(s.log(), c.logs) {
				t.Errorf("the server does not say %q:\n%s", c.logs, s.log())
			}
		})
	}
}
