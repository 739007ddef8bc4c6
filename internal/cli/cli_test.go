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

	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/registryserver"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/kiln-build/kiln/internal/tree"
	"github.com/rogpeppe/go-internal/testscript"
)

var update = flag.Bool("update", false, "write golden files and the command reference anew")

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"kiln": func() {
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			context.AfterFunc(ctx, stop)
			os.Exit(Main(ctx, os.Args[1:], Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}))
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
