package e2e

import (
	"path/filepath"
	"strings"
	"testing"
)

// TestClientsCache: a server whose store is empty finds everything in the cache that another one has written to a
// registry. It executes nothing, and downloads no layer. Of what has changed, or is to run again, it executes just that.
func TestClientsCache(t *testing.T) {
	guard(t)
	t.Parallel()
	b := newCachedBed(t)
	first := serveBed(t, b.Bed)
	for i, c := range first.clients() {
		t.Run(c.name, func(t *testing.T) {
			cache, ref, meta := b.Host+"/cache-"+c.name, b.Host+"/rebuilt-"+c.name, filepath.Join(t.TempDir(), "meta.json")
			o := order{
				dir: b.context, args: []string{"REGISTRY=" + b.Host, "USED=" + c.name}, cacheTo: "type=registry,mode=max,ref=" + cache,
				more: []string{"--metadata-file", meta, "--output", "type=image,push=true,name=" + ref},
			}
			if c.name == "buildx" { // of which buildctl has executed everything
				o.more = append(o.more, "--no-cache")
			}
			out := c.in(t).build(o)
			if ran := executed(out); len(ran) != 3 {
				t.Fatalf("the first build ran %q:\n%s", ran, out)
			}
			want, _ := metadata(t, meta)
			o.more, o.cacheTo, o.cacheFrom = o.more[:4], "", "type=registry,ref="+cache
			d := b.downloads(t)
			b.reg.ResetCounts()
			empty := serveEmpty(t, b.Bed).clients()[i].in(t)
			out = empty.build(o)
			if ran, did := executed(out), notDone(out); len(ran)+len(did) > 0 {
				t.Errorf("with the cache ran %q, did %q:\n%s", ran, did, out)
			}
			if got, _ := metadata(t, meta); got != want || digest(t, ref) != want {
				t.Errorf("with the cache it is %s, not %s; the registry has %s", got, want, digest(t, ref))
			}
			if n := d.layers(t, b.Host+"/"+busybox, ref, cache); n > 0 || b.reg.Counts().BlobPuts > 0 {
				t.Errorf("downloaded %d layers, %+v", n, b.reg.Counts())
			}
			files{"a.txt": "of " + c.name + "\n"}.write(t, b.context)
			out = empty.build(o)
			if ran := executed(out); len(ran) != 2 {
				t.Errorf("with a changed file ran %q:\n%s", ran, out)
			}
			o.opts = map[string]string{"no-cache": "b"} // of which nothing else comes than before
			out = empty.build(o)
			if ran := executed(out); len(ran) != 1 || !strings.Contains(ran[0], "ran-b") {
				t.Errorf("with a stage that is to run ran %q:\n%s", ran, out)
			}
		})
	}
}
