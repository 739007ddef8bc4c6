package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/registry/registrytest"
	"github.com/kiln-build/kiln/test/compare"
	"github.com/kiln-build/kiln/test/kilnrun"
)

// rawLayer is a gzip layer of any bytes. Its diff id is that of the compressed
// bytes, which is wrong unless it is replaced.
func rawLayer(b []byte) v1.Layer { return static.NewLayer(b, types.OCILayer) }

// pushLayers pushes an image of busybox with layers on top.
func pushLayers(t *testing.T, ref string, layers ...v1.Layer) {
	t.Helper()
	host, _, _ := strings.Cut(ref, "/")
	img, err := compare.Open(host + "/" + busybox)
	if err != nil {
		t.Fatal(err)
	}
	base, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	all, err := mutate.AppendLayers(empty.Image, append(slices.Clone(base), layers...)...)
	if err != nil {
		t.Fatal(err)
	}
	config, err := all.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", runtime.GOARCH
	if all, err = mutate.ConfigFile(all, config); err != nil {
		t.Fatal(err)
	}
	r, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(r, all); err != nil {
		t.Fatal(err)
	}
}

// TestHostileLayers: base images whose layers do not stay in their place.
func TestHostileLayers(t *testing.T) {
	guard(t)
	b := newHostileBed(t)
	bad := []int{diag.ExitRegistry, diag.ExitFailure, diag.ExitDockerfile}
	any := append([]int{0}, bad...)
	big := strings.Repeat("x", 1<<20)
	for i, c := range []struct {
		name  string
		layer v1.Layer
		codes []int
		says  []string
	}{
		{name: "all ways out", layer: tarLayer(t, evil(b)...), codes: any},
		{name: "hard link out", layer: tarLayer(t, tarEntry{Name: "h", Type: '1', Link: b.guard + "/secret"}), codes: bad, says: []string{`"?h"?`}},
		{name: "hard link up", layer: tarLayer(t, tarEntry{Name: "h", Type: '1', Link: up + b.guard + "/secret"}), codes: bad, says: []string{`"?h"?`}},
		{name: "whiteouts", layer: tarLayer(t, tarEntry{Name: ".wh.."}, tarEntry{Name: ".wh..."}, tarEntry{Name: ".wh."}, tarEntry{Name: "bin/.wh..wh..opq"}, tarEntry{Name: "../.wh.guard"}, tarEntry{Name: ".wh.a/b"}), codes: any},
		{name: "whiteout of all", layer: tarLayer(t, tarEntry{Name: ".wh..wh..opq"}), codes: append([]int{diag.ExitStep}, any...)},
		{name: "devices", layer: tarLayer(t, manyDevices()...), codes: any},
		{name: "1 EiB", layer: tarLayer(t, tarEntry{Name: "big", Body: "x", Size: 1 << 60}), codes: bad, says: []string{`too many bytes|big`}},
		{name: "duplicates", layer: tarLayer(t, tarEntry{Name: "d", Body: "1"}, tarEntry{Name: "d", Type: '5'}, tarEntry{Name: "d/f", Body: big}, tarEntry{Name: "d", Type: '2', Link: "/etc"}, tarEntry{Name: "d/f", Body: "3"}), codes: any},
		{name: "proc is a symlink", layer: tarLayer(t, tarEntry{Name: "proc", Type: '2', Link: b.guard}, tarEntry{Name: "dev", Type: '2', Link: "/etc"}, tarEntry{Name: "sys", Body: "file"}, tarEntry{Name: "tmp", Type: '2', Link: up}), codes: append([]int{diag.ExitStep, diag.ExitSandbox}, any...)},
		{name: "etc is a symlink", layer: tarLayer(t, tarEntry{Name: "etc", Type: '2', Link: b.guard}), codes: append([]int{diag.ExitStep, diag.ExitSandbox}, any...)},
		{name: "resolv.conf is a symlink out", layer: tarLayer(t, tarEntry{Name: "etc/resolv.conf", Type: '2', Link: up + b.guard + "/new"}, tarEntry{Name: "etc/hosts", Type: '2', Link: "/proc/self/exe"}, tarEntry{Name: "etc/hostname", Type: '3', Major: 1, Minor: 5}), codes: append([]int{diag.ExitStep, diag.ExitSandbox}, any...)},
		{name: "passwd is endless", layer: tarLayer(t, tarEntry{Name: "etc/passwd", Type: '2', Link: "/dev/zero"}, tarEntry{Name: "etc/group", Type: '6'}), codes: any},
		{name: "garbage", layer: rawLayer([]byte(big)), codes: bad, says: []string{`layer|blob|sha256`}},
		{name: "nothing", layer: rawLayer(nil), codes: any},
		{name: "truncated", layer: rawLayer(gz(t, []byte(big))[:500]), codes: bad},
	} {
		t.Run(c.name, func(t *testing.T) {
			ref := fmt.Sprintf("%s/evil:%d", b.Host, i)
			pushLayers(t, ref, c.layer)
			hostile{
				dockerfile: "FROM " + ref + "\nCOPY Dockerfile /link/D\nRUN cat /ok /etc/resolv.conf /link/new3 2>/dev/null; ls / > /l\nUSER nobody\nCOPY --chown=nobody Dockerfile /d/E\n",
				codes:      c.codes, says: c.says,
			}.run(t, b)
		})
	}
}

func manyDevices() (all []tarEntry) {
	for i := range 20000 {
		all = append(all, tarEntry{Name: fmt.Sprint("d/", i), Type: "34"[i%2], Major: int64(i), Minor: int64(i)})
	}
	return all
}

// TestLyingRegistry: answers that are not what was asked for.
func TestLyingRegistry(t *testing.T) {
	guard(t)
	t.Parallel() // it waits for retries most of the time
	bed := kilnrun.Open(t, busybox)
	reg := registrytest.New(t, registrytest.Options{})
	pushBases(t, reg.Host(), busybox)
	dir := files{"Dockerfile": "FROM " + reg.Host() + "/" + busybox + "\nRUN echo fine > /fine\n"}.write(t, filepath.Join(bed.Dir, "context"))
	answer := func(status int, contentType, body string) func(http.ResponseWriter, *http.Request, http.Handler) {
		return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
			w.Header().Set("Content-Type", contentType)
			w.WriteHeader(status)
			_, _ = io.WriteString(w, body)
		}
	}
	const oci = "application/vnd.oci.image.manifest.v1+json"
	img, err := compare.Open(reg.Host() + "/" + busybox)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := img.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	lie := func(change func(m *v1.Manifest)) func(http.ResponseWriter, *http.Request, http.Handler) {
		var m v1.Manifest
		if err := json.Unmarshal(raw, &m); err != nil {
			t.Fatal(err)
		}
		change(&m)
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return answer(200, oci, string(b))
	}
	endless := func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		w.Header().Set("Content-Type", oci)
		for chunk := bytes.Repeat([]byte("[{"), 1<<15); r.Context().Err() == nil; {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	}
	const manifest, blobs = "/manifests/", "/blobs/"
	pull := []int{diag.ExitRegistry, diag.ExitFailure}
	for i, c := range []struct {
		name  string
		fault registrytest.Fault
		codes []int
		says  string
		args  []string
	}{
		{name: "layer is larger", fault: registrytest.Fault{Method: "GET", Path: manifest, Serve: lie(func(m *v1.Manifest) { m.Layers[0].Size++ })}, codes: pull, says: "sha256:"},
		{name: "layer is smaller", fault: registrytest.Fault{Method: "GET", Path: manifest, Serve: lie(func(m *v1.Manifest) { m.Layers[0].Size-- })}, codes: pull, says: "sha256:"},
		{name: "layer is negative", fault: registrytest.Fault{Method: "GET", Path: manifest, Serve: lie(func(m *v1.Manifest) { m.Layers[0].Size = -5 })}, codes: pull, says: "size|negative"},
		{name: "layer is 1 EiB", fault: registrytest.Fault{Method: "GET", Path: manifest, Serve: lie(func(m *v1.Manifest) { m.Layers[0].Size = 1 << 60 })}, codes: pull, says: "sha256:|size"},
		{name: "config is 1 EiB", fault: registrytest.Fault{Method: "GET", Path: manifest, Serve: lie(func(m *v1.Manifest) { m.Config.Size = 1 << 60 })}, codes: pull, says: "config"},
		{name: "config is a layer", fault: registrytest.Fault{Method: "GET", Path: manifest, Serve: lie(func(m *v1.Manifest) { m.Config = m.Layers[0] })}, codes: pull, says: "not a container image"},
		{name: "layer is a config", fault: registrytest.Fault{Method: "GET", Path: manifest, Serve: lie(func(m *v1.Manifest) { m.Layers[0] = m.Config })}, codes: pull, says: "."},
		{name: "layers are many", fault: registrytest.Fault{Method: "GET", Path: manifest, Serve: lie(func(m *v1.Manifest) {
			for range 5000 {
				m.Layers = append(m.Layers, m.Layers[0])
			}
		})}, codes: pull, says: "layers"},
		{name: "digest with a path", fault: registrytest.Fault{Method: "GET", Path: manifest, Serve: answer(200, oci, `{"schemaVersion":2,"mediaType":"`+oci+`","config":{"digest":"sha256:../../../../../../../etc/passwd","size":1},"layers":[]}`)}, codes: pull, says: "digest"},
		{name: "manifest is a page", fault: registrytest.Fault{Method: "GET", Path: manifest, Serve: answer(200, "text/html", "<html>log in here</html>")}, codes: pull, says: "busybox"},
		{name: "manifest is null", fault: registrytest.Fault{Method: "GET", Path: manifest, Serve: answer(200, oci, "null")}, codes: pull, says: "busybox"},
		{name: "manifest is deep", fault: registrytest.Fault{Method: "GET", Path: manifest, Serve: answer(200, oci, strings.Repeat("[", 1<<20))}, codes: pull, says: "busybox"},
		{name: "manifest never ends", fault: registrytest.Fault{Method: "GET", Path: manifest, Serve: endless}, codes: pull, says: "busybox"},
		{name: "blob never ends", fault: registrytest.Fault{Method: "GET", Path: blobs, Serve: endless}, codes: pull, says: "sha256:"},
		{name: "blobs are wrong", fault: registrytest.Fault{Method: "GET", Path: blobs, Serve: answer(200, "application/octet-stream", "wrong")}, codes: pull, says: "sha256:"},
		{name: "layer is wrong", fault: registrytest.Fault{Method: "GET", Path: blobs, Skip: 1, Serve: answer(200, "application/octet-stream", strings.Repeat("w", 5000))}, codes: []int{diag.ExitRegistry}, says: "sha256:"},
		{name: "redirects for ever", fault: registrytest.Fault{Method: "GET", Path: blobs, Serve: func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
			http.Redirect(w, r, r.URL.Path+"?again=1", http.StatusTemporaryRedirect)
		}}, codes: pull, says: "redirect"},
		{name: "redirects to a file", fault: registrytest.Fault{Method: "GET", Path: blobs, Serve: func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
			w.Header().Set("Location", "file:///etc/passwd")
			w.WriteHeader(http.StatusTemporaryRedirect)
		}}, codes: pull, says: "."},
		{name: "manifest stalls", fault: registrytest.Fault{Method: "GET", Path: manifest, Stall: true}, codes: []int{diag.ExitTimeout}, says: "Dockerfile:1: .*--timeout 3s", args: []string{"--timeout", "3s"}},
		{name: "layer stalls", fault: registrytest.Fault{Method: "GET", Path: blobs, Skip: 1, Stall: true}, codes: []int{diag.ExitTimeout}, says: "--timeout 3s", args: []string{"--timeout", "3s"}},
		{name: "layer stalls in the middle", fault: registrytest.Fault{Method: "GET", Path: blobs, Skip: 1, Serve: func(w http.ResponseWriter, r *http.Request, next http.Handler) {
			w.Header().Set("Content-Length", "1148646")
			_, _ = w.Write(make([]byte, 1000))
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}}, codes: []int{diag.ExitTimeout}, says: "--timeout 3s", args: []string{"--timeout", "3s"}},
		{name: "resets", fault: registrytest.Fault{Reset: true}, codes: pull, says: reg.Host()},
		{name: "layer resets always", fault: registrytest.Fault{Method: "GET", Path: blobs, Skip: 1, Truncate: true, After: 10}, codes: pull, says: "sha256:"},
		{name: "layer resets twice", fault: registrytest.Fault{Method: "GET", Path: blobs, Skip: 1, Times: 2, Truncate: true, After: 100000}, codes: []int{0}},
		{name: "push resets always", fault: registrytest.Fault{Method: "PUT", Path: blobs, Reset: true, After: 10}, codes: pull, says: "hostile"},
		{name: "push resets twice", fault: registrytest.Fault{Method: "PUT", Path: blobs, Times: 2, Reset: true, After: 10}, codes: []int{0}},
		{name: "tag is refused", fault: registrytest.Fault{Method: "PUT", Path: manifest, Status: 403, Body: `{"errors":[{"code":"DENIED","message":"\u001b[31mno\u0007"}]}`}, codes: pull, says: "DENIED|denied|no"},
		{name: "upload leads elsewhere", fault: registrytest.Fault{Method: "POST", Path: blobs, Serve: func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
			w.Header().Set("Location", "ftp://elsewhere/upload")
			w.WriteHeader(http.StatusAccepted)
		}}, codes: pull, says: "."},
		{name: "5xx twice", fault: registrytest.Fault{Times: 2, Status: 503, Body: "busy"}, codes: []int{0}},
	} {
		t.Run(c.name, func(t *testing.T) {
			reg.Heal()
			reg.Fail(c.fault)
			if out, code := run(t, bed.Runner, "prune", "--all", "--force"); code != 0 {
				t.Fatalf("prune: %s", out)
			}
			ref := fmt.Sprintf("%s/hostile:%d", reg.Host(), i)
			args := append([]string{"build", "--progress", "plain", "--push", "-t", ref}, c.args...)
			start := time.Now()
			out, code := run(t, bed.Runner, append(args, dir)...)
			reg.Heal()
			t.Logf("exit code %d after %.1f s: %s", code, time.Since(start).Seconds(), lastError(out))
			if !slices.Contains(c.codes, code) {
				t.Errorf("exit code %d, not one of %v:\n%s", code, c.codes, out)
			}
			if strings.ContainsAny(out, "\x1b\x07") {
				t.Errorf("control characters from outside are printed: %q", out)
			}
			if code == 0 {
				if got := rootfs(t, ref)["/fine"].Data; got != "fine\n" {
					t.Errorf("the image has %q", got)
				}
				return
			}
			want(t, lastError(out), code, code, `^ERROR: .`, c.says)
			notPushed(t, ref)
			if out, code := run(t, bed.Runner, append(args, dir)...); code != 0 {
				t.Errorf("healed, the next build exits with %d:\n%s", code, out)
			}
		})
	}
}
