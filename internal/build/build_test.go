package build_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/registry/registrytest"
	"github.com/kiln-build/kiln/internal/sandbox/gvisor"
	"github.com/kiln-build/kiln/internal/source/remote"
	"github.com/kiln-build/kiln/internal/store"
)

func TestMain(m *testing.M) {
	if code, ok := gvisor.Main(os.Args); ok {
		os.Exit(code)
	}
	os.Exit(m.Run())
}

// world is a registry, a store and a build context.
type world struct {
	t      testing.TB
	reg    *registrytest.Registry
	env    build.Env
	dir    string
	base   string // reference of an image with a shell
	events *events
	stdout bytes.Buffer
}

// events remembers what ran.
type events struct {
	mu    sync.Mutex
	names map[int]string
	ran   map[int]bool
	done  map[int]progress.Event
	watch func(progress.Event)

	warned []string
}

func (e *events) Send(ev progress.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch ev.Kind {
	case progress.StepPlanned:
		e.names[ev.Step] = ev.Name
	case progress.Warning:
		e.warned = append(e.warned, ev.Text)
	case progress.StepStarted:
		e.ran[ev.Step] = true
	case progress.StepDone:
		e.done[ev.Step] = ev
		if ev.Cached {
			delete(e.ran, ev.Step)
		}
	}
	if e.watch != nil {
		e.watch(ev)
	}
}

// steps are those of the Dockerfile that were run and not found in the cache.
func (e *events) steps() (out []string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for n := range e.ran {
		if name := e.names[n]; strings.HasPrefix(name, "[") && !strings.HasPrefix(name, "[internal]") && !strings.Contains(name, " FROM ") {
			out = append(out, name[strings.Index(name, "] ")+2:])
		}
	}
	slices.Sort(out)
	return out
}

func (e *events) failed() (out []string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for n, d := range e.done {
		if d.Error != "" {
			out = append(out, e.names[n])
		}
	}
	return out
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, reg: registrytest.New(t, registrytest.Options{}), dir: t.TempDir()}
	w.fresh()
	w.base = w.reg.Host() + "/base:1"
	w.pushBase()
	w.fresh()
	return w
}

// fresh gives the world an empty store.
func (w *world) fresh() {
	w.t.Helper()
	st, err := store.Open(filepath.Join(w.t.TempDir(), "store"))
	if err != nil {
		w.t.Fatal(err)
	}
	reg, err := registry.New(registry.Options{Retry: registry.Retry{Tries: 1}})
	if err != nil {
		w.t.Fatal(err)
	}
	w.env = build.Env{Store: st, Registry: reg, Sandbox: gvisor.New(gvisor.Options{}), Stdout: &w.stdout}
}

// pushBase builds the base image, of a static busybox.
func (w *world) pushBase() {
	w.t.Helper()
	b, err := os.ReadFile("/bin/busybox")
	if err != nil {
		w.t.Skip("needs busybox-static: ", err)
	}
	dir := w.t.TempDir()
	put(w.t, dir, "busybox", string(b))
	put(w.t, dir, "passwd", "root:x:0:0::/root:/bin/sh\nalice:x:1000:1001::/home/alice:/bin/sh\n")
	put(w.t, dir, "group", "root:x:0:\nstaff:x:50:\n")
	install := `RUN ["/bin/busybox", "--install", "-s", "/bin"]`
	if raced {
		install = "WORKDIR /w"
	}
	put(w.t, dir, "Dockerfile", "FROM scratch\nCOPY --chmod=755 busybox /bin/busybox\nCOPY passwd group /etc/\n"+
		install+"\nENV FROM_BASE=yes\n")
	w.mustRun(build.Request{Context: dir, Tags: []string{w.base}, Outputs: []export.Spec{{Type: export.Registry}}})
}

func put(t testing.TB, dir, name, content string) {
	t.Helper()
	p := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// runs says that a test has RUN steps.
func runs(t *testing.T) {
	t.Helper()
	if raced {
		t.Skip("the sandbox cannot be a binary with the race detector")
	}
}

// request is a build of a Dockerfile; BASE in it is the base image.
func (w *world) request(dockerfile string, tags ...string) build.Request {
	w.t.Helper()
	put(w.t, w.dir, "Dockerfile", strings.ReplaceAll(dockerfile, " BASE", " "+w.base))
	return build.Request{Context: w.dir, Tags: tags, BuildArgs: map[string]string{}}
}

func (w *world) run(ctx context.Context, req build.Request) (*build.Result, error) {
	w.events = &events{names: map[int]string{}, ran: map[int]bool{}, done: map[int]progress.Event{}, watch: nil}
	w.env.Progress = progress.NewRecorder(w.events)
	if req.Compression == "" {
		req.Compression = layer.Gzip
	}
	return build.Run(ctx, w.env, req)
}

func (w *world) mustRun(req build.Request) *build.Result {
	w.t.Helper()
	res, err := w.run(context.Background(), req)
	if err != nil {
		w.t.Fatal(err)
	}
	return res
}

// files builds and returns the files of the result, by name.
func (w *world) files(req build.Request) map[string]file {
	w.t.Helper()
	req.Outputs = []export.Spec{{Type: export.Tar, Dest: "-"}}
	w.stdout.Reset()
	w.mustRun(req)
	out := map[string]file{}
	for tr := tar.NewReader(&w.stdout); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			w.t.Fatal(err)
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			w.t.Fatal(err)
		}
		out[h.Name] = file{h, string(b)}
	}
}

type file struct {
	*tar.Header
	data string
}

func (w *world) tags() (names []string) {
	w.t.Helper()
	ts, err := w.env.Store.Tags()
	if err != nil {
		w.t.Fatal(err)
	}
	for _, tag := range ts {
		names = append(names, tag.Ref)
	}
	return names
}

func (w *world) inRegistry(ref string) bool {
	w.t.Helper()
	_, err := w.env.Registry.Digest(context.Background(), ref)
	return err == nil
}

// quiet checks at the end of a test that the build left no goroutine of its own
// and no open file. Connections to the registry are kept for the next one.
func quiet(t testing.TB) {
	t.Helper()
	count := func() (out []string) {
		buf := make([]byte, 1<<20)
		for g := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
			if strings.Contains(g, "kiln/internal/") && !strings.Contains(g, "kiln/internal/build_test") && !strings.Contains(g, "registryserver") {
				out = append(out, g)
			}
		}
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && !strings.HasPrefix(to, "socket:") && !strings.HasPrefix(to, "/proc/") {
				out = append(out, to)
			}
		}
		return out
	}
	before := count()
	t.Cleanup(func() {
		var after []string
		for range 100 {
			if after = count(); len(after) <= len(before) {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		t.Errorf("left behind:\n%s\nwas there before:\n%s", strings.Join(after, "\n"), strings.Join(before, "\n"))
	})
}

const stages = `FROM BASE AS build
WORKDIR /src
COPY in .
RUN cat in in > /out && echo built
FROM BASE
COPY --from=build --chown=alice:staff /out /app/out
RUN id -u > /uid && rm /etc/group && echo $FROM_BASE > /env
USER alice
RUN id -u > /tmp-uid 2>/dev/null || true
CMD ["cat", "/app/out"]
`

func TestBuildAndPush(t *testing.T) {
	runs(t)
	w := newWorld(t)
	put(t, w.dir, "in", "x")
	a, b, other := w.reg.Host()+"/team/app:1", w.reg.Host()+"/team/app:2", registrytest.New(t, registrytest.Options{}).Host()+"/app:3"
	req := w.request(stages, a, b, a, other)
	archive := filepath.Join(t.TempDir(), "app.tar")
	req.Outputs = []export.Spec{{Type: export.Image, Push: true, Names: []string{w.reg.Host() + "/extra"}}, {Type: export.OCI, Dest: archive}}
	res := w.mustRun(req)
	for _, ref := range []string{a, b, other, w.reg.Host() + "/extra:latest"} {
		d, err := w.env.Registry.Digest(context.Background(), ref)
		if err != nil || d.Digest != res.Digest {
			t.Errorf("%s is %v (%v), want %v", ref, d.Digest, err, res.Digest)
		}
		if !slices.Contains(w.tags(), ref) || !slices.Contains(res.Pushed, ref) {
			t.Errorf("%s is not in the store's tags %q, or not in %q", ref, w.tags(), res.Pushed)
		}
	}
	if fi, err := os.Stat(archive); err != nil || fi.Size() == 0 {
		t.Error(fi, err)
	}

	again := w.mustRun(req)
	if ran := w.events.steps(); again.Digest != res.Digest || len(ran) > 0 {
		t.Errorf("the second build ran %q and gave %s, not %s", ran, again.Digest, res.Digest)
	}

	fs := w.files(req)
	if f := fs["app/out"]; f.Header == nil || f.data != "xx" || f.Uid != 1000 || f.Gid != 50 {
		t.Errorf("app/out: %+v %q", f.Header, f.data)
	}
	if fs["uid"].data != "0\n" || fs["env"].data != "yes\n" || fs["etc/group"].Header != nil || fs["etc/passwd"].Header == nil {
		t.Errorf("uid %q env %q group %v", fs["uid"].data, fs["env"].data, fs["etc/group"].Header)
	}
}

// TestRebuiltStage: a stage that gives the same files as before goes no further.
func TestRebuiltStage(t *testing.T) {
	runs(t)
	w := newWorld(t)
	put(t, w.dir, "in", "x")
	w.mustRun(w.request(stages))
	put(t, w.dir, "comment", "changes nothing that is used")
	w.mustRun(w.request(stages))
	if ran := w.events.steps(); len(ran) > 0 {
		t.Errorf("ran %q", ran)
	}
	w.mustRun(w.request(strings.Replace(stages, "echo built", "echo built anew", 1)))
	if ran := w.events.steps(); !slices.Equal(ran, []string{"RUN cat in in > /out && echo built anew"}) {
		t.Errorf("ran %q", ran)
	}
	put(t, w.dir, "in", "y")
	w.mustRun(w.request(stages))
	if ran := w.events.steps(); len(ran) != 5 {
		t.Errorf("ran %q", ran)
	}
}

// TestNoCache: all steps run, though the last one would be found; and what they give is
// what the next build finds.
func TestNoCache(t *testing.T) {
	runs(t)
	w := newWorld(t)
	req := w.request("FROM BASE\nRUN cat /proc/sys/kernel/random/uuid > /id || head -c 16 /dev/urandom > /id\nWORKDIR /w\n")
	first := w.files(req)["id"].data
	if w.files(req)["id"].data != first || first == "" {
		t.Fatal("not cached")
	}
	req.NoCache = true
	second := w.files(req)["id"].data
	if second == first {
		t.Error("the step did not run")
	}
	req.NoCache = false
	if got := w.files(req)["id"].data; got != second {
		t.Error("the next build has another file than the last one")
	}
}

// TestSourceDateEpoch: two builds without anything in common give the same image.
func TestSourceDateEpoch(t *testing.T) {
	runs(t)
	w := newWorld(t)
	put(t, w.dir, "in", "x")
	req := w.request(stages, "app:1")
	req.BuildArgs["SOURCE_DATE_EPOCH"] = "1700000000"
	first := w.mustRun(req)
	for n, f := range w.files(req) {
		if f.ModTime.Unix() > 1700000000 {
			t.Errorf("%s is of %v", n, f.ModTime)
		}
	}
	w.fresh()
	time.Sleep(1100 * time.Millisecond)
	if err := os.Chtimes(filepath.Join(w.dir, "in"), time.Now(), time.Now()); err != nil {
		t.Fatal(err)
	}
	second := w.mustRun(req)
	if first.Digest != second.Digest || len(w.events.steps()) == 0 {
		t.Errorf("%s and %s", first.Digest, second.Digest)
	}
	if third := w.mustRun(req); third.Digest != first.Digest || len(w.events.steps()) != 0 {
		t.Errorf("%s and, from the cache, %s", first.Digest, third.Digest)
	}
	req.BuildArgs["SOURCE_DATE_EPOCH"] = "1600000000"
	if other := w.mustRun(req); other.Digest == first.Digest {
		t.Error("another time gives the same image")
	}
}

// TestErrors: each failing step gives one error with its line, once, and the right exit code.
func TestErrors(t *testing.T) {
	runs(t)
	w := newWorld(t)
	for _, c := range []struct {
		name, dockerfile, want string
		code                   int
		failed                 string
	}{
		{"step", "FROM BASE\nRUN true\nRUN exit 7\nRUN true\n", `Dockerfile:3: process "/bin/sh -c exit 7" did not complete successfully: exit code: 7`, diag.ExitStep, "RUN exit 7"},
		{"missing file", "FROM BASE\nCOPY nosuch /x\nRUN true\n", `Dockerfile:2: failed to calculate checksum: "/nosuch": not found`, diag.ExitDockerfile, "COPY nosuch /x"},
		{"missing in stage", "FROM BASE AS a\nFROM BASE\nCOPY --from=a /nosuch /x\nRUN true\n", `Dockerfile:3: "/nosuch": not found`, diag.ExitDockerfile, "COPY --from=a /nosuch /x"},
		{"command", "FROM BASE\nRUN [\"/nosuch\"]\n", "Dockerfile:2: ", diag.ExitStep, "RUN"},
		{"image", "FROM scratch\nCOPY --from=" + w.reg.Host() + "/nosuch /a /b\n", "Dockerfile:2: ", diag.ExitRegistry, ""},
		{"user", "FROM BASE\nUSER nobody-here\nRUN true\n", "Dockerfile:3: ", diag.ExitDockerfile, "RUN true"},
		{"parse", "FROM BASE\nRUNN true\n", "Dockerfile:2: unknown instruction", diag.ExitDockerfile, ""},
		{"in a stage", "FROM BASE AS a\nRUN exit 3\nFROM BASE\nRUN sleep 20\nCOPY --from=a /etc /e\n", "Dockerfile:2: ", diag.ExitStep, "RUN exit 3"},
		{"platform", "FROM --platform=linux/s390x BASE\nRUN true\n", "Dockerfile:", diag.ExitStep, "RUN"},
	} {
		t.Run(c.name, func(t *testing.T) {
			quiet(t)
			_, err := w.run(context.Background(), w.request(c.dockerfile, "failed:1"))
			if err == nil {
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), c.want) || strings.Count(err.Error(), "Dockerfile:") != 1 {
				t.Errorf("the error is %q, want %q", err, c.want)
			}
			if diag.ExitCode(err) != c.code {
				t.Errorf("exit code %d, want %d: %v", diag.ExitCode(err), c.code, err)
			}
			if c.failed != "" && !(len(w.events.failed()) == 1 && strings.Contains(w.events.failed()[0], c.failed)) {
				t.Errorf("shown as failed: %q, want %q", w.events.failed(), c.failed)
			}
			if len(w.tags()) > 0 {
				t.Errorf("tags %q", w.tags())
			}
		})
	}
}

// TestFailingOutputTagsNothing: whatever else goes well.
func TestFailingOutputTagsNothing(t *testing.T) {
	runs(t)
	w := newWorld(t)
	ref := w.reg.Host() + "/app:1"
	dir := t.TempDir()
	for _, c := range []struct {
		name    string
		outputs []export.Spec
		fault   *registrytest.Fault
	}{
		{"archive", []export.Spec{{Type: export.Image, Push: true}, {Type: export.OCI, Dest: filepath.Join(dir, "nosuch", "x.tar")}}, nil},
		{"files", []export.Spec{{Type: export.Image}, {Type: export.Local, Dest: filepath.Join(dir, "file", "x")}}, nil},
		{"upload", []export.Spec{{Type: export.Image, Push: true}}, &registrytest.Fault{Method: http.MethodPut, Path: "/blobs/uploads/", Status: http.StatusForbidden}},
		{"permission", []export.Spec{{Type: export.Image, Push: true}}, &registrytest.Fault{Method: http.MethodPost, Path: "/blobs/uploads/", Status: http.StatusForbidden}},
		{"manifest", []export.Spec{{Type: export.Image, Push: true}}, &registrytest.Fault{Method: http.MethodPut, Path: "/manifests/", Status: http.StatusForbidden}},
	} {
		t.Run(c.name, func(t *testing.T) {
			quiet(t)
			put(t, dir, "file", "")
			if c.fault != nil {
				w.reg.Fail(*c.fault)
				defer w.reg.Heal()
			}
			req := w.request("FROM BASE\nRUN echo "+c.name+" > /x\n", ref)
			req.Outputs = c.outputs
			_, err := w.run(context.Background(), req)
			if err == nil {
				t.Fatal("no error")
			}
			if c.fault != nil && diag.ExitCode(err) != diag.ExitRegistry {
				t.Errorf("exit code %d: %v", diag.ExitCode(err), err)
			}
			if len(w.tags()) > 0 || w.inRegistry(ref) {
				t.Errorf("tags %q, in the registry: %v", w.tags(), w.inRegistry(ref))
			}
			if es, err := os.ReadDir(dir); err != nil || len(es) != 1 {
				t.Errorf("left %v (%v)", es, err)
			}
		})
	}
}

// TestRefusedPushEndsTheBuild: and does not wait for its last step.
func TestRefusedPushEndsTheBuild(t *testing.T) {
	runs(t)
	w := newWorld(t)
	quiet(t)
	w.reg.Fail(registrytest.Fault{Method: http.MethodPost, Path: "/blobs/uploads/", Status: http.StatusForbidden})
	req := w.request("FROM BASE\nRUN true\nRUN sleep 60\n", w.reg.Host()+"/app:1")
	req.Outputs = []export.Spec{{Type: export.Registry}}
	began := time.Now()
	if _, err := w.run(context.Background(), req); diag.ExitCode(err) != diag.ExitRegistry || time.Since(began) > 30*time.Second {
		t.Errorf("after %v: %v", time.Since(began), err)
	}
}

func TestEndOfABuild(t *testing.T) {
	runs(t)
	w := newWorld(t)
	for _, c := range []struct {
		name   string
		change func(*build.Request, context.CancelCauseFunc)
		code   int
	}{
		{"timeout", func(r *build.Request, _ context.CancelCauseFunc) { r.Timeout = 1500 * time.Millisecond }, diag.ExitTimeout},
		{"interrupt", func(_ *build.Request, cancel context.CancelCauseFunc) {
			time.AfterFunc(1500*time.Millisecond, func() { cancel(diag.New(diag.ExitInterrupted, "interrupted")) })
		}, diag.ExitInterrupted},
	} {
		t.Run(c.name, func(t *testing.T) {
			quiet(t)
			ctx, cancel := context.WithCancelCause(context.Background())
			defer cancel(nil)
			req := w.request("FROM BASE AS a\nRUN sleep 61\nFROM BASE\nRUN sleep 62\nCOPY --from=a / /a\n", "never:1")
			c.change(&req, cancel)
			began := time.Now()
			_, err := w.run(ctx, req)
			if diag.ExitCode(err) != c.code || time.Since(began) > 20*time.Second {
				t.Errorf("after %v: exit code %d: %v", time.Since(began), diag.ExitCode(err), err)
			}
			if len(w.tags()) > 0 {
				t.Errorf("tags %q", w.tags())
			}
			if es, err := os.ReadDir(filepath.Join(w.env.Store.Root(), "tmp")); err != nil || len(es) > 0 {
				t.Errorf("left in the store: %v %v", es, err)
			}
		})
	}
}

func TestEmptyImages(t *testing.T) {
	w := newWorld(t)
	ctx := context.Background()
	for _, c := range []struct {
		name, dockerfile string
		layers           int
	}{
		{"scratch", "FROM scratch\n", 0},
		{"scratch with config", "FROM scratch\nLABEL a=b\nCMD [\"x\"]\n", 0},
		{"only FROM", "FROM BASE\n", 3},
		{"empty COPY", "FROM scratch\nCOPY empty /\n", 1},
		{"nothing matches", "FROM BASE\nCOPY --exclude=* empty /\n", 4},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := os.MkdirAll(filepath.Join(w.dir, "empty"), 0o755); err != nil {
				t.Fatal(err)
			}
			ref := w.reg.Host() + "/" + strings.ToLower(strings.ReplaceAll(c.name, " ", "-")) + ":1"
			req := w.request(c.dockerfile, ref)
			req.Outputs = []export.Spec{{Type: export.Image, Push: true}, {Type: export.Local, Dest: t.TempDir()}, {Type: export.Docker, Dest: filepath.Join(t.TempDir(), "a.tar")}}
			res := w.mustRun(req)
			img, err := w.env.Registry.Resolve(ctx, ref, ocispec.Platform{})
			if err != nil || img.Digest != res.Digest || len(img.Layers) != c.layers {
				t.Errorf("%v, %d layers, want %d (%v)", img, len(img.Layers), c.layers, err)
			}
			// And it can be built upon.
			put(t, w.dir, "f", "f")
			if got := w.files(w.request("FROM " + ref + "\nCOPY f /f\n"))["f"].data; got != "f" {
				t.Errorf("on top: %q", got)
			}
		})
	}
}

// TestLocalBase: an image of the store, which no registry has, is a base; also when its
// layer files are gone, or damaged.
func TestLocalBase(t *testing.T) {
	if raced {
		t.Skip("two images at once: BuildKit's withResolveCache sets a flag, always to true, in each call")
	}
	w := newWorld(t)
	put(t, w.dir, "f", "one")
	w.mustRun(w.request("FROM scratch\nCOPY f /f\n", "mine:1"))
	top := w.request("FROM mine:1\nCOPY f /g\nCOPY --from=mine:1 /f /h\n")
	check := func(when string) {
		t.Helper()
		if fs := w.files(top); fs["f"].data != "one" || fs["g"].data != "one" || fs["h"].data != "one" {
			t.Errorf("%s: %v", when, fs)
		}
	}
	check("at first")
	each := func(fn func(p string) error) {
		t.Helper()
		if err := filepath.WalkDir(filepath.Join(w.env.Store.Root(), "layers"), func(p string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			return fn(p)
		}); err != nil {
			t.Fatal(err)
		}
	}
	each(func(p string) error {
		if err := os.Chmod(p, 0o600); err != nil {
			return err
		}
		return os.Truncate(p, 4096)
	})
	top.NoCache = true
	check("with damaged layer files")
	each(os.Remove)
	check("without layer files")
	top.NoCache = false
	check("from the cache")
}

// TestLayouts: what type=oci,tar=false wrote is a context.
func TestLayouts(t *testing.T) {
	w := newWorld(t)
	put(t, w.dir, "f", "one")
	layout := filepath.Join(t.TempDir(), "layout")
	req := w.request("FROM scratch\nCOPY f /f\n", "x:1")
	req.Outputs = []export.Spec{{Type: export.OCI, Dest: layout, Dir: true}}
	w.mustRun(req)
	w.fresh()
	ref := w.reg.Host() + "/on-layout:1"
	req = w.request("FROM base\nCOPY f /g\n", ref)
	req.Contexts = map[string]string{"base": "oci-layout://" + layout + ":1"}
	if fs := w.files(req); fs["f"].data != "one" || fs["g"].data != "one" {
		t.Error(fs)
	}
	req.Outputs = []export.Spec{{Type: export.Registry}}
	w.mustRun(req)
	if !w.inRegistry(ref) {
		t.Error("not pushed")
	}
}

func TestSeveralPlatforms(t *testing.T) {
	w := newWorld(t)
	put(t, w.dir, "f", "one")
	ref := w.reg.Host() + "/multi:1"
	req := w.request("FROM scratch\nARG TARGETARCH\nCOPY f /f\nLABEL arch=$TARGETARCH\n", ref)
	req.Platforms = []ocispec.Platform{{OS: "linux", Architecture: "amd64"}, {OS: "linux", Architecture: "arm64"}}
	req.Outputs = []export.Spec{{Type: export.Image, Push: true}, {Type: export.OCI, Dest: filepath.Join(t.TempDir(), "a.tar")}}
	res := w.mustRun(req)
	for _, p := range req.Platforms {
		img, err := w.env.Registry.Resolve(context.Background(), ref, p)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(img.RawConfig), fmt.Sprintf(`"arch":%q`, p.Architecture)) || img.Digest != res.Digest {
			t.Errorf("%s: %s", p.Architecture, img.RawConfig)
		}
	}
	// A base of several platforms, each for its own.
	req = w.request("FROM "+ref+"\nCOPY f /g\n", w.reg.Host()+"/multi:2")
	req.Platforms = []ocispec.Platform{{OS: "linux", Architecture: "amd64"}, {OS: "linux", Architecture: "arm64"}}
	w.mustRun(req)
}

func TestRefusedRequests(t *testing.T) {
	w := newWorld(t)
	dig := "@sha256:" + strings.Repeat("a", 64)
	for name, change := range map[string]func(*build.Request){
		"tag with digest":  func(r *build.Request) { r.Tags = []string{"a:1" + dig} },
		"name with digest": func(r *build.Request) { r.Outputs = []export.Spec{{Type: export.Image, Names: []string{"a" + dig}}} },
		"no tag":           func(r *build.Request) { r.Tags = []string{"A B"} },
		"nowhere":          func(r *build.Request) { r.Tags, r.Outputs = nil, []export.Spec{{Type: export.Registry}} },
		"two to stdout": func(r *build.Request) {
			r.Outputs = []export.Spec{{Type: export.Tar, Dest: "-"}, {Type: export.OCI, Dest: "-"}}
		},
		"context": func(r *build.Request) { r.Contexts = map[string]string{"a": "ftp://x"} },
	} {
		t.Run(name, func(t *testing.T) {
			quiet(t)
			req := w.request("FROM scratch\n", "a:1")
			change(&req)
			if _, err := w.run(context.Background(), req); diag.ExitCode(err) != diag.ExitUsage {
				t.Error(err)
			}
		})
	}
}

// TestBuildsAtOnce: three builds of one Dockerfile at once, in one store.
func TestBuildsAtOnce(t *testing.T) {
	runs(t)
	w := newWorld(t)
	put(t, w.dir, "in", "x")
	req := w.request(stages, "a:1")
	req.Compression = layer.Gzip
	var wg sync.WaitGroup
	for range 3 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if _, err := build.Run(context.Background(), w.env, req); err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
}

// TestUnchangedContextIsNotRead: not of a filtered context either.
func TestUnchangedContextIsNotRead(t *testing.T) {
	w := newWorld(t)
	const size = 32 << 20
	put(t, w.dir, "big", strings.Repeat("0123456789abcdef", size/16))
	put(t, w.dir, ".dockerignore", "*.log\n")
	time.Sleep(3 * time.Second) // younger files are not trusted
	read := func() (n int64) {
		b, err := os.ReadFile("/proc/self/io")
		if err != nil {
			t.Skip(err)
		}
		if _, err := fmt.Sscanf(string(b), "rchar: %d", &n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	req := w.request("FROM scratch\nCOPY . /x/\n")
	before := read()
	w.mustRun(req)
	first := read() - before
	w.mustRun(req)
	if second := read() - before - first; first < size || second > size/8 {
		t.Errorf("read %d bytes at first, and then %d", first, second)
	}
}

// TestDescribed: what is known of a source is what is built from then on.
func TestDescribed(t *testing.T) {
	w := newWorld(t)
	content := "one"
	srv := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, content) }))
	t.Cleanup(srv.Close)
	b, err := build.Open(t.Context(), w.env, build.Inputs{})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	md, err := b.Describe(t.Context(), srv.URL+"/f", nil, remote.Ask{})
	if err != nil || md.HTTP.Digest != digest.FromString("one") {
		t.Fatalf("%+v, %v", md, err)
	}
	content = "two"
	src := must(t, (&pb.Op{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: srv.URL + "/f"}}}).Marshal)
	def := &frontend.Definition{Def: [][]byte{src, must(t, (&pb.Op{Inputs: []*pb.Input{{Digest: digest.FromBytes(src).String()}}}).Marshal)}}
	tr, err := b.Tree(t.Context(), def)
	if err != nil {
		t.Fatal(err)
	}
	f, err := tr.Open("f")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got, err := io.ReadAll(f); string(got) != "one" || err != nil {
		t.Errorf("built %q, %v", got, err)
	}
	if _, err := b.Describe(t.Context(), "docker-image://x", nil, remote.Ask{}); err == nil {
		t.Error("an image is described as something remote")
	}
}

func must(t *testing.T, marshal func() ([]byte, error)) []byte {
	t.Helper()
	b, err := marshal()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestAddURL: what a server has not changed is neither sent nor added again.
func TestAddURL(t *testing.T) {
	w := newWorld(t)
	content, etag, sent := "one", `"1"`, 0
	srv := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("ETag", etag)
		if r.Header.Get("If-None-Match") == etag {
			rw.WriteHeader(http.StatusNotModified)
			return
		}
		if r.Method == http.MethodGet {
			sent++
		}
		io.WriteString(rw, content)
	}))
	t.Cleanup(srv.Close)
	req := w.request("FROM BASE\nADD "+srv.URL+"/f /f\nCOPY Dockerfile /g\n", "x:1")
	w.mustRun(req)
	w.mustRun(req)
	if got := w.events.steps(); len(got) != 0 || sent != 1 {
		t.Errorf("unchanged: ran %q, sent %d times", got, sent)
	}
	content, etag = "two", `"2"`
	w.mustRun(req)
	if got := w.events.steps(); len(got) == 0 || sent != 2 {
		t.Errorf("changed: ran %q, sent %d times", got, sent)
	}
	etag = `"3"` // the same content again
	w.mustRun(req)
	if got := w.events.steps(); slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, "COPY") }) || sent != 3 {
		t.Errorf("sent again, but the same: ran %q, sent %d times", got, sent)
	}
	if f := w.files(req)["f"]; f.data != "two" || f.Mode&0o777 != 0o600 {
		t.Errorf("%+v", f)
	}
}
