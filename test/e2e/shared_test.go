package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/kiln-build/kiln/test/baseimages"
	"github.com/kiln-build/kiln/test/compare"
	"github.com/kiln-build/kiln/test/kilnrun"
	"github.com/kiln-build/kiln/test/testenv"
)

// patience is how long one build may take on a machine that does other things too.
const patience = 2 * time.Minute

// files is a build context: name to content.
type files map[string]string

// write makes a build context; names end in / for directories.
func (f files) write(t *testing.T, dir string) string {
	t.Helper()
	for name, content := range f {
		p := filepath.Join(dir, name)
		if strings.HasSuffix(name, "/") {
			if err := os.MkdirAll(p, 0o755); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// run runs kiln to its end and takes any trace of a panic for a failure.
func run(t *testing.T, r *kilnrun.Runner, args ...string) (out string, code int) {
	t.Helper()
	return runIn(t, r, nil, args...)
}

func runIn(t *testing.T, r *kilnrun.Runner, stdin io.Reader, args ...string) (out string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := r.Command(ctx, args...)
	cmd.Stdin = stdin
	cmd.WaitDelay = 10 * time.Second
	start := time.Now()
	b, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil || ctx.Err() != nil {
		t.Fatalf("kiln %s: %v after %v\n%s", args[0], err, time.Since(start), b)
	}
	out = string(b)
	noPanic(t, out)
	return out, cmd.ProcessState.ExitCode()
}

func noPanic(t *testing.T, out string) {
	t.Helper()
	for _, s := range []string{"goroutine ", "panic:", "runtime error", "fatal error: "} {
		if strings.Contains(out, s) {
			t.Errorf("kiln printed %q:\n%s", s, out)
		}
	}
}

// want fails unless the exit code is code and the output matches every pattern.
func want(t *testing.T, out string, got, code int, patterns ...string) {
	t.Helper()
	if got != code {
		t.Errorf("exit code %d, not %d", got, code)
	}
	for _, p := range patterns {
		if !regexp.MustCompile(p).MatchString(out) {
			t.Errorf("does not say %q", p)
		}
	}
	if t.Failed() {
		t.Logf("kiln printed:\n%s", out)
	}
}

// executed are the lines of output of RUN steps in plain progress.
func executed(out string) []string {
	return regexp.MustCompile(`(?m)^#\d+ \d+\.\d+ .*$`).FindAllString(out, -1)
}

// entry is a file of an image.
type entry struct {
	*tar.Header
	Data string
}

// rootfs reads the whole file system of an image, without the content of big files.
func rootfs(t *testing.T, ref string) map[string]entry {
	t.Helper()
	img, err := compare.Open(ref)
	if err != nil {
		t.Fatal(err)
	}
	rc := mutate.Extract(img)
	defer rc.Close()
	all := map[string]entry{}
	for r := tar.NewReader(rc); ; {
		h, err := r.Next()
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if h.Size < 1<<20 {
			if _, err := io.Copy(&b, r); err != nil {
				t.Fatal(err)
			}
		}
		all[path.Join("/", h.Name)] = entry{h, b.String()}
	}
}

func digest(t *testing.T, ref string) string {
	t.Helper()
	img, err := compare.Open(ref)
	if err != nil {
		t.Fatal(err)
	}
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

// notPushed fails if the registry knows the tag.
func notPushed(t *testing.T, ref string) {
	t.Helper()
	host, rest, _ := strings.Cut(ref, "/")
	repo, tag, ok := strings.Cut(rest, ":")
	if !ok {
		tag = "latest"
	}
	resp, err := http.Head("http://" + host + "/v2/" + repo + "/manifests/" + tag)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusNotFound {
		t.Errorf("a failed build pushed %s: the registry says %s", ref, resp.Status)
	}
}

// pushBases gives a registry base images.
func pushBases(t *testing.T, host string, bases ...string) {
	t.Helper()
	cache, err := testenv.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	set := baseimages.Open(cache, os.Stderr)
	if err := set.Ensure(t.Context()); err != nil && !errors.Is(err, baseimages.ErrMissing) {
		t.Fatal(err)
	}
	if err := set.Push(t.Context(), host, bases...); err != nil {
		t.Skipf("no base images %v here: %v", bases, err)
	}
}

// needRoot skips a test of what only root can set up.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to set up what the unprivileged builder is to run into")
	}
}

// tarEntry is one header of a tar with its content. Size, if set, is what the
// header claims.
type tarEntry struct {
	Name, Link, Body string
	Type             byte
	Mode             int64
	Size             int64
	Major, Minor     int64
}

// tarBytes makes a tar of whatever it is told, well-formed or not.
func tarBytes(t *testing.T, entries ...tarEntry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{
			Name: e.Name, Linkname: e.Link, Typeflag: e.Type, Mode: e.Mode, Size: int64(len(e.Body)), Devmajor: e.Major, Devminor: e.Minor,
		}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if e.Size > 0 {
			h.Size, h.Format = e.Size, tar.FormatGNU
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.Body); err != nil {
			t.Fatal(err)
		}
		if e.Size > 0 {
			return b.Bytes() // what it claims does not come
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// tarLayer is an image layer of whatever it is told.
func tarLayer(t *testing.T, entries ...tarEntry) v1.Layer {
	t.Helper()
	return static.NewLayer(tarBytes(t, entries...), types.OCIUncompressedLayer)
}
