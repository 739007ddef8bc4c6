package cache

import (
	"encoding/csv"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/layer"
)

// Type is a kind of cache outside of the local store.
type Type string

// The kinds of caches, with BuildKit's names.
const (
	Registry  Type = "registry" // a tag in a registry
	Directory Type = "local"    // an OCI layout in a directory
	Inline    Type = "inline"   // in the config of the image itself; to only
)

// Mode says which operations' results a cache is given.
type Mode string

// The modes, with BuildKit's names.
const (
	Min Mode = "min" // those whose layers the image has
	Max Mode = "max" // all, those of other stages too
)

// Bounds of a cache. What was used longest ago goes first; what the build that
// writes the cache has used itself stays in any case.
type Bounds struct {
	MaxRecords int           // results of operations
	MaxSize    int64         // bytes of all layers' blobs together
	TTL        time.Duration // how long a result is kept that nobody uses
}

// DefaultBounds are those of a Spec that does not say.
func DefaultBounds() Bounds {
	return Bounds{MaxRecords: 4000, MaxSize: 20_000_000_000, TTL: 30 * 24 * time.Hour}
}

// mostRecords bounds MaxRecords: a manifest names at most as many layers, and
// registries take manifests of 4 MiB.
const mostRecords = 10_000

// Spec is one --cache-from or --cache-to.
type Spec struct {
	Type     Type
	Ref      string        // Registry: the cache's name, as it was given
	Insecure bool          // Registry: it may be spoken to by plain HTTP
	Dir      string        // Directory: where the layout is
	Tag      string        // Directory: which of the layout's
	Digest   digest.Digest // Directory, from: this manifest instead of a tag

	// The rest is of --cache-to.

	Mode        Mode
	Compression layer.Compression // of new layers; empty: the image's
	Level       int               // as layer.Compress has it; 0: the compression's default
	Force       bool              // other layers are compressed anew, too
	IgnoreError bool              // a cache that cannot be written does not fail the build
	Index       bool              // an index instead of an image manifest
	DockerTypes bool              // docker's media types, of an index and its layers
	Bounds      Bounds
}

// ParseFrom parses the value of --cache-from: comma-separated KEY=VALUE, or
// bare names, each a cache or an image in a registry. Unknown keys and
// types are errors (diag.ExitUsage).
func ParseFrom(s string) ([]Spec, error) {
	refs, kv, err := fields(s)
	if err != nil {
		return nil, badFrom(beginning(s), err)
	}
	if refs == nil {
		sp, err := From(kv)
		return []Spec{sp}, err
	}
	var all []Spec
	for _, ref := range refs {
		sp, err := From(map[string]string{"type": string(Registry), "ref": ref})
		if err != nil {
			return nil, err
		}
		all = append(all, sp)
	}
	return all, nil
}

// ParseTo parses the value of --cache-to, as ParseFrom does.
func ParseTo(s string) (Spec, error) {
	refs, kv, err := fields(s)
	switch {
	case err != nil:
		return Spec{}, badTo(beginning(s), err)
	case len(refs) > 1:
		return Spec{}, badTo(s, errors.New("it is one cache; each of several has an option of its own"))
	case len(refs) == 1:
		kv = map[string]string{"type": string(Registry), "ref": refs[0]}
	}
	return To(kv)
}

// fields splits a value into bare names or into keys and values.
func fields(s string) (refs []string, kv map[string]string, err error) {
	if s == "" || strings.ContainsAny(s, "\r\n") {
		return nil, nil, errors.New("it is not one line")
	}
	all, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return nil, nil, err
	}
	if !strings.Contains(s, "=") {
		return all, nil, nil
	}
	kv = map[string]string{}
	for i, f := range all {
		k, v, ok := strings.Cut(f, "=")
		if !ok {
			return nil, nil, fmt.Errorf("field %d is not KEY=VALUE", i+1)
		}
		k = strings.ToLower(strings.TrimSpace(k))
		if _, twice := kv[k]; twice {
			return nil, nil, fmt.Errorf("%q is there twice", k)
		}
		kv[k] = v
	}
	return nil, kv, nil
}

// beginning is what may be shown of a value that was not understood: what follows may be a password.
func beginning(s string) string {
	s, _, _ = strings.Cut(s, ",")
	return s
}

func badFrom(s string, err error) error { return refused("cache to read", s, err) }

func badTo(s string, err error) error { return refused("cache to write", s, err) }

func refused(what, s string, err error) error {
	var d *diag.Error
	if err == nil || errors.As(err, &d) {
		return err
	}
	return diag.New(diag.ExitUsage, "%s %q: %w", what, s, err)
}

func registryOptions() []string { return []string{"ref", "registry.insecure"} }

// writeOptions are those that a cache of any type has which is written. Who reads has no use
// for them, but may have them from who writes.
func writeOptions() []string {
	return []string{
		"mode", "compression", "compression-level", "force-compression", "ignore-error", "image-manifest", "oci-mediatypes",
		"max-records", "max-size", "ttl",
	}
}

// From reads the keys and values of a cache to read, "type" among them, as
// BuildKit's API has them too.
func From(kv map[string]string) (Spec, error) {
	r := reader{kv: kv, name: text(kv)}
	sp := Spec{Type: Type(kv["type"])}
	switch sp.Type {
	case Registry:
		sp.Ref, sp.Insecure = r.need("ref"), r.flag("registry.insecure", false)
		r.only(slices.Concat(registryOptions(), writeOptions())...)
	case Directory:
		sp.Dir, sp.Tag = r.need("src"), r.tag()
		sp.Digest = r.digest("digest")
		r.only(slices.Concat([]string{"src", "tag", "digest"}, writeOptions())...)
	case Inline:
		r.fail(errors.New("records within an image are read with type=registry,ref=IMAGE"))
	default:
		r.unknownType()
	}
	return sp, badFrom(r.name, r.err)
}

// To reads the keys and values of a cache to write.
func To(kv map[string]string) (Spec, error) {
	r := reader{kv: kv, name: text(kv)}
	sp := Spec{Type: Type(kv["type"]), Mode: Min, Bounds: DefaultBounds()}
	switch sp.Type {
	case Registry:
		sp.Ref, sp.Insecure = r.need("ref"), r.flag("registry.insecure", false)
		r.only(slices.Concat(registryOptions(), writeOptions())...)
	case Directory:
		sp.Dir, sp.Tag = r.need("dest"), r.tag()
		r.only(slices.Concat([]string{"dest", "tag"}, writeOptions())...)
	case Inline:
		r.only("mode", "ignore-error")
		if kv["mode"] == string(Max) {
			r.fail(errors.New("an image has the layers of mode=min alone; type=registry and type=local have mode=max"))
		}
	default:
		r.unknownType()
	}
	if m := Mode(kv["mode"]); m == Max {
		sp.Mode = Max
	} else if m != "" && m != Min {
		r.fail(fmt.Errorf("mode is min or max, and not %q", m))
	}
	r.compression(&sp)
	r.form(&sp)
	sp.IgnoreError = r.flag("ignore-error", false)
	r.bounds(&sp.Bounds)
	return sp, badTo(r.name, r.err)
}

// String is the spec as it would be given.
func (s Spec) String() string {
	switch s.Type {
	case Registry:
		return "type=registry,ref=" + s.Ref
	case Directory:
		return "type=local," + s.Dir
	}
	return "type=" + string(s.Type)
}

// text is keys and values as a user may have written them. Values of keys that are not known may be
// passwords (secret_access_key), and are not in it.
func text(kv map[string]string) string {
	shown := slices.Concat(registryOptions(), writeOptions(), []string{"src", "dest", "tag", "digest"})
	parts := []string{"type=" + kv["type"]}
	for _, k := range slices.Sorted(maps.Keys(kv)) {
		switch {
		case k == "type":
		case slices.Contains(shown, k):
			parts = append(parts, k+"="+kv[k])
		default:
			parts = append(parts, k+"=…")
		}
	}
	return strings.Join(parts, ",")
}

// reader reads values and keeps the first error.
type reader struct {
	kv   map[string]string
	name string
	err  error
}

func (r *reader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
}

func (r *reader) need(k string) string {
	if r.kv[k] == "" {
		r.fail(fmt.Errorf("type=%s needs %s=…", r.kv["type"], k))
	}
	return r.kv[k]
}

func (r *reader) only(keys ...string) {
	for _, k := range slices.Sorted(maps.Keys(r.kv)) {
		if k != "type" && !slices.Contains(keys, k) {
			slices.Sort(keys)
			r.fail(diag.New(diag.ExitUsage, "cache %q: type=%s has no option %q here", r.name, r.kv["type"], k).
				WithHint("It has %s.", strings.Join(keys, ", ")))
		}
	}
}

func (r *reader) unknownType() {
	switch t := r.kv["type"]; t {
	case "gha", "s3", "azblob":
		r.fail(diag.New(diag.ExitUsage, "cache %q: caches of type=%s are not supported", r.name, t).
			WithHint("type=registry,ref=… works with any registry, type=local with a directory that is kept."))
	default:
		r.fail(diag.New(diag.ExitUsage, "cache %q: type %q is not known", r.name, t).WithHint("Types are registry, local and inline."))
	}
}

func (r *reader) flag(k string, def bool) bool {
	v, ok := r.kv[k]
	if !ok {
		return def
	}
	b, err := strconv.ParseBool(v)
	if err != nil {
		r.fail(fmt.Errorf("%s is true or false, and not %q", k, v))
	}
	return b
}

func (r *reader) tag() string {
	if t := r.kv["tag"]; t != "" {
		return t
	}
	return "latest"
}

func (r *reader) digest(k string) digest.Digest {
	d := digest.Digest(r.kv[k])
	if d != "" && d.Validate() != nil {
		r.fail(fmt.Errorf("%s is a digest, sha256:…, and not %q", k, d))
	}
	return d
}

func (r *reader) compression(sp *Spec) {
	switch c := layer.Compression(r.kv["compression"]); c {
	case "", layer.Gzip, layer.Zstd, layer.Uncompressed:
		sp.Compression = c
	case "estargz":
		r.fail(fmt.Errorf("compression=%s is not supported: gzip, zstd and uncompressed are", c))
	default:
		r.fail(fmt.Errorf("compression is gzip, zstd or uncompressed, and not %q", c))
	}
	sp.Level = r.level(sp.Compression)
	sp.Force = r.flag("force-compression", false)
}

// form reads what kind of document a cache is. With docker's media types it is an index, if nothing else is said.
func (r *reader) form(sp *Spec) {
	sp.DockerTypes = !r.flag("oci-mediatypes", true)
	sp.Index = !r.flag("image-manifest", !sp.DockerTypes)
	if sp.DockerTypes && !sp.Index {
		r.fail(errors.New("image-manifest=true and oci-mediatypes=false contradict each other"))
	}
}

// level reads the level of a compression.
func (r *reader) level(c layer.Compression) int {
	v, ok := r.kv["compression-level"]
	if !ok {
		return 0
	}
	most := map[layer.Compression]int{"": 9, layer.Gzip: 9, layer.Zstd: 22}[c]
	n, err := strconv.Atoi(v)
	switch {
	case err != nil || n < 0 || n > most:
		r.fail(fmt.Errorf("compression-level is a number up to %d here, and not %q", most, v))
	case n == 0 && c != layer.Uncompressed:
		return layer.LeastLevel
	}
	return n
}

func (r *reader) bounds(b *Bounds) {
	if v, ok := r.kv["max-records"]; ok {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 || n > mostRecords {
			r.fail(fmt.Errorf("max-records is a number from 1 to %d, and not %q", mostRecords, v))
		}
		b.MaxRecords = n
	}
	if v, ok := r.kv["max-size"]; ok {
		n, err := units.FromHumanSize(v)
		if err != nil || n <= 0 {
			r.fail(fmt.Errorf("max-size is a size such as 20GB, and not %q", v))
		}
		b.MaxSize = n
	}
	if v, ok := r.kv["ttl"]; ok {
		d, err := time.ParseDuration(v)
		if err != nil || d <= 0 {
			r.fail(fmt.Errorf("ttl is a time such as 720h, and not %q", v))
		}
		b.TTL = d
	}
}
