// Package export writes a finished image where it was asked for: the local
// store, registries, an archive, a directory.
package export

import (
	"encoding/csv"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/kiln-build/kiln/internal/diag"
)

// Type is a kind of output.
type Type string

// The kinds of output, with docker's names.
const (
	Image    Type = "image"    // the local store; with push=true registries as well
	Registry Type = "registry" // registries alone
	OCI      Type = "oci"      // an OCI layout, as a tar or (tar=false) a directory
	Docker   Type = "docker"   // an archive as `docker save` makes it; without dest the local store
	Tar      Type = "tar"      // the root file system as a tar
	Local    Type = "local"    // the root file system as a directory
)

// Spec is one --output.
type Spec struct {
	Type  Type
	Dest  string   // path; "-" is standard output; empty where none is needed
	Names []string // references, besides the build's tags
	Push  bool     // Image only
	Dir   bool     // OCI only: a directory instead of a tar
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
	fields, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return bad("%w", err)
	}
	if len(fields) == 1 && !strings.Contains(fields[0], "=") {
		switch fields[0] {
		case "-":
			return Spec{Type: Tar, Dest: "-"}, nil
		case "":
			return bad("it is empty")
		}
		return Spec{Type: Local, Dest: fields[0]}, nil
	}
	kv := map[string]string{}
	for _, f := range fields {
		k, v, ok := strings.Cut(f, "=")
		if !ok {
			return bad("%q is not KEY=VALUE", f)
		}
		k = strings.ToLower(strings.TrimSpace(k))
		if old, twice := kv[k]; twice && k == "name" {
			v = old + "," + v
		} else if twice {
			return bad("%q is there twice", k)
		}
		kv[k] = v
	}
	return fromFields(s, kv)
}

// flag reads a boolean as docker does: "true", "1", …; the default if it is not there.
func flag(kv map[string]string, k string, def bool) (bool, error) {
	v, ok := kv[k]
	if !ok {
		return def, nil
	}
	b, err := strconv.ParseBool(v)
	if err != nil {
		return false, fmt.Errorf("%s is true or false, and not %q", k, v)
	}
	return b, nil
}

func fromFields(s string, kv map[string]string) (Spec, error) {
	sp := Spec{Type: Type(kv["type"]), Dest: kv["dest"]}
	for n := range strings.SplitSeq(kv["name"], ",") {
		if n = strings.TrimSpace(n); n != "" {
			sp.Names = append(sp.Names, n)
		}
	}
	tar, err := flag(kv, "tar", true)
	if err == nil {
		sp.Dir = !tar
		sp.Push, err = flag(kv, "push", false)
	}
	if err != nil {
		return Spec{}, diag.New(diag.ExitUsage, "output %q: %w", s, err)
	}
	allowed := map[Type][]string{
		Image: {"name", "push"}, Registry: {"name", "push"}, OCI: {"dest", "name", "tar"}, Docker: {"dest", "name"},
		Tar: {"dest"}, Local: {"dest"},
	}
	keys, ok := allowed[sp.Type]
	if !ok {
		return Spec{}, diag.New(diag.ExitUsage, "output %q: type %q is not known", s, sp.Type).
			WithHint("types are image, registry, oci, docker, tar and local")
	}
	for _, k := range slices.Sorted(maps.Keys(kv)) {
		if k != "type" && !slices.Contains(keys, k) {
			return Spec{}, diag.New(diag.ExitUsage, "output %q: type=%s has no option %q", s, sp.Type, k).
				WithHint("it has %s", strings.Join(keys, ", "))
		}
	}
	if slices.Contains([]Type{OCI, Tar, Local}, sp.Type) && sp.Dest == "" {
		return Spec{}, diag.New(diag.ExitUsage, "output %q: type=%s needs dest=PATH", s, sp.Type)
	}
	if sp.Dest == "-" && (sp.Type == Local || sp.Dir) {
		return Spec{}, diag.New(diag.ExitUsage, "output %q: a directory cannot go to standard output", s)
	}
	return sp, nil
}

// String is the spec as ParseSpec takes it.
func (s Spec) String() string {
	fields := []string{"type=" + string(s.Type)}
	if s.Dest != "" {
		fields = append(fields, "dest="+s.Dest)
	}
	if s.Push {
		fields = append(fields, "push=true")
	}
	if s.Dir {
		fields = append(fields, "tar=false")
	}
	for _, n := range s.Names {
		fields = append(fields, "name="+n)
	}
	var b strings.Builder
	w := csv.NewWriter(&b)
	_ = w.Write(fields) // to memory, which does not fail
	w.Flush()
	return strings.TrimSuffix(b.String(), "\n")
}

// ToRegistry reports whether the image goes to registries.
func (s Spec) ToRegistry() bool { return s.Type == Registry || s.Push }

// ToStore reports whether the image goes to the local store.
func (s Spec) ToStore() bool { return s.Type == Image || s.Type == Docker && s.Dest == "" }

// NeedsImage reports whether manifest and blobs are needed, not just the files.
func (s Spec) NeedsImage() bool { return s.Type != Tar && s.Type != Local }

var _ fmt.Stringer = Spec{}
