package buildkitd

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/store"
)

// Config is what a buildkitd.toml says, as far as it means something here.
type Config struct {
	Debug        bool     `toml:"debug"`
	Root         string   `toml:"root"`
	Entitlements []string `toml:"insecure-entitlements"`
	Log          struct {
		Level string `toml:"level"`
	} `toml:"log"`
	GRPC struct {
		Address []string `toml:"address"`
		GID     *int     `toml:"gid"`
		TLS     struct {
			Cert string `toml:"cert"`
			Key  string `toml:"key"`
			CA   string `toml:"ca"`
		} `toml:"tls"`
	} `toml:"grpc"`
	Worker struct {
		OCI struct {
			Enabled     *bool             `toml:"enabled"`
			Labels      map[string]string `toml:"labels"`
			Parallelism int               `toml:"max-parallelism"`
			GC          *bool             `toml:"gc"`
			// Sizes, a number of bytes or a text ("10GB", "20%" of the disk).
			KeepStorage any `toml:"gckeepstorage"` // what reservedSpace was called
			Reserved    any `toml:"reservedSpace"`
			MaxUsed     any `toml:"maxUsedSpace"`
			MinFree     any `toml:"minFreeSpace"`
		} `toml:"oci"`
	} `toml:"worker"`
	History struct {
		MaxEntries *int `toml:"maxEntries"`
	} `toml:"history"`
	Registry map[string]registryConfig `toml:"registry"`
}

type registryConfig struct {
	Mirrors  []string `toml:"mirrors"`
	HTTP     bool     `toml:"http"`
	Insecure bool     `toml:"insecure"`
	CA       []string `toml:"ca"`
	KeyPair  []struct {
		Key  string `toml:"key"`
		Cert string `toml:"cert"`
	} `toml:"keypair"`
}

// maxConfig bounds a configuration file, in bytes.
const maxConfig = 1 << 20

// ReadConfig reads a buildkitd.toml. ignored are the settings that have no effect here, as they are
// called in the file. One that is not there is empty, unless it was asked for.
func ReadConfig(path string, asked bool) (c *Config, ignored []string, err error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && !asked {
		return &Config{}, nil, nil
	}
	if err == nil && len(b) > maxConfig {
		err = fmt.Errorf("it has more than %d bytes", maxConfig)
	}
	if err != nil {
		return nil, nil, diag.New(diag.ExitUsage, "configuration: %w", err)
	}
	c = &Config{}
	d := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields()
	err = d.Decode(c)
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) { // all else was read
		for _, e := range unknown.Errors {
			ignored = append(ignored, strings.Join(e.Key(), "."))
		}
		return c, ignored, nil
	}
	if err != nil {
		return nil, nil, diag.New(diag.ExitUsage, "configuration %q: %w", path, err)
	}
	return c, nil, nil
}

// DefaultConfig is where a user's configuration is looked for.
func DefaultConfig(uid int, getenv func(string) string) string {
	switch {
	case uid == 0:
		return "/etc/buildkit/buildkitd.toml"
	case getenv("XDG_CONFIG_HOME") != "":
		return filepath.Join(getenv("XDG_CONFIG_HOME"), "buildkit", "buildkitd.toml")
	}
	return filepath.Join(getenv("HOME"), ".config", "buildkit", "buildkitd.toml")
}

// Limit is how large the store may become, if the configuration says that; ok is false if it does not.
func (c *Config) Limit(st *store.Store) (l store.Limit, ok bool, err error) {
	oci := c.Worker.OCI
	if oci.GC != nil && !*oci.GC {
		return l, true, nil
	}
	if oci.Reserved == nil {
		oci.Reserved = oci.KeepStorage
	}
	for _, x := range []struct {
		name  string
		value any
		to    *int64
	}{
		{"reservedSpace", oci.Reserved, &l.Reserved}, {"maxUsedSpace", oci.MaxUsed, &l.MaxUsed}, {"minFreeSpace", oci.MinFree, &l.MinFree},
	} {
		if x.value == nil {
			continue
		}
		if *x.to, err = st.ParseSize(fmt.Sprint(x.value)); err != nil {
			return l, false, fmt.Errorf("configuration: %s: %w", x.name, err)
		}
	}
	return l, !l.IsZero(), nil
}

// Registries adds what the configuration says of registries.
func (c *Config) Registries(o *registry.Options) {
	for host, r := range c.Registry {
		if r.HTTP || r.Insecure {
			o.Insecure = append(o.Insecure, host)
		}
		if len(r.Mirrors) > 0 {
			if o.Mirrors == nil {
				o.Mirrors = map[string][]string{}
			}
			o.Mirrors[host] = r.Mirrors
		}
		if len(r.CA)+len(r.KeyPair) == 0 {
			continue
		}
		certs := registry.Certs{CAs: r.CA}
		for _, p := range r.KeyPair {
			certs.Pairs = append(certs.Pairs, registry.KeyPair{Cert: p.Cert, Key: p.Key})
		}
		if o.Certs == nil {
			o.Certs = map[string]registry.Certs{}
		}
		o.Certs[strings.ToLower(host)] = certs
	}
}
