package buildctl

import (
	"bytes"
	"io"
	"regexp"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/cli/console"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/store"
)

// TestUsageHere shows and removes what builds have left, where there is no server.
func TestUsageHere(t *testing.T) {
	root := t.TempDir()
	st, err := store.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	l, err := image.Commit(t.Context(), st, image.CommitOptions{}, func(w io.Writer) error { return layer.NewTarWriter(w).Close() })
	if err != nil {
		t.Fatal(err)
	}
	if err := cache.NewLocal(st).Save(t.Context(), digest.FromString("step"), cache.Record{Layers: []image.Layer{l}}); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{"KILN_ROOT": root, "XDG_RUNTIME_DIR": t.TempDir(), "HOME": t.TempDir()}
	run := func(command func(*server) *cobra.Command, args ...string) (string, error) {
		var out bytes.Buffer
		s := &server{Console: &console.Console{Streams: console.Streams{Out: &out, Err: io.Discard}, Getenv: func(k string) string { return env[k] }}, daemonless: true}
		cmd := command(s)
		cmd.SetArgs(args)
		cmd.SilenceErrors, cmd.SilenceUsage = true, true
		err := cmd.ExecuteContext(t.Context())
		return out.String(), err
	}
	id := digest.Digest(l.DiffID).Encoded()[:25]
	shows := regexp.MustCompile(`(?m)^` + id + `\s+true\s`)
	if out, err := run(newDiskUsage); err != nil || !shows.MatchString(out) || !strings.Contains(out, "Total:") {
		t.Errorf("du: %v\n%s", err, out)
	}
	if out, err := run(newDiskUsage, "--filter", "type==exec.cachemount"); err != nil || shows.MatchString(out) {
		t.Errorf("du of another type: %v\n%s", err, out)
	}
	if out, err := run(newPrune, "--keep-duration", "1h"); err != nil || shows.MatchString(out) {
		t.Errorf("prune of what is old: %v\n%s", err, out)
	}
	if out, err := run(newPrune); err != nil || !shows.MatchString(out) {
		t.Errorf("prune: %v\n%s", err, out)
	}
	if out, err := run(newDiskUsage); err != nil || shows.MatchString(out) {
		t.Errorf("du after prune: %v\n%s", err, out)
	}
	for _, args := range [][]string{{"--filter", "type=="}, {"--keep-storage", "-1"}} {
		if _, err := run(newPrune, args...); diag.ExitCode(err) != diag.ExitUsage {
			t.Errorf("prune %q: %v", args, err)
		}
	}
}
