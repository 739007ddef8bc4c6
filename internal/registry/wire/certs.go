package wire

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"

	"github.com/kiln-build/kiln/internal/diag"
)

// Certs are the certificates that a host is spoken to with.
type Certs struct {
	CAs   []string  // files in PEM that are trusted beside the system's
	Pairs []KeyPair // shown to the host
}

// KeyPair names the files of a client's certificate and its key, in PEM.
type KeyPair struct{ Cert, Key string }

func certPool(file string) (*x509.CertPool, error) {
	if file == "" {
		return nil, nil // the system's
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		return nil, diag.New(diag.ExitRegistry, "load the system's certificates: %w", err)
	}
	if err := addCerts(pool, file); err != nil {
		return nil, err
	}
	return pool, nil
}

func addCerts(pool *x509.CertPool, file string) error {
	pem, err := os.ReadFile(file)
	if err != nil {
		return diag.New(diag.ExitRegistry, "read registry certificates: %w", err)
	}
	if !pool.AppendCertsFromPEM(pem) {
		return diag.New(diag.ExitRegistry, "read registry certificates: no certificate in %s", file)
	}
	return nil
}

// certDirs are those of dirs that have something for a host.
func certDirs(dirs []string, host string) []string {
	if host == "" || strings.HasPrefix(host, ".") || strings.ContainsAny(host, `/\`) {
		return nil
	}
	var found []string
	for _, d := range dirs {
		d = filepath.Join(d, host)
		if fi, err := os.Stat(d); err == nil && fi.IsDir() {
			found = append(found, d)
		}
	}
	return found
}

// dirCerts reads a host's directory as docker does: *.crt are trusted, and
// NAME.cert with NAME.key is shown to the registry.
func dirCerts(dir string) (c Certs, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return c, diag.New(diag.ExitRegistry, "read registry certificates: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		switch filepath.Ext(e.Name()) {
		case ".crt":
			c.CAs = append(c.CAs, path)
		case ".cert":
			c.Pairs = append(c.Pairs, KeyPair{path, strings.TrimSuffix(path, ".cert") + ".key"})
		}
	}
	return c, nil
}

// load reads the files into cfg.
func (c Certs) load(cfg *tls.Config) (err error) {
	if len(c.CAs) > 0 {
		if cfg.RootCAs != nil {
			cfg.RootCAs = cfg.RootCAs.Clone()
		} else if cfg.RootCAs, err = x509.SystemCertPool(); err != nil {
			return diag.New(diag.ExitRegistry, "load the system's certificates: %w", err)
		}
	}
	for _, ca := range c.CAs {
		if err := addCerts(cfg.RootCAs, ca); err != nil {
			return err
		}
	}
	for _, p := range c.Pairs {
		pair, err := tls.LoadX509KeyPair(p.Cert, p.Key)
		if err != nil {
			return diag.New(diag.ExitRegistry, "read registry client certificate: %w", err)
		}
		cfg.Certificates = append(cfg.Certificates, pair)
	}
	return nil
}
