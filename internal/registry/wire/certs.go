package wire

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"

	"github.com/kiln-build/kiln/internal/diag"
)

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

// hostCerts reads a host's directory as docker does: *.crt are trusted, and
// NAME.cert with NAME.key is shown to the registry.
func hostCerts(cfg *tls.Config, dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return diag.New(diag.ExitRegistry, "read registry certificates: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		switch filepath.Ext(e.Name()) {
		case ".crt":
			if cfg.RootCAs == nil {
				if cfg.RootCAs, err = x509.SystemCertPool(); err != nil {
					return diag.New(diag.ExitRegistry, "load the system's certificates: %w", err)
				}
			} else {
				cfg.RootCAs = cfg.RootCAs.Clone()
			}
			if err := addCerts(cfg.RootCAs, path); err != nil {
				return err
			}
		case ".cert":
			pair, err := tls.LoadX509KeyPair(path, strings.TrimSuffix(path, ".cert")+".key")
			if err != nil {
				return diag.New(diag.ExitRegistry, "read registry client certificate: %w", err)
			}
			cfg.Certificates = append(cfg.Certificates, pair)
		}
	}
	return nil
}
