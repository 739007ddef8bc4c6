// Package export writes a finished image where it was asked for: the local
// store, registries, an archive, a directory.
package export

import (
	"encoding/csv"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/layer"
)

// Type is a kind of output.
type Type string

// The kinds of output, with docker's names.
const (
	Image     Type = "image"     // the local store; with push=true registries as well
	Registry  Type = "registry"  // registries alone
	OCI       Type = "oci"       // an OCI layout, as a tar or (tar=false) a directory
	Docker    Type = "docker"    // an archive as `docker save` makes it; without dest the local store
	Tar       Type = "tar"       // the root file system as a tar
	Local     Type = "local"     // the root file system as a directory
	CacheOnly Type = "cacheonly" // nowhere: the steps are run, and remembered
)

// Types are all of them.
func Types() []Type { return []Type{Image, Registry, OCI, Docker, Tar, Local, CacheOnly} }

// Spec is one --output.
type Spec struct {
	Type  Type
	Dest  string   // path; "-" is standard output; empty where none is needed
	Names []string // references, besides the build's tags
	Push  bool     // Image only
	Dir   bool     // OCI only: a directory instead of a tar

	// The next are of Image and Registry.
	NoStore       bool // not to the store either
	ByDigest      bool // push without a tag
	NameCanonical bool // in the store also as NAME@DIGEST
	// Dangling: in the store also as DANGLING@DIGEST; with DanglingEmptyOnly, if there is no other name.
	Dangling          string
	DanglingEmptyOnly bool
	Insecure          bool // its registries may be spoken to by plain HTTP

	// Split says whether files go to a directory for each platform; nil: if there are
	// several. Tar and Local only.
	Split *bool
	Epoch Epoch

	ImageOptions // of types that are an image
}

// ImageOptions are what an image may be like, whatever it says and holds.
type ImageOptions struct {
	Compression layer.Compression // of new layers; empty: the build's
	Level       int               // 0: the compression's default
	Force       bool              // the base image's layers as well
	DockerTypes bool              // docker's media types instead of OCI's
	KeepTimes   bool              // layers keep their files' times although there is an epoch
	Annotations Annotations
}

// ParseSpec parses the value of --output: comma-separated KEY=VALUE, or a bare
// path, which is type=local,dest=PATH ("-": type=tar,dest=-). Unknown keys and
// types are errors (diag.ExitUsage).
func ParseSpec(s string) (Spec, error) {
	bad := func(format string, a ...any) (Spec, error) {
		return Spec{}, diag.New(diag.ExitUsage, "output %q: %w", s, fmt.Errorf(format, a...))
	}
	if s == "" || strings.ContainsAny(s, "\r\n") {
		return bad("it is not one line")
	}
	values, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return bad("%w", err)
	}
	if len(values) == 1 && !strings.Contains(values[0], "=") {
		switch values[0] {
		case "-":
			return Spec{Type: Tar, Dest: "-"}, nil
		case "":
			return bad("it is empty")
		}
		return Spec{Type: Local, Dest: values[0]}, nil
	}
	kv := map[string]string{}
	for _, f := range values {
		k, v, ok := strings.Cut(f, "=")
		if !ok {
			return bad("%q is not KEY=VALUE", f)
		}
		k = strings.TrimSpace(k)
		if !strings.HasPrefix(k, "annotation") { // whose keys are the user's
			k = strings.ToLower(k)
		}
		if old, twice := kv[k]; twice && k == "name" {
			v = old + "," + v
		} else if twice {
			return bad("%q is there twice", k)
		}
		kv[k] = v
	}
	sp, err := fromFields(&fields{kv: kv, used: map[string]bool{}})
	if err != nil {
		return Spec{}, diag.New(diag.ExitUsage, "output %q: %w", s, err)
	}
	return sp, nil
}

// FromAttrs is the Spec of an exporter of BuildKit's API: what goes to files goes to the client's, who
// knows where they are. Unknown attributes and types are errors (diag.ExitUsage).
func FromAttrs(kind string, attrs map[string]string) (Spec, error) {
	f := &fields{kv: maps.Clone(attrs), used: map[string]bool{}, api: true}
	if f.kv == nil {
		f.kv = map[string]string{}
	}
	f.kv["type"] = kind
	if slices.Contains([]Type{OCI, Docker, Tar, Local}, Type(kind)) {
		f.kv["dest"] = "-"
	}
	sp, err := fromFields(f)
	if err != nil {
		return Spec{}, diag.New(diag.ExitUsage, "exporter %s: %w", kind, err)
	}
	return sp, nil
}

func fromFields(f *fields) (Spec, error) {
	sp := Spec{Type: Type(f.text("type"))}
	if !slices.Contains(Types(), sp.Type) {
		return Spec{}, diag.New(diag.ExitUsage, "type %q is not known", sp.Type).
			WithHint("types are image, registry, oci, docker, tar, local and cacheonly")
	}
	switch sp.Type {
	case Image, Registry:
		sp.readImage(f)
		sp.readPush(f)
	case OCI:
		sp.readImage(f)
		sp.Dest, sp.Dir = f.text("dest"), !f.flag("tar", true)
	case Docker:
		sp.readImage(f)
		sp.Dest, sp.Dir = f.text("dest"), !f.flag("tar", true)
		f.refuse("context", "there is no docker daemon to load it into")
	case Tar, Local:
		sp.readFiles(f)
	}
	if f.err == nil {
		f.err = f.unused(sp.Type)
	}
	if f.err == nil {
		f.err = sp.check(f.api)
	}
	return sp, f.err
}

// readImage reads what all images have.
func (s *Spec) readImage(f *fields) {
	for n := range strings.SplitSeq(f.text("name"), ",") {
		if n = strings.TrimSpace(n); n != "" {
			s.Names = append(s.Names, n)
		}
	}
	switch c := f.text("compression"); c {
	case "", "gzip", "zstd", "uncompressed":
		s.Compression = layer.Compression(c)
	default:
		f.fail("compression=%s is not supported: use gzip, zstd or uncompressed", c)
	}
	s.Level = f.level(s.Compression)
	s.Force = f.flag("force-compression", false)
	s.DockerTypes = !f.flag("oci-mediatypes", true)
	s.KeepTimes = !f.flag("rewrite-timestamp", true)
	s.Epoch = f.epoch()
	s.Annotations = f.annotations()
	// Attestations are all that these are about, and there are none.
	f.flag("oci-artifact", false)
	f.flag("attestation-inline", false)
	f.text("buildinfo-attrs")
	if !f.flag("prefer-nondist-layers", true) {
		f.fail("prefer-nondist-layers=false is not supported: foreign layers stay foreign")
	}
}

// readPush reads what images in the store and in registries have.
func (s *Spec) readPush(f *fields) {
	s.Push = f.flag("push", s.Type == Registry)
	if s.Type == Registry && !s.Push {
		f.fail("type=registry with push=false goes nowhere")
	}
	s.Push = s.Push && s.Type == Image
	s.NoStore = !f.flag("store", true)
	s.ByDigest = f.flag("push-by-digest", false)
	s.NameCanonical = f.flag("name-canonical", false)
	s.Dangling = f.text("dangling-name-prefix")
	s.DanglingEmptyOnly = f.flag("danging-name-empty-only", false) // BuildKit's spelling
	s.Insecure = f.flag("registry.insecure", false)
	f.flag("unpack", false) // there is nothing that images would have to be unpacked for
}

// readFiles reads what root file systems have.
func (s *Spec) readFiles(f *fields) {
	s.Dest = f.text("dest")
	s.Epoch = f.epoch()
	if _, ok := f.kv["platform-split"]; ok {
		split := f.flag("platform-split", false)
		s.Split = &split
	}
	f.text("attestation-prefix") // of files that there are none of
	if mode := f.text("mode"); f.api && s.Type == Local && mode == "delete" {
		return // the client does it
	} else if s.Type == Local && mode != "" && mode != "copy" {
		f.fail("mode=%s is not supported: nothing is deleted in the directory. Empty it first", mode)
	} else if s.Type == Tar && mode != "" {
		f.fail(`type=tar has no option "mode"`)
	}
}

// check finds options that contradict each other.
func (s *Spec) check(api bool) error {
	refuse := func(format string, a ...any) error { return diag.New(diag.ExitUsage, format, a...) }
	switch {
	case slices.Contains([]Type{OCI, Tar, Local}, s.Type) && s.Dest == "":
		return refuse("type=%s needs dest=PATH", s.Type)
	case s.Dir && s.Dest == "":
		return refuse("type=%s with tar=false needs dest=DIR", s.Type)
	case !api && s.Dest == "-" && (s.Type == Local || s.Dir):
		return refuse("a directory cannot go to standard output")
	case s.DockerTypes && len(s.Annotations) > 0:
		return refuse("annotations conflict with oci-mediatypes=false: docker's manifests have none")
	case s.ByDigest && !s.ToRegistry():
		return refuse("push-by-digest=true needs push=true")
	}
	return nil
}

// String is the spec as ParseSpec takes it.
func (s Spec) String() string {
	values := []string{"type=" + string(s.Type)}
	add := func(k, v string) {
		if v != "" {
			values = append(values, k+"="+v)
		}
	}
	set := func(k string, b, to bool) {
		if b {
			add(k, fmt.Sprint(to))
		}
	}
	add("dest", s.Dest)
	set("push", s.Push, true)
	set("tar", s.Dir, false)
	set("store", s.NoStore, false)
	set("push-by-digest", s.ByDigest, true)
	set("name-canonical", s.NameCanonical, true)
	add("dangling-name-prefix", s.Dangling)
	set("danging-name-empty-only", s.DanglingEmptyOnly, true)
	set("registry.insecure", s.Insecure, true)
	if s.Split != nil {
		set("platform-split", true, *s.Split)
	}
	if s.Epoch.Own {
		values = append(values, "source-date-epoch="+s.Epoch.seconds())
	}
	add("compression", string(s.Compression))
	if s.Level != 0 {
		add("compression-level", fmt.Sprint(max(s.Level, 0)))
	}
	set("force-compression", s.Force, true)
	set("oci-mediatypes", s.DockerTypes, false)
	set("rewrite-timestamp", s.KeepTimes, false)
	for _, a := range s.Annotations {
		values = append(values, a.option()+"="+a.Value)
	}
	for _, n := range s.Names {
		add("name", n)
	}
	var b strings.Builder
	w := csv.NewWriter(&b)
	_ = w.Write(values) // to memory, which does not fail
	w.Flush()
	return strings.TrimSuffix(b.String(), "\n")
}

// ToRegistry reports whether the image goes to registries.
func (s Spec) ToRegistry() bool { return s.Type == Registry || s.Push }

// ToStore reports whether the image goes to the local store.
func (s Spec) ToStore() bool {
	return s.Type == Image && !s.NoStore || s.Type == Docker && s.Dest == ""
}

// NeedsImage reports whether manifest and blobs are needed, not just the files.
func (s Spec) NeedsImage() bool {
	return slices.Contains([]Type{Image, Registry, OCI, Docker}, s.Type)
}

// Files reports whether it is the root file system that goes somewhere.
func (s Spec) Files() bool { return s.Type == Tar || s.Type == Local }

var _ fmt.Stringer = Spec{}
