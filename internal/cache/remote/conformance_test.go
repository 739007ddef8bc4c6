package remote_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	lenient "github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/cache/cachetest"
	"github.com/kiln-build/kiln/internal/cache/remote"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/registry/registrytest"
	"github.com/kiln-build/kiln/internal/store"
)

// client is an impatient one.
func client(t *testing.T) *registry.Client {
	t.Helper()
	c, err := registry.New(registry.Options{Retry: registry.Retry{Tries: 2, Base: time.Millisecond}})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// fetcher gets layers from wherever they are.
type fetcher struct{ reg *registry.Client }

func (f fetcher) Fetch(ctx context.Context, l image.Layer) (io.ReadCloser, error) {
	if dir, ok := strings.CutPrefix(l.Origin, remote.DirectoryOrigin); ok {
		return image.LayoutBlobs(dir).Fetch(ctx, l)
	}
	return f.reg.Fetch(ctx, l)
}

// warnings remembers them.
type warnings struct {
	mu   sync.Mutex
	said []string
}

func (w *warnings) Send(e progress.Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if e.Kind == progress.Warning {
		w.said = append(w.said, e.Text)
	}
}

// place is where a test's cache lies.
type place struct {
	t    *testing.T
	reg  *registry.Client
	spec cache.Spec
	warn *warnings
	now  func() time.Time
}

func (p place) open(st *store.Store) *remote.Cache {
	p.t.Helper()
	opt := remote.Options{Store: st, Now: p.now}
	if p.warn != nil {
		opt.Progress = progress.NewRecorder(p.warn)
	}
	var c *remote.Cache
	var err error
	if p.spec.Type == cache.Directory {
		c, err = remote.OpenDirectory(fetcher{p.reg}, p.spec, opt)
	} else {
		c, err = remote.OpenRegistry(p.reg, fetcher{p.reg}, p.spec.Ref, opt)
	}
	if err != nil {
		p.t.Fatal(err)
	}
	c.Write(remote.Writing{Spec: p.spec, Compression: layer.Gzip})
	return c
}

func (p place) backend() cachetest.Backend {
	return cachetest.Backend{
		Open: func(t *testing.T, st *store.Store) (cache.Index, func(context.Context) error) {
			c := p.open(st)
			t.Cleanup(func() {
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			})
			return c, c.Flush
		},
		Fetcher: fetcher{p.reg},
	}
}

func to(t *testing.T, s string) cache.Spec {
	t.Helper()
	sp, err := cache.ParseTo(s)
	if err != nil {
		t.Fatal(err)
	}
	return sp
}

func inRegistry(t *testing.T, reg *registrytest.Registry, more string) place {
	return place{t: t, reg: client(t), spec: to(t, "type=registry,ref="+reg.Host()+"/team/cache:main"+more), warn: &warnings{}}
}

func inDirectory(t *testing.T, more string) place {
	return place{t: t, reg: client(t), spec: to(t, "type=local,dest="+filepath.Join(t.TempDir(), "cache")+more), warn: &warnings{}}
}

func TestRegistry(t *testing.T) {
	cachetest.Run(t, func(t *testing.T) cachetest.Backend {
		return inRegistry(t, registrytest.New(t, registrytest.Options{}), "").backend()
	})
}

func TestDirectory(t *testing.T) {
	cachetest.Run(t, func(t *testing.T) cachetest.Backend { return inDirectory(t, "").backend() })
}

func TestZstd(t *testing.T) {
	cachetest.Run(t, func(t *testing.T) cachetest.Backend {
		return inDirectory(t, ",compression=zstd,force-compression=true").backend()
	})
}

// TestIndex: with image-manifest=false a cache is an index, in docker's words if that is wanted, and works like any other.
func TestIndex(t *testing.T) {
	for name, more := range map[string]string{"oci": ",image-manifest=false", "docker": ",oci-mediatypes=false,compression=zstd"} {
		t.Run(name+" in a directory", func(t *testing.T) {
			cachetest.Run(t, func(t *testing.T) cachetest.Backend { return inDirectory(t, more).backend() })
		})
		t.Run(name+" in a registry", func(t *testing.T) {
			cachetest.Run(t, func(t *testing.T) cachetest.Backend {
				// One that takes what it is given: distribution 3 does not.
				srv := httptest.NewServer(lenient.New(lenient.Logger(log.New(io.Discard, "", 0))))
				t.Cleanup(srv.Close)
				ref := strings.TrimPrefix(srv.URL, "http://") + "/team/cache:main"
				return place{t: t, reg: client(t), spec: to(t, "type=registry,ref="+ref+more), warn: &warnings{}}.backend()
			})
		})
	}
}

// TestIndexRefused: of a registry that takes no index of layers it is said what to do.
func TestIndexRefused(t *testing.T) {
	p := inRegistry(t, registrytest.New(t, registrytest.Options{}), ",image-manifest=false")
	st := cachetest.NewStore(t)
	w := p.open(st)
	save(t, w, "k", cachetest.Layer(t, st, "one"))
	err := w.Flush(context.Background())
	var d *diag.Error
	if !errors.As(err, &d) || !strings.Contains(d.Hint, "image-manifest=true") {
		t.Error(err)
	}
}

// inline is an index whose records go into an image.
type inline struct {
	*remote.Cache // of the image that is there
	mu            sync.Mutex
	results       []remote.InlineResult
}

func (i *inline) Save(_ context.Context, key digest.Digest, r cache.Record) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.results = append(i.results, remote.InlineResult{Key: key, Record: r})
	return nil
}

// push makes an image of the largest result, with all of them.
func (i *inline) push(ctx context.Context, reg *registry.Client, st *store.Store, ref string) error {
	var layers []image.Layer
	for _, r := range i.results {
		if len(r.Layers) >= len(layers) {
			layers = r.Layers
		}
	}
	computed := layers
	layers, err := image.PackAll(ctx, st, layers, layer.Gzip, 0)
	if err != nil {
		return err
	}
	field, err := remote.EncodeInline(i.results, computed, layers, nil)
	if err != nil {
		return err
	}
	opt := image.AssembleOptions{Config: []byte(`{"os":"linux","architecture":"amd64"}`), Extra: map[string]json.RawMessage{remote.InlineField: field}}
	for _, l := range layers {
		opt.Layers = append(opt.Layers, image.NewLayer{Layer: l})
	}
	img, err := image.Assemble(opt)
	if err != nil {
		return err
	}
	p, err := export.OpenPush(ctx, reg, st, reg, ref, nil)
	if err != nil {
		return err
	}
	for _, l := range layers {
		l.Origin = ""
		if err := p.Layer(ctx, l); err != nil {
			return err
		}
	}
	if err := p.Manifests(ctx, []*image.Image{img}, false); err != nil {
		return err
	}
	_, err = p.Tag(ctx, img.Manifest, img.RawManifest)
	return err
}

func TestInline(t *testing.T) {
	cachetest.Run(t, func(t *testing.T) cachetest.Backend {
		reg := registrytest.New(t, registrytest.Options{})
		p := place{t: t, reg: client(t), spec: cache.Spec{Type: cache.Registry, Ref: reg.Host() + "/app:1"}}
		return cachetest.Backend{
			Prefix: true, Fetcher: fetcher{p.reg},
			Open: func(t *testing.T, st *store.Store) (cache.Index, func(context.Context) error) {
				i := &inline{Cache: p.open(st)}
				return i, func(ctx context.Context) error { return i.push(ctx, p.reg, st, p.spec.Ref) }
			},
		}
	})
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
