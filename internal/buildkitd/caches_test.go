package buildkitd

import (
	"strings"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"

	"github.com/kiln-build/kiln/internal/cache"
)

// TestCaches: what a request says of caches, in Kiln's words.
func TestCaches(t *testing.T) {
	entry := func(s string) *controlapi.CacheOptionsEntry {
		e := &controlapi.CacheOptionsEntry{Attrs: map[string]string{}}
		for kv := range strings.SplitSeq(s, ",") {
			k, v, _ := strings.Cut(kv, "=")
			if e.Attrs[k] = v; k == "type" {
				e.Type = v
				delete(e.Attrs, k)
			}
		}
		return e
	}
	for _, c := range []struct {
		from, to string // separated by spaces
		want     string
		refused  string
	}{
		{from: "type=registry,ref=h:5000/a,registry.insecure=true,mode=max", want: "from type=registry,ref=h:5000/a insecure h:5000"},
		{to: "type=inline type=inline", want: "to type=inline"},
		{to: "type=local,dest=a,reset=true type=local,dest=b,ignore-error=true type=registry,ref=h/c,mode=max", want: "to type=local,a to type=local,b to type=registry,ref=h/c"},
		{to: "type=local,dest=a type=local,dest=b,mode=max", refused: "differ in more than their place"},
		{to: "type=local,dest=a,compression=zstd type=local,dest=b", refused: "differ in more than their place"},
		{from: "type=s3,secret_access_key=hunter2", refused: "type=s3 are not supported"},
	} {
		o := &controlapi.CacheOptions{}
		for _, s := range strings.Fields(c.from) {
			o.Imports = append(o.Imports, entry(s))
		}
		for _, s := range strings.Fields(c.to) {
			o.Exports = append(o.Exports, entry(s))
		}
		from, to, insecure, err := caches(o)
		if c.refused != "" {
			if err == nil || !strings.Contains(err.Error(), c.refused) || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%+v: %v", c, err)
			}
			continue
		}
		var got []string
		add := func(what string, specs []cache.Spec) {
			for _, sp := range specs {
				got = append(got, what+" "+sp.String())
			}
		}
		add("from", from)
		add("to", to)
		for _, h := range insecure {
			got = append(got, "insecure "+h)
		}
		if s := strings.Join(got, " "); err != nil || s != c.want {
			t.Errorf("%+v: %s, %v", c, s, err)
		}
	}
}
