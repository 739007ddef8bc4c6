package cli

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/kiln-build/kiln/internal/cli/console"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/registryserver"
	"github.com/kiln-build/kiln/internal/sandbox/gvisor"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/kiln-build/kiln/internal/tree"
	"github.com/rogpeppe/go-internal/testscript"
)

var update = flag.Bool("update", false, "write golden files and the command reference anew")

func TestMain(m *testing.M) {
	// The sandbox of 'kiln info' and 'kiln build' is this program, run again.
	if code, ok := gvisor.Main(os.Args); ok {
		os.Exit(code)
	}
	testscript.Main(m, map[string]func(){
		"kiln": func() {
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			context.AfterFunc(ctx, stop)
			os.Exit(Main(ctx, os.Args, console.Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}))
		},
	})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		UpdateScripts:       *update,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("HOME", filepath.Join(env.WorkDir, "home"))
			env.Setenv("KILN_ROOT", filepath.Join(env.WorkDir, "store"))
			env.Setenv("DOCKER_CONFIG", filepath.Join(env.WorkDir, "docker"))
			env.Setenv("XDG_DATA_HOME", "")
			env.Setenv("XDG_RUNTIME_DIR", "")
			return os.MkdirAll(filepath.Join(env.WorkDir, "docker"), 0o700)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"mkimage":  cmdMkimage,
			"registry": cmdRegistry,
			"exits":    cmdExits,
			"mklayout": cmdMklayout,
			"get":      cmdGet,
		},
	})
}

// cmdExits runs kiln and wants an exit code: exits CODE ARGS...
func cmdExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: exits CODE ARGS...")
	}
	err := ts.Exec("sh", append([]string{"-c", `kiln "$@"; code=$?; [ $code = "$0" ] || { echo "exit code $code" >&2; exit 1; }`}, args...)...)
	if err != nil {
		ts.Fatalf("kiln %s: not exit code %s", strings.Join(args[1:], " "), args[0])
	}
}

// cmdRegistry runs a registry and puts its address into REGISTRY. With "auth" it
// wants user "u" with password "p".
func cmdRegistry(ts *testscript.TestScript, _ bool, args []string) {
	h, err := registryserver.NewHandler(registryserver.Options{Root: ts.MkAbs("registry-content")})
	ts.Check(err)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); len(args) > 0 && (user != "u" || password != "p") {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
			return
		}
		h.ServeHTTP(w, r)
	}))
	ts.Defer(func() {
		s.Close()
		_ = h.Close()
	})
	ts.Setenv("REGISTRY", strings.TrimPrefix(s.URL, "http://"))
}

// cmdMkimage puts an image into the store: mkimage NAME TEXT...; TEXT is the
// content of a file in a layer of its own.
func cmdMkimage(ts *testscript.TestScript, _ bool, args []string) {
	ts.Check(mkimage(ts.Getenv("KILN_ROOT"), args[0], args[1:]))
}

func mkimage(root, name string, texts []string) error {
	ctx := context.Background()
	st, err := store.Open(root)
	if err != nil {
		return err
	}
	created := time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC)
	opt := image.AssembleOptions{Epoch: &created}
	var history, diffIDs []string
	for i, text := range texts {
		l, err := image.Commit(ctx, st, image.CommitOptions{Compression: layer.Gzip}, func(w io.Writer) error {
			tw := layer.NewTarWriter(w)
			n := tree.Node{Mode: tree.ModeRegular | 0o644, Size: int64(len(text)), MTime: created}
			err := tw.Add(fmt.Sprintf("file%d", i), n, "", func() (io.ReadCloser, error) {
				return io.NopCloser(strings.NewReader(text)), nil
			})
			if err != nil {
				return err
			}
			return tw.Close()
		})
		if err != nil {
			return err
		}
		by := fmt.Sprintf("COPY file%d /file%d # buildkit", i, i)
		opt.Layers = append(opt.Layers, image.NewLayer{Layer: l, Created: &created, CreatedBy: by})
		history = append(history, fmt.Sprintf(`{"created":"2020-01-02T03:04:05Z","created_by":%q,"comment":"buildkit.dockerfile.v0"}`, by))
		diffIDs = append(diffIDs, fmt.Sprintf("%q", l.DiffID))
	}
	history = append(history, `{"created":"2020-01-02T03:04:05Z","created_by":"CMD [\"/file0\"]","comment":"buildkit.dockerfile.v0","empty_layer":true}`)
	opt.Config = fmt.Appendf(nil, `{"created":"2020-01-02T03:04:05Z","architecture":"amd64","os":"linux",`+
		`"config":{"Env":["PATH=/bin","A=b"],"Cmd":["/file0"],"Labels":{"team":"red"}},`+
		`"rootfs":{"type":"layers","diff_ids":[%s]},"history":[%s]}`, strings.Join(diffIDs, ","), strings.Join(history, ","))
	img, err := image.Assemble(opt)
	if err != nil {
		return err
	}
	desc, err := image.Keep(st, img)
	if err != nil {
		return err
	}
	return image.Tag(st, desc, name)
}

// cmdMklayout makes an OCI layout, mklayout DIR NAME, with an image for two
// platforms and, as BuildKit writes it, an attestation.
func cmdMklayout(ts *testscript.TestScript, _ bool, args []string) {
	ts.Check(mklayout(ts.MkAbs(args[0]), args[1]))
}

func mklayout(dir, name string) error {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, arch := range []string{"amd64", "arm64"} {
		img, err := random.Image(1000, 2)
		if err != nil {
			return err
		}
		img = mutate.ConfigMediaType(mutate.MediaType(img, types.OCIManifestSchema1), types.OCIConfigJSON)
		cfg, err := img.ConfigFile()
		if err != nil {
			return err
		}
		cfg = cfg.DeepCopy()
		cfg.OS, cfg.Architecture = "linux", arch
		if img, err = mutate.ConfigFile(img, cfg); err != nil {
			return err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}},
		})
	}
	im, err := index.IndexManifest()
	if err != nil {
		return err
	}
	proof, err := mutate.AppendLayers(mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON),
		static.NewLayer([]byte(`{"predicate":{}}`), "application/vnd.in-toto+json"))
	if err != nil {
		return err
	}
	index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: proof, Descriptor: v1.Descriptor{
		Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"},
		Annotations: map[string]string{
			"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": im.Manifests[0].Digest.String(),
		},
	}})
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	return l.AppendIndex(index, layout.WithAnnotations(map[string]string{"io.containerd.image.name": name}))
}

// cmdGet gets a manifest from REGISTRY: get PATH FILE.
func cmdGet(ts *testscript.TestScript, neg bool, args []string) {
	req, err := http.NewRequest(http.MethodGet, "http://"+ts.Getenv("REGISTRY")+args[0], nil)
	ts.Check(err)
	req.Header.Set("Accept", string(types.OCIImageIndex)+", "+string(types.OCIManifestSchema1))
	resp, err := http.DefaultClient.Do(req)
	ts.Check(err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	ts.Check(err)
	if neg {
		if resp.StatusCode != http.StatusNotFound {
			ts.Fatalf("%s, and not 404", resp.Status)
		}
		return
	}
	if resp.StatusCode != http.StatusOK {
		ts.Fatalf("%s: %s", resp.Status, b)
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), b, 0o600))
}
