package source

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/tree"
)

const dockerfile = "FROM scratch\nCOPY a /\n"

func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for p, c := range files {
		host := filepath.Join(dir, p)
		err := os.MkdirAll(filepath.Dir(host), 0o755)
		if target, ok := strings.CutPrefix(c, "-> "); err == nil && ok {
			err = os.Symlink(target, host)
		} else if err == nil {
			err = os.WriteFile(host, []byte(c), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func tarOf(t *testing.T, files map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for p, c := range files {
		if err := w.WriteHeader(&tar.Header{Name: p, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(c))}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, c); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func open(t *testing.T, o Options) (*Context, error) {
	t.Helper()
	if o.ScratchDir == "" {
		o.ScratchDir = t.TempDir()
	}
	c, err := Open(context.Background(), o)
	if err == nil {
		t.Cleanup(func() {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			if es, _ := os.ReadDir(o.ScratchDir); len(es) != 0 {
				t.Errorf("%s is left after Close", es[0].Name())
			}
		})
	} else if es, _ := os.ReadDir(o.ScratchDir); len(es) != 0 {
		t.Errorf("%s is left after an error", es[0].Name())
	}
	return c, err
}

func read(t tree.Tree, p string) string {
	r, err := t.Open(p)
	if errors.Is(err, fs.ErrNotExist) {
		return "-"
	}
	if err != nil {
		return err.Error()
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// want says what there is to be in a context; "-" is nothing.
type want struct {
	kind                        Kind
	name, dockerfile, ignore, a string
}

func check(t *testing.T, c *Context, w want) {
	t.Helper()
	got := want{c.Kind, c.DockerfileName, read(c.DockerfileTree, c.DockerfileName), read(c.DockerfileTree, c.DockerfileName+".dockerignore"), read(c.Tree, "a")}
	if got != w {
		t.Errorf("got %+v, want %+v", got, w)
	}
	if c.Ignore != (c.Kind == Local) {
		t.Errorf("Ignore is %v for %s", c.Ignore, c.Kind)
	}
	if w.a != "-" && c.Kind != Archive {
		if d, err := tree.ContentDigest(c.Tree, "a"); err != nil || d != digest.FromString(w.a) {
			t.Errorf("digest %s, %v", d, err)
		}
	}
}

func TestDirectory(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"ctx/Dockerfile": dockerfile, "ctx/a": "A", "ctx/.dockerignore": "b", "ctx/Dockerfile.dockerignore": "own",
		"ctx/sub/other.Dockerfile": "FROM other\n", "ctx/sub/other.Dockerfile.dockerignore": "other's",
		"ctx/link": "-> sub/other.Dockerfile", "ctx/abs": "-> /sub/other.Dockerfile", "ctx/sub/up": "-> ../Dockerfile",
		"elsewhere/Dockerfile": "FROM elsewhere\n", "elsewhere/to-ctx": "-> ../ctx/Dockerfile", "elsewhere/near": "-> Dockerfile",
		"lower/dockerfile": "FROM lower\n", "lower/a": "A", "empty/Dockerfile": "", "empty/a": "A",
		"here": "-> ctx",
	})
	for _, tc := range []struct {
		name, arg, file string
		want            want
	}{
		{"the usual place", "ctx", "", want{Local, "Dockerfile", dockerfile, "own", "A"}},
		{"through a link", "here", "", want{Local, "Dockerfile", dockerfile, "own", "A"}},
		{"named", "ctx", "ctx/sub/other.Dockerfile", want{Local, "other.Dockerfile", "FROM other\n", "other's", "A"}},
		{"named through a link to the directory", "ctx", "here/sub/other.Dockerfile", want{Local, "other.Dockerfile", "FROM other\n", "other's", "A"}},
		{"outside", "ctx", "elsewhere/Dockerfile", want{Local, "Dockerfile", "FROM elsewhere\n", "-", "A"}},
		{"outside, a link", "ctx", "elsewhere/near", want{Local, "near", "FROM elsewhere\n", "-", "A"}},
		{"above", "ctx/sub", "ctx/Dockerfile", want{Local, "Dockerfile", dockerfile, "own", "-"}},
		{"link in the context", "ctx", "ctx/link", want{Local, "link", "FROM other\n", "-", "A"}},
		{"absolute link in the context", "ctx", "ctx/abs", want{Local, "abs", "FROM other\n", "-", "A"}},
		{"link upwards in the context", "ctx", "ctx/sub/up", want{Local, "up", dockerfile, "-", "A"}},
		{"lower case", "lower", "", want{Local, "dockerfile", "FROM lower\n", "-", "A"}},
		{"lower case, named", "lower", "lower/Dockerfile", want{Local, "dockerfile", "FROM lower\n", "-", "A"}},
		{"empty", "empty", "", want{Local, "Dockerfile", "", "-", "A"}},
		{"standard input", "ctx", "-", want{Local, "Dockerfile", "FROM stdin\n", "-", "A"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := Options{Arg: filepath.Join(dir, tc.arg), Dockerfile: tc.file, Stdin: strings.NewReader("FROM stdin\n")}
			if tc.file != "" && tc.file != "-" {
				o.Dockerfile = filepath.Join(dir, tc.file)
			}
			c, err := open(t, o)
			if err != nil {
				t.Fatal(err)
			}
			check(t, c, tc.want)
		})
	}
	t.Run("relative paths", func(t *testing.T) {
		t.Chdir(dir)
		for _, o := range []Options{{Arg: "ctx"}, {Arg: "./ctx/."}, {Arg: "ctx", Dockerfile: "ctx/Dockerfile"}, {Arg: "ctx", Dockerfile: "./elsewhere/../ctx/Dockerfile"}} {
			c, err := open(t, o)
			if err != nil {
				t.Fatal(err)
			}
			check(t, c, want{Local, "Dockerfile", dockerfile, "own", "A"})
		}
	})
}

func TestDirectoryErrors(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"empty/a": "A", "outside": "secret", "linked/Dockerfile": "-> ../outside", "linked2/Dockerfile": "-> " + dir + "/outside",
		"loop/Dockerfile": "-> Dockerfile", "directory/Dockerfile/x": "", "big/Dockerfile": strings.Repeat("#", MaxDockerfile+1),
		"ignore/Dockerfile": "", "ignore/Dockerfile.dockerignore/x": "",
	})
	for _, tc := range []struct {
		name, arg, file, err, hint string
		code                       int
	}{
		{"no argument", "", "", "no build context", "directory", diag.ExitUsage},
		{"nothing there", "nowhere", "", `"nowhere"`, "URLs", diag.ExitUsage},
		{"a file", "outside", "", "not a directory", "-f", diag.ExitUsage},
		{"no Dockerfile", "empty", "", `"Dockerfile" (or "dockerfile") in "empty"`, "-f", diag.ExitDockerfile},
		{"none of that name", "empty", "empty/x", `"x" in "empty/"`, "-f", diag.ExitDockerfile},
		{"no such directory", "empty", "nowhere/x", "nowhere", "-f", diag.ExitDockerfile},
		{"link out of the context", "linked", "", "no file", "symbolic link", diag.ExitDockerfile},
		{"absolute link out of the context", "linked2", "", "no file", "symbolic link", diag.ExitDockerfile},
		{"link out of its directory", "empty", "linked/Dockerfile", "no file", "symbolic link", diag.ExitDockerfile},
		{"loop", "loop", "", "too many symbolic links", "", diag.ExitDockerfile},
		{"directory", "directory", "", "not a regular file", "", diag.ExitDockerfile},
		{"too big", "big", "", "more than", "", diag.ExitDockerfile},
		{"ignore file is none", "ignore", "", "not a regular file", "", diag.ExitDockerfile},
		{"both from standard input", "-", "-", "both", "", diag.ExitUsage},
		{"bad git URL", "https://example.invalid/x.git#-x", "", "invalid ref", "", diag.ExitUsage},
		{"odd URL", "ftp://example.invalid/x", "", "no URL either", "", diag.ExitUsage},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Chdir(dir)
			_, err := open(t, Options{Arg: tc.arg, Dockerfile: tc.file})
			var d *diag.Error
			if !errors.As(err, &d) || !strings.Contains(err.Error(), tc.err) || !strings.Contains(d.Hint, tc.hint) || diag.ExitCode(err) != tc.code {
				t.Errorf("got %v (hint %q, code %d), want %q (hint %q, code %d)", err, d.Hint, diag.ExitCode(err), tc.err, tc.hint, tc.code)
			}
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Errorf("%v shows a file", err)
			}
		})
	}
}

func TestStdin(t *testing.T) {
	files := map[string]string{"Dockerfile": dockerfile, "a": "A", "sub/x": "FROM x\n", ".dockerignore": "a"}
	plain := tarOf(t, files)
	var gz bytes.Buffer
	w := gzip.NewWriter(&gz)
	_, _ = w.Write(plain)
	w.Close()
	archived := want{Archive, "Dockerfile", dockerfile, "-", "A"}
	for _, tc := range []struct {
		name, file string
		in         []byte
		want       want
	}{
		{"tar", "", plain, archived},
		{"compressed tar", "", gz.Bytes(), archived},
		{"tar with another Dockerfile", "sub/x", plain, want{Archive, "sub/x", "FROM x\n", "-", "A"}},
		{"tar with another Dockerfile, by an odd name", "/sub/../sub/x", plain, want{Archive, "sub/x", "FROM x\n", "-", "A"}},
		{"Dockerfile", "", []byte(dockerfile), want{Bare, "Dockerfile", dockerfile, "-", "-"}},
		{"long Dockerfile", "", bytes.Repeat([]byte("# comment\n"), 1000), want{Bare, "Dockerfile", strings.Repeat("# comment\n", 1000), "-", "-"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			// As slow as a terminal: what it is must not depend on how it comes.
			c, err := open(t, Options{Arg: "-", Dockerfile: tc.file, Stdin: iotest.OneByteReader(bytes.NewReader(tc.in))})
			if err != nil {
				t.Fatal(err)
			}
			check(t, c, tc.want)
		})
	}
	for _, tc := range []struct {
		name, file, err string
		in              io.Reader
		lim             layer.Limits
	}{
		{"nothing", "", "nothing in it", strings.NewReader(""), layer.Limits{}},
		{"no reader", "", "nothing in it", nil, layer.Limits{}},
		{"two Dockerfiles", "x", "by -f too", strings.NewReader(dockerfile), layer.Limits{}},
		{"tar without it", "x", `"x" in tar from standard input`, bytes.NewReader(plain), layer.Limits{}},
		{"damaged", "", "gzip", bytes.NewReader(gz.Bytes()[:gz.Len()/2]), layer.Limits{}},
		{"too many files", "", "MaxEntries", bytes.NewReader(plain), layer.Limits{MaxEntries: 2}},
		{"unreadable", "", "broken pipe", iotest.ErrReader(errors.New("broken pipe")), layer.Limits{}},
		{"too long", "", "more than", io.LimitReader(endless{}, MaxDockerfile+100), layer.Limits{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := open(t, Options{Arg: "-", Dockerfile: tc.file, Stdin: tc.in, Limits: tc.lim})
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("got %v, want %q", err, tc.err)
			}
		})
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return copy(p, bytes.Repeat([]byte("#"), len(p))), nil }

func TestHTTP(t *testing.T) {
	plain := tarOf(t, map[string]string{"Dockerfile": dockerfile, "a": "A", "sub/Dockerfile": "FROM sub\n"})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/x.tar":
			_, _ = w.Write(plain)
		case "/Dockerfile":
			w.Header().Set("Last-Modified", "Fri, 13 Feb 2009 23:31:30 GMT")
			_, _ = io.WriteString(w, dockerfile)
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	defer s.Close()
	url := strings.Replace(s.URL, "http://", "http://me:SECRET@", 1)

	c, err := open(t, Options{Arg: url + "/x.tar?sig=SECRET"})
	if err != nil {
		t.Fatal(err)
	}
	check(t, c, want{Archive, "Dockerfile", dockerfile, "-", "A"})
	if strings.Contains(c.Description, "SECRET") || !strings.Contains(c.Description, "/x.tar") {
		t.Errorf("described as %s", c.Description)
	}
	if c, err = open(t, Options{Arg: url + "/x.tar", Dockerfile: "sub/Dockerfile"}); err != nil {
		t.Fatal(err)
	}
	check(t, c, want{Archive, "sub/Dockerfile", "FROM sub\n", "-", "A"})

	if c, err = open(t, Options{Arg: url + "/Dockerfile"}); err != nil {
		t.Fatal(err)
	}
	check(t, c, want{Bare, "context", dockerfile, "-", "-"})
	if n, err := c.Tree.Lstat("context"); err != nil || n.Mode != tree.ModeRegular|0o600 || n.MTime.Unix() != 1234567890 || read(c.Tree, "context") != dockerfile {
		t.Errorf("context is %+v, %v", n, err)
	}

	// A directory with a Dockerfile from there, and the other way round.
	dir := t.TempDir()
	write(t, dir, map[string]string{"a": "A"})
	if c, err = open(t, Options{Arg: dir, Dockerfile: url + "/Dockerfile"}); err != nil {
		t.Fatal(err)
	}
	check(t, c, want{Local, "Dockerfile", dockerfile, "-", "A"})
	if c, err = open(t, Options{Arg: url + "/x.tar", Dockerfile: "-", Stdin: strings.NewReader("FROM stdin\n")}); err != nil {
		t.Fatal(err)
	}
	check(t, c, want{Archive, "Dockerfile", "FROM stdin\n", "-", "A"})

	for arg, want := range map[string]string{url + "/nowhere?SECRET": "404", url + "/x.tar?SECRET": "too many bytes|larger than"} {
		_, err := open(t, Options{Arg: arg, Limits: layer.Limits{MaxBytes: 600}})
		ok := false
		for w := range strings.SplitSeq(want, "|") {
			ok = ok || err != nil && strings.Contains(err.Error(), w)
		}
		if !ok || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%s: %v", arg, err)
		}
	}
}

// TestDates: a context's time is what the server said, else that of its youngest file.
func TestDates(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []*tar.Header{
		{Name: "Dockerfile", Typeflag: tar.TypeReg, Mode: 0o644, ModTime: time.Unix(300, 0)},
		{Name: "a", Typeflag: tar.TypeReg, Mode: 0o644, ModTime: time.Unix(500, 0)},
		{Name: "dir", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: time.Unix(900, 0)},
		{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "a", ModTime: time.Unix(800, 0)},
	} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/dated") {
			w.Header().Set("Last-Modified", time.Unix(1234567890, 0).UTC().Format(http.TimeFormat))
		}
		if strings.HasSuffix(r.URL.Path, ".tar") {
			_, _ = w.Write(b.Bytes())
			return
		}
		_, _ = io.WriteString(w, dockerfile)
	}))
	defer s.Close()
	dir := t.TempDir()
	write(t, dir, map[string]string{"Dockerfile": dockerfile})
	for _, c := range []struct {
		o    Options
		want time.Time
	}{
		{Options{Arg: dir}, time.Time{}},
		{Options{Arg: "-", Stdin: bytes.NewReader(b.Bytes())}, time.Unix(500, 0)},
		{Options{Arg: s.URL + "/x.tar"}, time.Unix(500, 0)},
		{Options{Arg: s.URL + "/dated.tar"}, time.Unix(1234567890, 0)},
		{Options{Arg: s.URL + "/dated"}, time.Unix(1234567890, 0)},
		{Options{Arg: s.URL + "/x"}, time.Time{}},
	} {
		got, err := open(t, c.o)
		if err != nil {
			t.Fatal(err)
		}
		if !got.Date.Equal(c.want) {
			t.Errorf("%s: %v instead of %v", c.o.Arg, got.Date, c.want)
		}
	}
}

func TestGit(t *testing.T) {
	bin, err := exec.LookPath("git")
	if err != nil {
		t.Skip("no git here")
	}
	root := t.TempDir()
	write(t, root, map[string]string{"r.git/Dockerfile": dockerfile, "r.git/a": "A", "r.git/sub/Dockerfile": "FROM sub\n", "r.git/.dockerignore": "a"})
	for _, args := range [][]string{{"init", "-q"}, {"add", "-A"}, {"commit", "-qm", "x"}} {
		cmd := exec.Command(bin, append([]string{"-c", "user.name=a", "-c", "user.email=a@b"}, args...)...)
		cmd.Dir = filepath.Join(root, "r.git")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	s := httptest.NewServer(&cgi.Handler{Path: bin, Args: []string{"http-backend"}, InheritEnv: []string{"PATH"}, Stderr: io.Discard, Env: []string{
		"GIT_PROJECT_ROOT=" + root, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*",
	}})
	defer s.Close()
	url := strings.Replace(s.URL, "http://", "http://me:SECRET@", 1) + "/r.git"
	for _, tc := range []struct {
		arg, file string
		want      want
	}{
		{url, "", want{Git, "Dockerfile", dockerfile, "-", "A"}},
		{url, "sub/Dockerfile", want{Git, "sub/Dockerfile", "FROM sub\n", "-", "A"}},
		{url + "#:sub", "", want{Git, "Dockerfile", "FROM sub\n", "-", "-"}},
	} {
		c, err := open(t, Options{Arg: tc.arg, Dockerfile: tc.file, Env: os.Environ()})
		if err != nil {
			t.Fatal(err)
		}
		check(t, c, tc.want)
		if strings.Contains(c.Description, "SECRET") || !strings.Contains(c.Description, "(commit ") {
			t.Errorf("described as %s", c.Description)
		}
	}
	var d *diag.Error
	if _, err := open(t, Options{Arg: url, Dockerfile: "nowhere", Env: os.Environ()}); !errors.As(err, &d) || !strings.Contains(err.Error(), `"nowhere" in http`) || strings.Contains(err.Error(), "SECRET") {
		t.Errorf("no Dockerfile: %v", err)
	}
}

// TestPathBeforeURL: what is there is a path, whatever else it could be.
func TestPathBeforeURL(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"github.com/a/b/Dockerfile": dockerfile, "github.com/a/b/a": "A", "git@host:x/Dockerfile": dockerfile, "git@host:x/a": "A"})
	t.Chdir(dir)
	for _, arg := range []string{"github.com/a/b", "git@host:x"} {
		c, err := open(t, Options{Arg: arg})
		if err != nil {
			t.Fatal(err)
		}
		check(t, c, want{Local, "Dockerfile", dockerfile, "-", "A"})
	}
	_, err := open(t, Options{Arg: "github.com/a/c", Env: []string{"PATH="}})
	if err == nil || !strings.Contains(err.Error(), "no git program") {
		t.Errorf("a path that is not there is not taken for a repository: %v", err)
	}
}
