// Package testenv says where the tests find what they share: the repository's
// root, the cache directory for what is expensive to make (base images, the
// oracle's programs and answers), the kiln binary under test, and a throw-away
// registry that has nothing to do with Kiln's own.
package testenv

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
)

// Root is the directory of the repository's go.mod: the nearest one named
// github.com/kiln-build/kiln at or above the working directory.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; ; d = filepath.Dir(d) {
		b, err := os.ReadFile(filepath.Join(d, "go.mod"))
		if err == nil && strings.Contains(string(b), "module github.com/kiln-build/kiln\n") {
			return d, nil
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("find the repository's root: no go.mod of it at or above %q", dir)
		}
	}
}

// CacheDir is where expensive things are kept between runs: $KILN_TEST_CACHE,
// or .work in the repository. Anybody may read it, only its maker writes.
func CacheDir() (string, error) {
	if d := os.Getenv("KILN_TEST_CACHE"); d != "" {
		return filepath.Abs(d)
	}
	root, err := Root()
	if err != nil {
		return "", err
	}
	return filepath.Join(root, ".work"), nil
}

// Kiln is the path of the binary under test: $KILN, or a static one built from
// cmd/kiln of this repository into the cache directory. Building an unchanged
// tree costs one run of the go command.
func Kiln(ctx context.Context) (string, error) {
	if k := os.Getenv("KILN"); k != "" {
		return filepath.Abs(k)
	}
	root, err := Root()
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(filepath.Join(root, "cmd", "kiln")); err != nil {
		return "", fmt.Errorf("build kiln: %w", err)
	}
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	out := filepath.Join(cache, "bin", "kiln")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, "./cmd/kiln")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build kiln: %w\n%s", err, b)
	}
	return out, nil
}

// Registry is a plain-HTTP registry on a loopback port: go-containerregistry's,
// blobs on disk, manifests in memory.
type Registry struct {
	// Host is its "127.0.0.1:PORT".
	Host string

	srv  *http.Server
	done chan error
}

// StartRegistry serves on addr ("127.0.0.1:0" for any port), keeping blobs
// under dir. A non-nil wrap is put in front of the handler, to count or to spoil.
func StartRegistry(addr, dir string, wrap func(http.Handler) http.Handler) (*Registry, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	var h http.Handler = registry.New(registry.Logger(log.New(io.Discard, "", 0)),
		registry.WithBlobHandler(registry.NewDiskBlobHandler(dir)))
	if wrap != nil {
		h = wrap(h)
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("start registry: %w", err)
	}
	r := &Registry{Host: l.Addr().String(), srv: &http.Server{Handler: h, ReadHeaderTimeout: time.Minute}, done: make(chan error, 1)}
	go func() { r.done <- r.srv.Serve(l) }()
	return r, nil
}

// Close stops the registry. What it held is gone but for the blobs on disk.
func (r *Registry) Close() error {
	err := r.srv.Close()
	if e := <-r.done; !errors.Is(e, http.ErrServerClosed) {
		err = errors.Join(err, e)
	}
	return err
}

// Readable lets everybody read what is in a directory: OCI layouts are written with
// some of their files closed, and what root has made is for all to use.
func Readable(dir string) error {
	return filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		var fi fs.FileInfo
		if err == nil {
			fi, err = d.Info()
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // somebody else writes there too
		}
		if err != nil || fi.Mode()&fs.ModeSymlink != 0 {
			return err
		}
		want := fi.Mode().Perm() | 0o444
		if d.IsDir() {
			want |= 0o111
		}
		if want == fi.Mode().Perm() {
			return nil
		}
		return os.Chmod(p, want)
	})
}
