package git

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/tree"
)

// server is a git server with the repositories that are in root.
type server struct {
	t    *testing.T
	root string
	url  string                 // http
	auth atomic.Pointer[string] // the Authorization header to insist on
	seen atomic.Value
}

func newServer(t *testing.T) *server {
	t.Helper()
	bin, err := exec.LookPath("git")
	if err != nil {
		t.Skip("no git here")
	}
	s := &server{t: t, root: t.TempDir()}
	backend := &cgi.Handler{Path: bin, Args: []string{"http-backend"}, Env: []string{
		"GIT_PROJECT_ROOT=" + s.root, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*",
	}, InheritEnv: []string{"PATH"}, Stderr: io.Discard}
	hs := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got := r.Header.Get("Authorization")
		s.seen.Store(got)
		if want := s.auth.Load(); want != nil && got != *want {
			w.Header().Set("WWW-Authenticate", "Basic")
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		if v := r.Header.Get("Git-Protocol"); v != "" {
			h := *backend
			h.Env = append(slices.Clone(h.Env), "GIT_PROTOCOL="+v)
			h.ServeHTTP(w, r)
			return
		}
		backend.ServeHTTP(w, r)
	}))
	t.Cleanup(hs.Close)
	s.url = hs.URL
	return s
}

// insist makes the server want an Authorization header.
func (s *server) insist(auth string) { s.auth.Store(&auth) }

// git runs git in a repository, as its author.
func (s *server) git(repo string, args ...string) string {
	s.t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = filepath.Join(s.root, repo)
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + s.root, "GIT_CONFIG_NOSYSTEM=1",
		"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@b", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@b",
		"GIT_AUTHOR_DATE=1234567890 +0000", "GIT_COMMITTER_DATE=1234567890 +0000",
		"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=protocol.file.allow", "GIT_CONFIG_VALUE_0=always",
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.t.Fatalf("git %q: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// repo makes a repository of files.
func (s *server) repo(name string, files ...string) {
	s.t.Helper()
	if err := os.MkdirAll(filepath.Join(s.root, name), 0o755); err != nil {
		s.t.Fatal(err)
	}
	s.git(name, "init", "-q", "-b", "trunk")
	s.commit(name, files...)
}

func (s *server) commit(name string, files ...string) string {
	s.t.Helper()
	for _, f := range files {
		p, content, _ := strings.Cut(f, "=")
		host := filepath.Join(s.root, name, p)
		if err := os.MkdirAll(filepath.Dir(host), 0o755); err != nil {
			s.t.Fatal(err)
		}
		if err := os.WriteFile(host, []byte(content), 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
	s.git(name, "add", "-A")
	s.git(name, "commit", "-q", "--allow-empty", "-m", "x")
	return s.git(name, "rev-parse", "HEAD")
}

func fetch(t *testing.T, url string, o Options) (*Tree, error) {
	t.Helper()
	r, err := Parse(url)
	if err != nil {
		t.Fatal(err)
	}
	if o.ScratchDir == "" {
		o.ScratchDir = t.TempDir()
	}
	if o.Env == nil {
		o.Env = os.Environ()
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	g, err := Fetch(ctx, r, o)
	if err != nil {
		if es, _ := os.ReadDir(o.ScratchDir); len(es) != 0 {
			t.Errorf("%s is left after an error", es[0].Name())
		}
		return nil, err
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
		if es, _ := os.ReadDir(o.ScratchDir); len(es) != 0 {
			t.Errorf("%s is left after Close", es[0].Name())
		}
	})
	return g, nil
}

func content(t *testing.T, g tree.Tree, p string) string {
	t.Helper()
	r, err := g.Open(p)
	if err != nil {
		return err.Error()
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func paths(t *testing.T, g tree.Tree) (ps []string) {
	t.Helper()
	if err := tree.Walk(g, ".", func(p string, _ tree.Node) error {
		ps = append(ps, p)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return ps
}

func TestRefs(t *testing.T) {
	s := newServer(t)
	s.repo("r.git", "f=first", "sub/g=in sub")
	first := s.git("r.git", "rev-parse", "HEAD")
	s.git("r.git", "tag", "-a", "-m", "x", "annotated")
	s.git("r.git", "tag", "light")
	s.git("r.git", "tag", "both")
	s.git("r.git", "update-ref", "refs/pull/42/head", first)
	second := s.commit("r.git", "f=second")
	s.git("r.git", "branch", "both")
	s.git("r.git", "branch", "feature/x+1")
	s.commit("r.git", "f=third")
	tag := s.git("r.git", "rev-parse", "annotated")
	for _, tc := range []struct{ suffix, want string }{
		{"", "third"},
		{"#trunk", "third"},
		{"#refs/heads/trunk", "third"},
		{"#heads/trunk", "third"},
		{"#light", "first"},
		{"#annotated", "first"},
		{"#refs/tags/annotated", "first"},
		{"#both", "second"}, // a branch comes before a tag
		{"?tag=both", "first"},
		{"#feature/x+1", "second"},
		{"#refs/pull/42/head", "first"},
		{"#pull/42/head", "first"},
		{"#" + first, "first"},
		{"#" + second, "second"},
		{"#" + tag, "first"},
		{"?checksum=" + first[:8] + "#light", "first"},
		{"?checksum=" + first + "#annotated", "first"},
		{"?checksum=" + tag[:12] + "#annotated", "first"},
		{"?fetch-by-commit&checksum=" + second + "#light", "second"},
	} {
		g, err := fetch(t, s.url+"/r.git"+tc.suffix, Options{})
		if err != nil {
			t.Errorf("%s: %v", tc.suffix, err)
			continue
		}
		if got := content(t, g, "f"); got != tc.want {
			t.Errorf("%s: %q, want %q", tc.suffix, got, tc.want)
		}
		if got := paths(t, g); !slices.Equal(got, []string{".", "f", "sub", "sub/g"}) {
			t.Errorf("%s: %q", tc.suffix, got)
		}
	}
	for suffix, want := range map[string]string{
		"#nowhere":                          `does not contain ref nowhere`,
		"#" + strings.Repeat("0", 39) + "1": "no commit|not our ref",
		"?checksum=" + first[:8] + "#trunk": "expected checksum to match " + first[:8] + ", got ",
		"#:nowhere":                         `no directory "nowhere"`,
		"#:f":                               "not a directory",
		"#:.git":                            "no directory",
	} {
		_, err := fetch(t, s.url+"/r.git"+suffix, Options{})
		ok := false
		for w := range strings.SplitSeq(want, "|") {
			ok = ok || err != nil && strings.Contains(err.Error(), w)
		}
		if !ok {
			t.Errorf("%s: %v, want %q", suffix, err, want)
		}
	}
	if _, err := fetch(t, s.url+"/nowhere.git", Options{}); err == nil {
		t.Error("a repository that is not there was fetched")
	}
}

func TestMetadata(t *testing.T) {
	s := newServer(t)
	s.repo("r.git", "a=1", "run.sh=2", "d/e=3")
	dir := filepath.Join(s.root, "r.git")
	if err := os.Chmod(filepath.Join(dir, "run.sh"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	s.commit("r.git")
	g, err := fetch(t, s.url+"/r.git", Options{})
	if err != nil {
		t.Fatal(err)
	}
	for p, mode := range map[string]uint32{
		"a": tree.ModeRegular | 0o644, "run.sh": tree.ModeRegular | 0o755, "d": tree.ModeDir | 0o755, "link": tree.ModeSymlink | 0o777,
	} {
		n, err := g.Lstat(p)
		if err != nil || n.Mode != mode || n.MTime.Unix() != 1234567890 || n.UID != 0 {
			t.Errorf("%s is %+v, %v", p, n, err)
		}
	}
	if s, err := g.Readlink("link"); s != "/etc/passwd" || err != nil {
		t.Errorf("link leads to %q, %v", s, err)
	}
	if len(g.Commit) != 40 {
		t.Errorf("commit is %q", g.Commit)
	}
	g, err = fetch(t, s.url+"/r.git?mtime=checkout", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if n, err := g.Lstat("a"); err != nil || time.Since(n.MTime) > time.Minute {
		t.Errorf("time of the checkout is %v, %v", n.MTime, err)
	}
}

// TestFound: what a ref was is what is fetched, wherever it leads by now; and it is readable without a checkout.
func TestFound(t *testing.T) {
	s := newServer(t)
	s.repo("r.git", "f=one")
	first := s.git("r.git", "rev-parse", "HEAD")
	s.git("r.git", "tag", "-a", "v1", "-m", "the tag")
	tag := s.git("r.git", "rev-parse", "v1")
	ref, err := Parse(s.url + "/r.git#v1")
	if err != nil {
		t.Fatal(err)
	}
	o := Options{ScratchDir: t.TempDir(), Env: os.Environ()}
	found, err := Resolve(t.Context(), ref, o)
	if want := (Found{Ref: "refs/tags/v1", Hash: tag, Peeled: first}); err != nil || found != want || found.Commit() != first {
		t.Fatalf("%+v instead of %+v: %v", found, want, err)
	}
	objs, err := FetchObjects(t.Context(), ref, o)
	if err != nil || objs.CommitHash != first || objs.TagHash != tag ||
		!strings.Contains(string(objs.Commit), "author a <a@b> 1234567890 +0000") || !strings.HasSuffix(string(objs.Tag), "\nthe tag\n") {
		t.Errorf("%+v\n%s\n%s: %v", objs, objs.Commit, objs.Tag, err)
	}
	s.commit("r.git", "f=two")
	s.git("r.git", "tag", "-f", "-a", "v1", "-m", "another")
	o.Found = &found
	tr, err := Fetch(t.Context(), ref, o)
	if err != nil {
		t.Fatal(err)
	}
	if got := content(t, tr, "f"); got != "one" {
		t.Errorf("got %q", got)
	}
	tr.Close()
	for sum, ok := range map[string]bool{"": true, tag[:9]: true, first[:9]: true, "0123": tag[:4] == "0123"} {
		if err := found.Check(sum); (err == nil) != ok {
			t.Errorf("%q: %v", sum, err)
		}
	}
	if es, _ := os.ReadDir(o.ScratchDir); len(es) > 0 {
		t.Errorf("left behind: %v", es)
	}
}

func TestSHA256Repository(t *testing.T) {
	s := newServer(t)
	if err := os.Mkdir(filepath.Join(s.root, "r.git"), 0o755); err != nil {
		t.Fatal(err)
	}
	s.git("r.git", "init", "-q", "--object-format=sha256")
	commit := s.commit("r.git", "f=x")
	for _, suffix := range []string{"", "#" + commit} {
		g, err := fetch(t, s.url+"/r.git"+suffix, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if g.Commit != commit || g.Date.IsZero() || content(t, g, "f") != "x" {
			t.Errorf("%s: commit %s, content %q", suffix, g.Commit, content(t, g, "f"))
		}
	}
}

func TestKeepGitDir(t *testing.T) {
	s := newServer(t)
	s.repo("r.git", "f=x", "sub/g=y")
	s.git("r.git", "tag", "-a", "-m", "x", "v1")
	u := strings.Replace(s.url, "http://", "http://user:SECRET@", 1)
	for suffix, want := range map[string]string{"": "refs/heads/trunk", "#v1": "refs/tags/v1"} {
		g, err := fetch(t, u+"/r.git"+suffix, Options{KeepGitDir: true})
		if err != nil {
			t.Fatal(err)
		}
		work := filepath.Join(g.dir, "tree")
		out, err := exec.Command("git", "-c", "safe.directory=*", "-C", work, "for-each-ref", "--format=%(refname)").CombinedOutput()
		if err != nil || strings.TrimSpace(string(out)) != want {
			t.Errorf("%s: refs are %q, %v", suffix, out, err)
		}
		config := content(t, g, ".git/config")
		if !strings.Contains(config, "/r.git") || strings.Contains(config, "SECRET") {
			t.Errorf("config is %s", config)
		}
		for _, p := range []string{".git/FETCH_HEAD", ".git/logs", ".git/hooks"} {
			if _, err := g.Lstat(p); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s: %v", p, err)
			}
		}
	}
	g, err := fetch(t, u+"/r.git#:sub", Options{KeepGitDir: true})
	if err != nil {
		t.Fatal(err)
	}
	if got := paths(t, g); !slices.Equal(got, []string{".", "g"}) {
		t.Errorf("subdirectory has %q", got)
	}
}

func TestSubmodules(t *testing.T) {
	s := newServer(t)
	s.repo("inner.git", "deep=deepest")
	s.repo("lib.git", "lib=library")
	s.git("lib.git", "submodule", "--quiet", "add", "../inner.git", "inner")
	s.git("lib.git", "commit", "-qm", "x")
	s.repo("r.git", "f=x")
	s.git("r.git", "submodule", "--quiet", "add", "../lib.git", "third/party")
	s.git("r.git", "commit", "-qm", "x")
	// The submodule moves on: what was committed counts.
	s.commit("lib.git", "lib=newer")

	g, err := fetch(t, s.url+"/r.git", Options{})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		".", ".gitmodules", "f", "third", "third/party", "third/party/.gitmodules", "third/party/inner", "third/party/inner/deep", "third/party/lib",
	}
	if got := paths(t, g); !slices.Equal(got, want) {
		t.Errorf("paths are %q", got)
	}
	if got := content(t, g, "third/party/lib"); got != "library" {
		t.Errorf("submodule has %q", got)
	}
	g, err = fetch(t, s.url+"/r.git?submodules=0", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if got := paths(t, g); !slices.Equal(got, []string{".", ".gitmodules", "f", "third", "third/party"}) {
		t.Errorf("without submodules: %q", got)
	}
}

// TestHostileRepository has what could make git run something, or read what it should not.
func TestHostileRepository(t *testing.T) {
	s := newServer(t)
	proof := filepath.Join(t.TempDir(), "proof")
	touch := "touch " + proof
	s.repo("secret.git", "f=secret")
	s.repo("r.git", ".gitattributes=* filter=evil\n", "f=x", "hooks/post-checkout=#!/bin/sh\n"+touch,
		".gitconfig=[filter \"evil\"]\n\tsmudge = "+touch+"\n\trequired = true\n[core]\n\tfsmonitor = "+touch)
	if _, err := fetch(t, s.url+"/r.git", Options{}); err != nil {
		t.Error(err)
	}
	for name, url := range map[string]string{
		"ext": "ext::sh -c " + strings.ReplaceAll(touch, " ", "% "), "file": "file://" + filepath.Join(s.root, "secret.git"),
		"path": filepath.Join(s.root, "secret.git"), "option": "--upload-pack=" + touch, "fd": "fd::0",
	} {
		repo := "sub-" + name + ".git"
		s.repo(repo, ".gitmodules=[submodule \"m\"]\n\tpath = m\n\tupdate = !"+touch+"\n\turl = \""+url+"\"\n")
		s.git(repo, "update-index", "--add", "--cacheinfo", "160000,"+s.git("secret.git", "rev-parse", "HEAD")+",m")
		s.git(repo, "commit", "-qm", "x")
		g, err := fetch(t, s.url+"/"+repo, Options{})
		if err == nil {
			if c := content(t, g, "m/f"); strings.Contains(c, "secret") {
				t.Errorf("%s: a submodule of %s was fetched", name, url)
			}
		}
	}
	// A subdirectory that is a link out of the repository.
	s.repo("link.git", "f=x")
	if err := os.Symlink("/etc", filepath.Join(s.root, "link.git/etc")); err != nil {
		t.Fatal(err)
	}
	s.commit("link.git")
	for _, sub := range []string{"etc", "etc/ssl", "../../../../etc"} {
		if _, err := fetch(t, s.url+"/link.git#:"+sub, Options{}); err == nil {
			t.Errorf("subdirectory %s was taken", sub)
		}
	}
	if _, err := os.Lstat(proof); err == nil {
		t.Error("the repository had something executed")
	}
}

func TestUserConfigurationIsNotSeen(t *testing.T) {
	s := newServer(t)
	s.repo("r.git", "f=x")
	home := t.TempDir()
	proof := filepath.Join(home, "proof")
	conf := "[url \"http://127.0.0.1:1/\"]\n\tinsteadOf = " + s.url + "\n[credential]\n\thelper = \"!touch " + proof + "\"\n"
	if err := os.WriteFile(filepath.Join(home, ".gitconfig"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	env := append(os.Environ(), "HOME="+home, "GIT_DIR=/nowhere", "GIT_TRACE=1", "GIT_CONFIG_PARAMETERS='x'")
	if _, err := fetch(t, s.url+"/r.git", Options{Env: env}); err != nil {
		t.Error(err)
	}
	s.insist("Basic never")
	if _, err := fetch(t, s.url+"/r.git", Options{Env: env}); err == nil {
		t.Error("fetched without credentials")
	}
	if _, err := os.Lstat(proof); err == nil {
		t.Error("the user's credential helper was called")
	}
}

func TestAuthentication(t *testing.T) {
	s := newServer(t)
	s.repo("lib.git", "lib=library")
	s.repo("r.git", "f=x")
	s.git("r.git", "submodule", "--quiet", "add", "../lib.git", "lib")
	s.git("r.git", "commit", "-qm", "x")
	with := func(user string) string { return strings.Replace(s.url, "http://", "http://"+user+"@", 1) + "/r.git" }
	for name, tc := range map[string]struct {
		url, want string
		o         Options
	}{
		"user and password": {with("me:SECRET"), "Basic bWU6U0VDUkVU", Options{}},
		"user only":         {with("SECRET"), "Basic U0VDUkVUOg==", Options{}},
		"token":             {s.url + "/r.git", "Basic eC1hY2Nlc3MtdG9rZW46U0VDUkVU", Options{Token: "SECRET"}},
		"header":            {with("me:other"), "Bearer SECRET", Options{Header: "Bearer SECRET", Token: "other"}},
	} {
		t.Run(name, func(t *testing.T) {
			s.insist(tc.want)
			g, err := fetch(t, tc.url, tc.o)
			if err != nil {
				t.Fatal(err)
			}
			if content(t, g, "lib/lib") != "library" {
				t.Error("the submodule on the same server was not fetched")
			}
			s.insist("Basic other")
			_, err = fetch(t, tc.url, tc.o)
			var d *diag.Error
			if !errors.As(err, &d) || !strings.Contains(d.Hint, "token") {
				t.Errorf("refused: %v without a hint", err)
			}
			if err != nil && (strings.Contains(err.Error(), "SECRET") || strings.Contains(err.Error(), tc.want)) {
				t.Errorf("%v has the secret in it", err)
			}
		})
	}
	// Another server is another matter.
	other := newServer(t)
	other.repo("elsewhere.git", "e=elsewhere")
	s.repo("far.git", "f=x", ".gitmodules=[submodule \"m\"]\n\tpath = m\n\turl = "+other.url+"/elsewhere.git\n")
	s.git("far.git", "update-index", "--add", "--cacheinfo", "160000,"+other.git("elsewhere.git", "rev-parse", "HEAD")+",m")
	s.git("far.git", "commit", "-qm", "x")
	s.insist("Bearer SECRET")
	if _, err := fetch(t, s.url+"/far.git", Options{Header: "Bearer SECRET"}); err != nil {
		t.Error(err)
	}
	if got := other.seen.Load(); got != "" {
		t.Errorf("another server was sent %q", got)
	}
}

// TestNothingOnCommandLines puts a program in git's place that writes down how it is called.
func TestNothingOnCommandLines(t *testing.T) {
	s := newServer(t)
	s.repo("r.git", "f=x")
	bin, _ := exec.LookPath("git")
	dir := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\necho \"$@\" >> %s/log\nexec %s \"$@\"\n", dir, bin)
	if err := os.WriteFile(filepath.Join(dir, "git"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	url := strings.Replace(s.url, "http://", "http://me:SECRET@", 1) + "/r.git"
	if _, err := fetch(t, url, Options{Env: []string{"PATH=" + dir + ":" + os.Getenv("PATH")}, Token: "OTHERSECRET"}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "log"))
	if err != nil || !strings.Contains(string(b), "fetch") || strings.Contains(string(b), "SECRET") {
		t.Errorf("git was called so: %s, %v", b, err)
	}
}

func TestNoGit(t *testing.T) {
	for _, env := range [][]string{{}, {"PATH="}, {"PATH=" + t.TempDir()}, {"PATH=relative:."}} {
		_, err := fetch(t, "https://example.invalid/r.git", Options{Env: append([]string{}, env...)})
		var d *diag.Error
		if !errors.As(err, &d) || !strings.Contains(err.Error(), "no git program") || d.Hint == "" {
			t.Errorf("%q: %v", env, err)
		}
	}
}

func TestGitProtocol(t *testing.T) {
	s := newServer(t)
	s.repo("r.git", "f=x")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	l.Close()
	cmd := exec.Command("git", "-c", "safe.directory=*", "daemon", "--export-all", "--listen=127.0.0.1", "--port="+port, "--base-path="+s.root)
	if err := cmd.Start(); err != nil {
		t.Skip("no git daemon here:", err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	for range 100 {
		if c, err := net.Dial("tcp", "127.0.0.1:"+port); err == nil {
			c.Close()
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	g, err := fetch(t, "git://127.0.0.1:"+port+"/r.git", Options{})
	if err != nil {
		t.Skip("git daemon does not serve here:", err)
	}
	if content(t, g, "f") != "x" {
		t.Error("content is wrong")
	}
}

// TestSSH has a program in ssh's place that runs the command here.
func TestSSH(t *testing.T) {
	s := newServer(t)
	s.repo("r.git", "f=x")
	fake := filepath.Join(t.TempDir(), "ssh")
	script := "#!/bin/sh\nfor last; do :; done\nexport GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0='*'\ncd " + s.root + "\neval \"$last\"\n"
	if err := os.WriteFile(fake, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	env := append(os.Environ(), "GIT_SSH_COMMAND="+fake)
	for _, url := range []string{"git@host.invalid:r.git", "ssh://git@host.invalid:22" + s.root + "/r.git#trunk"} {
		g, err := fetch(t, url, Options{Env: env})
		if err != nil {
			t.Errorf("%s: %v", url, err)
		} else if content(t, g, "f") != "x" {
			t.Errorf("%s: content is wrong", url)
		}
	}
}

func TestCancelled(t *testing.T) {
	hang := make(chan struct{})
	hs := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-hang:
		case <-r.Context().Done():
		}
	}))
	defer hs.Close()
	defer close(hang)
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	r, err := Parse(hs.URL + "/r.git")
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if _, err := Fetch(ctx, r, Options{ScratchDir: t.TempDir(), Env: os.Environ()}); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > 10*time.Second {
		t.Errorf("got %v after %v", err, time.Since(began))
	}
}

func TestLimits(t *testing.T) {
	s := newServer(t)
	s.repo("r.git", "a="+strings.Repeat("x", 1000), "b=y", "c=z")
	if _, err := fetch(t, s.url+"/r.git", Options{MaxFiles: 2}); err == nil || !strings.Contains(err.Error(), "more than 2 files") {
		t.Errorf("files: %v", err)
	}
	if _, err := fetch(t, s.url+"/r.git", Options{MaxBytes: 1000}); err == nil || !strings.Contains(err.Error(), "more than 1000 bytes") {
		t.Errorf("bytes: %v", err)
	}
	if _, err := fetch(t, s.url+"/r.git", Options{MaxFiles: 3, MaxBytes: 1002}); err != nil {
		t.Error(err)
	}
}

// TestOldServer takes away what newer servers can do.
func TestOldServer(t *testing.T) {
	s := newServer(t)
	s.repo("r.git", "f=first")
	first := s.git("r.git", "rev-parse", "HEAD")
	s.commit("r.git", "f=second")
	for _, key := range []string{"uploadpack.allowAnySHA1InWant", "uploadpack.allowTipSHA1InWant", "uploadpack.allowReachableSHA1InWant"} {
		s.git("r.git", "config", key, "false")
	}
	// No Git-Protocol header reaches it, so it speaks version 0.
	bin, _ := exec.LookPath("git")
	hs := httptest.NewServer(&cgi.Handler{Path: bin, Args: []string{"http-backend"}, InheritEnv: []string{"PATH"}, Stderr: io.Discard, Env: []string{
		"GIT_PROJECT_ROOT=" + s.root, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_COUNT=2", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*",
		"GIT_CONFIG_KEY_1=protocol.version", "GIT_CONFIG_VALUE_1=0",
	}})
	defer hs.Close()
	for suffix, want := range map[string]string{"": "second", "#trunk": "second", "#" + first: "first"} {
		g, err := fetch(t, hs.URL+"/r.git"+suffix, Options{})
		if err != nil {
			t.Errorf("%s: %v", suffix, err)
		} else if got := content(t, g, "f"); got != want {
			t.Errorf("%s: %q", suffix, got)
		}
	}
}
