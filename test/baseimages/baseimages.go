// Package baseimages makes the images that tests, examples and benchmarks start
// from, under Docker Hub's names and with Docker Hub's config: debian:bookworm,
// busybox:latest, golang:1.26, golang:1.26-busybox and node:20. They come from
// Debian's packages and from this machine's own Go and Node, because a test
// machine need not reach any registry. The images carry this machine's apt
// mirror, CA certificates and proxy settings of Go and npm, for what reaches
// the network here must reach it from a RUN step as well.
//
// All of them live in one OCI layout, so layers are stored once. Debian needs
// root (mmdebstrap); busybox and golang:1.26-busybox need nobody.
package baseimages

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/kiln-build/kiln/test/testenv"
)

// version is part of every image's key: raise it when the recipe changes.
const version = "1"

const refName = "org.opencontainers.image.ref.name"

// Set is the base images in one cache directory.
type Set struct {
	dir string
	log io.Writer
}

// Open returns the set below the test cache directory; nothing is made yet.
// Progress goes to log.
func Open(cache string, log io.Writer) *Set {
	return &Set{dir: filepath.Join(cache, "base"), log: log}
}

// recipe is how one image is made.
type recipe struct {
	repo string // "library/debian:bookworm"
	base string // repo of the image it starts from, "" for none
	root bool   // making it takes root
	key  func(context.Context) (string, error)
	make func(ctx context.Context, s *Set, base v1.Image, tmp string) (v1.Image, error)
}

func recipes() []recipe {
	return []recipe{
		{repo: "library/busybox:latest", key: noKey, make: makeBusybox},
		{repo: "library/golang:1.26-busybox", base: "library/busybox:latest", key: goVersion, make: makeGolang},
		{repo: "library/debian:bookworm", root: true, key: aptKey, make: makeDebian},
		{repo: "library/golang:1.26", base: "library/debian:bookworm", key: goVersion, make: makeGolang},
		{repo: "library/node:20", base: "library/debian:bookworm", key: nodeVersion, make: makeNode},
	}
}

func noKey(context.Context) (string, error) { return "", nil }

// ErrMissing says that not all images could be made here; those that could are there.
var ErrMissing = errors.New("some base images could not be made")

// Ensure makes what is not there yet. Second and later calls cost a few
// milliseconds. An image that this machine or user cannot make is named in an
// error that wraps ErrMissing, after all others were made.
func (s *Set) Ensure(ctx context.Context) error {
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return err
	}
	var missing []string
	keys := map[string]string{"": ""}
	for _, r := range recipes() {
		k, err := r.key(ctx)
		if err != nil {
			missing = append(missing, fmt.Sprintf("%s: %v", r.repo, err))
			continue
		}
		base, ok := keys[r.base]
		if !ok {
			missing = append(missing, fmt.Sprintf("%s: needs %s", r.repo, r.base))
			continue
		}
		key := fmt.Sprintf("%x", sha256.Sum256([]byte(strings.Join([]string{version, r.repo, base, k}, "\x00"))))
		if _, err := s.find(r.repo, key); err == nil {
			keys[r.repo] = key
			continue
		}
		if err := s.makeOne(ctx, r, key); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			missing = append(missing, fmt.Sprintf("%s: %v", r.repo, err))
			continue
		}
		keys[r.repo] = key
	}
	if len(missing) > 0 {
		return fmt.Errorf("%w:\n  %s", ErrMissing, strings.Join(missing, "\n  "))
	}
	return nil
}

func (s *Set) makeOne(ctx context.Context, r recipe, key string) error {
	if r.root && os.Geteuid() != 0 {
		return errors.New("needs root: run scripts/base-images.sh once as root, the cache can be read by all")
	}
	fmt.Fprintf(s.log, "making %s\n", r.repo)
	var base v1.Image = empty.Image
	if r.base != "" {
		b, err := s.Image(r.base)
		if err != nil {
			return err
		}
		base = b
	}
	tmp, err := os.MkdirTemp(s.dir, "make-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	img, err := r.make(ctx, s, base, tmp)
	if err != nil {
		return err
	}
	return s.put(r.repo, key, img)
}

func (s *Set) put(repo, key string, img v1.Image) error {
	p, err := layout.FromPath(s.dir)
	if err != nil {
		if p, err = layout.Write(s.dir, empty.Index); err != nil {
			return fmt.Errorf("write layout: %w", err)
		}
	}
	old := func(d v1.Descriptor) bool { return d.Annotations[refName] == repo }
	err = p.ReplaceImage(img, old, layout.WithAnnotations(map[string]string{refName: repo, "kiln.test.key": key}))
	if err != nil {
		return fmt.Errorf("write layout: %w", err)
	}
	return testenv.Readable(filepath.Join(s.dir, "blobs"))
}

// find returns the image of a name, and with a key only if it was made with that key.
func (s *Set) find(repo, key string) (v1.Image, error) {
	p, err := layout.FromPath(s.dir)
	if err != nil {
		return nil, err
	}
	ix, err := p.ImageIndex()
	if err != nil {
		return nil, err
	}
	m, err := ix.IndexManifest()
	if err != nil {
		return nil, err
	}
	for _, d := range m.Manifests {
		if d.Annotations[refName] == repo && (key == "" || d.Annotations["kiln.test.key"] == key) {
			return p.Image(d.Digest)
		}
	}
	return nil, fmt.Errorf("find base image: no %q in %s", repo, s.dir)
}

// Image returns an image made before, by its name: "library/debian:bookworm".
func (s *Set) Image(repo string) (v1.Image, error) { return s.find(repo, "") }

// Names lists the images that are there.
func (s *Set) Names() []string {
	var names []string
	for _, r := range recipes() {
		if _, err := s.find(r.repo, ""); err == nil {
			names = append(names, r.repo)
		}
	}
	return names
}

// Push writes images to a plain-HTTP registry, HOST:PORT: those named, or all there are.
func (s *Set) Push(ctx context.Context, host string, names ...string) error {
	if len(names) == 0 {
		names = s.Names()
	}
	for _, n := range names {
		ref, err := name.ParseReference(host+"/"+n, name.Insecure)
		if err != nil {
			return fmt.Errorf("push base images: %w", err)
		}
		img, err := s.Image(n)
		if err != nil {
			return err
		}
		if err := remote.Write(ref, img, remote.WithContext(ctx)); err != nil {
			return fmt.Errorf("push %s: %w", ref, err)
		}
	}
	return nil
}

// run runs a program and returns its standard output; a failure carries its standard error.
func run(ctx context.Context, dir string, env []string, argv ...string) (string, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("run %s: %w: %s", argv[0], err, strings.TrimSpace(stderr.String()))
	}
	return string(out), nil
}
