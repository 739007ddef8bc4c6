// Package build is the facade that everything which starts a build calls:
// Request in, Result out. It puts the parts together, the build context, the
// front end, the engine, the exports, and holds no other logic.
package build

import (
	"encoding/base64"
	"encoding/json"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/sandbox"
	"github.com/kiln-build/kiln/internal/secret"
	"github.com/kiln-build/kiln/internal/sshagent"
	"github.com/kiln-build/kiln/internal/store"
)

// Request says what is to be built and where the result goes.
type Request struct {
	Context    string    // a directory, a URL, or "-" for Stdin
	Dockerfile string    // path, "-" for Stdin; empty: Dockerfile in the context
	Stdin      io.Reader // read only if Context or Dockerfile is "-"

	// Locals, unless nil, are used in place of Context and Dockerfile: directories by the names that
	// the front end calls them by, "context" and "dockerfile" first of all.
	Locals map[string]string
	// Layouts are OCI layouts by the names that contexts call them by, oci-layout://NAME@DIGEST.
	Layouts map[string]string
	// Definition, unless nil, is built in place of a Dockerfile; it reads Locals and Layouts.
	Definition *frontend.Definition
	// Attrs are options by the names that BuildKit's front end has for them; the fields below go before them.
	Attrs map[string]string

	Tags      []string // references; normalised by Run
	BuildArgs map[string]string
	Labels    map[string]string
	Target    string
	Platforms []ocispec.Platform
	// Contexts are --build-context: name → directory, docker-image://REF or oci-layout://PATH[:TAG][@DIGEST].
	Contexts map[string]string
	NoCache  bool
	// NoCacheFilter are stages whose steps are run though their results are known.
	NoCacheFilter []string
	Pull          bool   // ask the registry though the local store has the image
	Network       string // of RUN steps that do not say: "default" (or ""), "none", "host"
	AddHosts      []string
	// Secrets and SSH are for RUN steps, and for what a Dockerfile fetches.
	Secrets []secret.Source
	SSH     []sshagent.Source
	Ulimits []units.Ulimit // of RUN steps
	ShmSize int64          // bytes of /dev/shm in RUN steps; 0: docker's 64 MiB
	Timeout time.Duration  // of the whole build; 0: none

	// CacheFrom are the caches that are asked, in this order, for what the store's
	// does not have; CacheTo are those that are written.
	CacheFrom, CacheTo []cache.Spec
	// MountsFrom are the caches where cache mounts are looked for that the store does not
	// have; MountsTo is the one that they are written to.
	MountsFrom, MountsTo []cache.Spec

	Outputs     []export.Spec      // none: the local store
	Compression layer.Compression  // of new layers, where an output does not say
	Annotations export.Annotations // of all outputs that are an image
}

// Env is what a build works with.
type Env struct {
	Store    *store.Store
	Registry *registry.Client
	Progress *progress.Recorder
	Sandbox  sandbox.Sandbox
	Stdout   io.Writer // for outputs with dest=-
	Parallel int       // RUN steps at the same time; 0: as many as there are CPUs
	Environ  []string  // for fetching contexts: proxies, PATH for git; for secrets, and to find the SSH agent
	// Limit is how large the store may become: after a build what was used longest ago
	// is removed. Zero: however large.
	Limit store.Limit
}

// Result is what was built.
type Result struct {
	// ID is the digest of the image's config, for one platform; Digest that
	// of the manifest, or of the index for several. If outputs differ in what the
	// image is to be like, these are of the first. Empty: files alone.
	ID     digest.Digest
	Digest digest.Digest
	// Descriptor of what Digest names.
	Descriptor ocispec.Descriptor
	// Tags it was given, and Pushed the references that a registry has now.
	Tags   []string
	Pushed []string
	// Images are the descriptors of each output that is an image, by the output's number.
	Images map[int]ocispec.Descriptor
}

// Metadata says of the result what BuildKit's exporters do, by their names.
func (r *Result) Metadata() (map[string]string, error) {
	m := map[string]string{}
	if r.Digest != "" {
		d, err := json.Marshal(r.Descriptor)
		if err != nil {
			return nil, err
		}
		m["containerimage.digest"] = r.Digest.String()
		m["containerimage.descriptor"] = base64.StdEncoding.EncodeToString(d)
		if r.ID != r.Digest { // an index has no config
			m["containerimage.config.digest"] = r.ID.String()
		}
	}
	if len(r.Tags) > 0 {
		m["image.name"] = strings.Join(r.Tags, ",")
	}
	return m, nil
}

// InsecureHosts are the registries, HOST[:PORT], that outputs and caches say may be spoken
// to by plain HTTP. What is no name of an image is left for Run to refuse.
func (r *Request) InsecureHosts() (hosts []string) {
	for _, c := range slices.Concat(r.CacheFrom, r.CacheTo, r.MountsFrom, r.MountsTo) {
		if named, err := reference.ParseNormalizedNamed(c.Ref); err == nil && c.Insecure {
			hosts = append(hosts, reference.Domain(named))
		}
	}
	for _, o := range r.Outputs {
		if !o.Insecure {
			continue
		}
		for _, n := range slices.Concat(r.Tags, o.Names) {
			if named, err := reference.ParseNormalizedNamed(n); err == nil {
				hosts = append(hosts, reference.Domain(named))
			}
		}
	}
	return hosts
}
