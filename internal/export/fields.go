package export

import (
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/layer"
)

// fields are the options of an output, of which each is read once. The first
// thing that is wrong with one is kept in err.
type fields struct {
	kv   map[string]string
	used map[string]bool // asked for: so it exists
	api  bool            // they are an exporter's attributes, of BuildKit's API
	err  error
}

func (f *fields) fail(format string, a ...any) {
	if f.err == nil {
		f.err = diag.New(diag.ExitUsage, format, a...)
	}
}

func (f *fields) text(k string) string {
	f.used[k] = true
	return f.kv[k]
}

// flag reads a boolean as docker does: "true", "1", …; the default if it is not there.
func (f *fields) flag(k string, def bool) bool {
	f.used[k] = true
	v, ok := f.kv[k]
	if !ok {
		return def
	}
	if v == "" && f.api {
		return true
	}
	b, err := strconv.ParseBool(v)
	if err != nil {
		f.fail("%s is true or false, and not %q", k, v)
	}
	return b
}

// refuse refuses an option that BuildKit knows.
func (f *fields) refuse(k, why string) {
	if v := f.text(k); v != "" {
		f.fail("%s=%s is not supported: %s", k, v, why)
	}
}

// level reads the level of a compression.
func (f *fields) level(c layer.Compression) int {
	v := f.text("compression-level")
	if v == "" {
		return 0
	}
	n, err := strconv.Atoi(v)
	highest := 9
	if c == layer.Zstd {
		highest = 22
	}
	switch {
	case c == layer.Uncompressed:
		f.fail("compression-level=%s: there is nothing to compress", v)
	case err != nil || n < 0 || n > highest:
		f.fail("compression-level=%s: levels are 0 to %d", v, highest)
	case n == 0:
		return layer.LeastLevel
	}
	return n
}

func (f *fields) epoch() (e Epoch) {
	v := f.text("source-date-epoch")
	if _, e.Own = f.kv["source-date-epoch"]; v == "" {
		return e
	}
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil {
		f.fail("source-date-epoch=%s is not a number of seconds", v)
		return e
	}
	t := time.Unix(n, 0).UTC()
	e.Time = &t
	return e
}

// annotations reads "annotation[-TYPE][[PLATFORM]].KEY".
func (f *fields) annotations() (all Annotations) {
	for _, k := range slices.Sorted(maps.Keys(f.kv)) {
		if !strings.HasPrefix(k, "annotation") {
			continue
		}
		f.used[k] = true
		prefix, key, ok := strings.Cut(k, ".")
		kind := strings.TrimPrefix(strings.TrimPrefix(prefix, "annotation"), "-")
		if !ok || key == "" {
			f.fail("%q is not of the form annotation-TYPE.KEY", k)
			return nil
		}
		a, err := newAnnotation(kind, key, f.kv[k])
		if err != nil {
			f.fail("%w", err)
			return nil
		}
		all = append(all, a)
	}
	slices.SortFunc(all, func(a, b Annotation) int { return strings.Compare(a.option(), b.option()) })
	for i := 1; i < len(all); i++ {
		if all[i].option() == all[i-1].option() {
			f.fail("%q is there twice", all[i].option())
		}
	}
	return all
}

// unused complains of an option that nobody asked for.
func (f *fields) unused(t Type) error {
	for _, k := range slices.Sorted(maps.Keys(f.kv)) {
		if !f.used[k] {
			delete(f.used, "type")
			return diag.New(diag.ExitUsage, "type=%s has no option %q", t, k).
				WithHint("it has %s", strings.Join(slices.Sorted(maps.Keys(f.used)), ", "))
		}
	}
	return nil
}
