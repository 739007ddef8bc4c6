package remote

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
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/source/git"
	"github.com/kiln-build/kiln/internal/tree"
)

type memory map[string][]byte

func (m memory) GetRecord(kind, key string) ([]byte, error) {
	if b, ok := m[kind+key]; ok {
		return b, nil
	}
	return nil, fs.ErrNotExist
}

func (m memory) PutRecord(kind, key string, b []byte) error {
	m[kind+key] = b
	return nil
}

type secrets map[string]string

func (s secrets) Secret(_ context.Context, id string) ([]byte, error) {
	if v, ok := s[id]; ok {
		return []byte(v), nil
	}
	return nil, fmt.Errorf("secret %q: %w", id, fs.ErrNotExist)
}

// server has one file, and says what it was asked.
type server struct {
	*httptest.Server
	content, etag string
	sent          int // bodies
	auth, accept  string
}

func newServer(t *testing.T) *server {
	t.Helper()
	s := &server{content: "one", etag: `"1"`}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.auth, s.accept = r.Header.Get("Authorization"), r.Header.Get("Accept")
		w.Header().Set("Last-Modified", "Tue, 02 Jan 2024 03:04:05 GMT")
		if s.etag != "" {
			w.Header().Set("ETag", s.etag)
		}
		if s.etag != "" && r.Header.Get("If-None-Match") == s.etag {
			w.WriteHeader(http.StatusNotModified)
			return
		}
		s.sent++
		io.WriteString(w, s.content)
	}))
	t.Cleanup(s.Close)
	return s
}

// fetch resolves and, with open, fetches: the key, the one file's name, and its content.
func fetch(t *testing.T, src Source, env *Env, open bool) (key, name, content string, n tree.Node, err error) {
	t.Helper()
	env.Dir = t.TempDir()
	v, err := src.Resolve(t.Context(), env, nil)
	if err != nil {
		return "", "", "", n, err
	}
	defer func() {
		if err := v.Close(); err != nil {
			t.Error(err)
		}
		if es, _ := os.ReadDir(env.Dir); len(es) > 0 {
			t.Errorf("left behind: %v", es)
		}
	}()
	key = strings.Join(v.Key(), " ")
	if !open {
		return key, "", "", n, nil
	}
	tr, err := v.Open(t.Context(), nil)
	if err != nil {
		return "", "", "", n, err
	}
	es, err := tr.ReadDir(".")
	if err != nil || len(es) != 1 {
		t.Fatal(es, err)
	}
	r, err := tr.Open(es[0].Name)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	return key, es[0].Name, string(b), es[0].Node, err
}

// TestHTTPVersions: what has not changed is not sent again, and what has is another version.
func TestHTTPVersions(t *testing.T) {
	s, env := newServer(t), &Env{Memory: memory{}}
	src := &HTTP{URL: s.URL + "/dir/file?x=1", UID: 5, GID: 6}
	first, name, content, n, err := fetch(t, src, env, true)
	if err != nil || name != "file" || content != "one" || s.sent != 1 {
		t.Fatalf("%q %q, sent %d times: %v", name, content, s.sent, err)
	}
	if n.Mode != tree.ModeRegular|0o600 || n.UID != 5 || n.GID != 6 || !n.MTime.Equal(time.Date(2024, 1, 2, 3, 4, 5, 0, time.UTC)) {
		t.Errorf("%+v", n)
	}
	second, _, _, _, err := fetch(t, src, env, false)
	if err != nil || second != first || s.sent != 1 {
		t.Errorf("unchanged: %q instead of %q, sent %d times: %v", second, first, s.sent, err)
	}
	// Known, but wanted: the layer that was made of it is gone.
	if _, _, content, _, err = fetch(t, src, env, true); err != nil || content != "one" || s.sent != 2 {
		t.Errorf("wanted again: %q, sent %d times: %v", content, s.sent, err)
	}
	s.content, s.etag = "two", `"2"`
	third, _, content, _, err := fetch(t, src, env, true)
	if err != nil || third == first || content != "two" {
		t.Errorf("changed: %q, %q: %v", third, content, err)
	}
	s.etag, s.content = "", "three"
	if _, _, content, _, err = fetch(t, src, env, true); err != nil || content != "three" {
		t.Errorf("no ETag any more: %q: %v", content, err)
	}
	for name, other := range map[string]*HTTP{
		"mode": {URL: src.URL, UID: 5, GID: 6, Perm: 0o644}, "owner": {URL: src.URL, UID: 5}, "name": {URL: src.URL, UID: 5, GID: 6, Filename: "x"},
	} {
		if k, _, _, _, err := fetch(t, other, env, false); err != nil || k == third {
			t.Errorf("another %s is the same version: %v", name, err)
		}
	}
}

// TestHTTPChecksum: what is known by its checksum is asked for only when it is wanted, and must have it.
func TestHTTPChecksum(t *testing.T) {
	s, env := newServer(t), &Env{Memory: memory{}}
	src := &HTTP{URL: s.URL + "/f", Checksum: digest.FromString("one")}
	if _, _, _, _, err := fetch(t, src, env, false); err != nil || s.sent != 0 {
		t.Errorf("sent %d times: %v", s.sent, err)
	}
	if _, _, content, _, err := fetch(t, src, env, true); err != nil || content != "one" {
		t.Errorf("%q, %v", content, err)
	}
	s.content = "other"
	_, _, _, _, err := fetch(t, src, env, true)
	if err == nil || !strings.Contains(err.Error(), digest.FromString("other").String()) || !strings.Contains(err.Error(), src.Checksum.String()) {
		t.Error(err)
	}
}

func TestHTTPCredentials(t *testing.T) {
	s := newServer(t)
	for name, x := range map[string]struct {
		src     HTTP
		secrets secrets
		want    string
		err     bool
	}{
		"none":      {want: ""},
		"header":    {secrets: secrets{"HTTP_AUTH_HEADER_127.0.0.1": "Basic abc", "HTTP_AUTH_TOKEN_127.0.0.1": "tok"}, want: "Basic abc"},
		"token":     {secrets: secrets{"HTTP_AUTH_TOKEN_127.0.0.1": "tok"}, want: "Bearer tok"},
		"named":     {src: HTTP{AuthSecret: "mine"}, secrets: secrets{"mine": "Basic def"}, want: "Basic def"},
		"missing":   {src: HTTP{AuthSecret: "mine"}, err: true},
		"two lines": {secrets: secrets{"HTTP_AUTH_HEADER_127.0.0.1": "canary\r\nX: y"}, err: true},
	} {
		s.auth = ""
		x.src.URL, x.src.Accept = s.URL+"/f", "text/x"
		_, _, _, _, err := fetch(t, &x.src, &Env{Secrets: x.secrets}, false)
		if (err != nil) != x.err || s.auth != x.want {
			t.Errorf("%s: sent %q: %v", name, s.auth, err)
		}
		if err != nil && strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: the secret is in the error: %v", name, err)
		}
	}
	if s.accept != "text/x" {
		t.Errorf("Accept: %q", s.accept)
	}
}

func TestFilename(t *testing.T) {
	for _, x := range [][4]string{
		{"http://h/a/b.tgz?q", "", "", "b.tgz"},
		{"http://h/a/b.tgz", "want", `attachment; filename="c"`, "want"},
		{"http://h/a/b.tgz", "", `attachment; filename="../../etc/c"`, "c"},
		{"http://h/a/b.tgz", "", `attachment; filename=".."`, "b.tgz"},
		{"http://h/a/b.tgz", "", `attachment; filename="x/"`, "b.tgz"},
		{"http://h/", "", "", "download"},
		{"http://h/a/..", "../x", "", "download"},
		{"http://h/%2e%2e%2fx", "", "", "x"},
	} {
		if got := filename(x[0], x[1], x[2]); got != x[3] {
			t.Errorf("%q: %q", x, got)
		}
	}
}

// repository makes a repository and serves it; it returns its URL.
func repository(t *testing.T) (url, dir string) {
	t.Helper()
	bin, err := exec.LookPath("git")
	if err != nil {
		t.Skip("no git")
	}
	dir = t.TempDir()
	commit(t, dir, "init", "-q", "-b", "main", ".")
	add(t, dir, "f", "one")
	out, err := exec.Command(bin, "--exec-path").Output()
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(&cgi.Handler{
		Path: filepath.Join(strings.TrimSpace(string(out)), "git-http-backend"),
		Env:  []string{"GIT_PROJECT_ROOT=" + dir, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*"},
	})
	t.Cleanup(srv.Close)
	return srv.URL + "/.git", dir
}

func add(t *testing.T, dir, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	commit(t, dir, "add", "-A")
	commit(t, dir, "-c", "user.name=a", "-c", "user.email=a@example", "commit", "-qm", "m")
}

func commit(t *testing.T, dir string, args ...string) {
	t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("git %v: %v\n%s", args, err, out)
	}
}

func TestGitVersions(t *testing.T) {
	url, dir := repository(t)
	ref, err := git.ParseRemote(url)
	if err != nil {
		t.Fatal(err)
	}
	src, env := &Git{Ref: *ref}, &Env{Environ: os.Environ()}
	first, name, content, _, err := fetch(t, src, env, true)
	if err != nil || name != "f" || content != "one" {
		t.Fatalf("%q %q: %v", name, content, err)
	}
	if again, _, _, _, err := fetch(t, src, env, false); err != nil || again != first {
		t.Errorf("unchanged: %q instead of %q: %v", again, first, err)
	}
	env.Dir = t.TempDir()
	v, err := src.Resolve(t.Context(), env, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	add(t, dir, "f", "two")
	if second, _, content, _, err := fetch(t, src, env, true); err != nil || second == first || content != "two" {
		t.Errorf("changed: %q, %q: %v", second, content, err)
	}
	// The branch has moved since it was resolved.
	tr, err := v.Open(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	f, err := tr.Open("f")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if b, err := io.ReadAll(f); string(b) != "one" || err != nil {
		t.Errorf("another commit than was resolved: %q, %v", b, err)
	}
}

// TestPins: what was found of a source counts for all that have the same pins, with a checksum and without.
func TestPins(t *testing.T) {
	s := newServer(t)
	url, dir := repository(t)
	ref, err := git.ParseRemote(url + "#main")
	if err != nil {
		t.Fatal(err)
	}
	env := &Env{Dir: t.TempDir(), Environ: os.Environ(), Pins: &Pins{}, Memory: memory{}}
	resolve := func(src Source) (Metadata, string) {
		t.Helper()
		v, err := src.Resolve(t.Context(), env, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer v.Close()
		md, err := v.Metadata(t.Context(), Ask{Objects: true, Algorithm: digest.SHA512, Suffix: []byte("x")})
		if err != nil {
			t.Fatal(err)
		}
		tr, err := v.Open(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		es, err := tr.ReadDir(".")
		if err != nil {
			t.Fatal(err)
		}
		f, err := tr.Open(es[len(es)-1].Name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		b, err := io.ReadAll(f)
		if err != nil {
			t.Fatal(err)
		}
		return md, string(b)
	}
	h, g := &HTTP{URL: s.URL + "/f"}, &Git{Ref: *ref}
	md, content := resolve(h)
	if md.HTTP == nil || md.HTTP.Digest != digest.FromString("one") || md.HTTP.Filename != "f" || md.HTTP.LastModified.IsZero() ||
		md.HTTP.Checksum != digest.SHA512.FromString("onex") || content != "one" {
		t.Fatalf("%+v, %q", md.HTTP, content)
	}
	commit, content := resolve(g)
	if commit.Git == nil || commit.Git.Ref != "refs/heads/main" || len(commit.Git.Hash) != 40 || commit.Git.Tag != nil ||
		!strings.HasPrefix(string(commit.Git.Commit), "tree ") || content != "one" {
		t.Fatalf("%+v, %q", commit.Git, content)
	}
	s.content, s.etag = "two", `"2"`
	add(t, dir, "f", "two")
	sum := git.Ref{Remote: ref.Remote, Rev: ref.Rev, Checksum: commit.Git.Hash[:7]}
	for name, src := range map[string]Source{
		"http": h, "with another owner": &HTTP{URL: h.URL, UID: 7}, "with its checksum": &HTTP{URL: h.URL, Checksum: md.HTTP.Digest},
		"git": g, "commit with its checksum": &Git{Ref: sum},
	} {
		if md, content := resolve(src); content != "one" {
			t.Errorf("%s: %q, %+v", name, content, md)
		}
	}
	if s.sent != 1 {
		t.Errorf("sent %d times", s.sent)
	}
	sum.Checksum = "0000000"
	if _, err := (&Git{Ref: sum}).Resolve(t.Context(), env, nil); err == nil || !strings.Contains(err.Error(), "expected checksum to match 0000000, got "+commit.Git.Hash) {
		t.Errorf("another checksum: %v", err)
	}
	env.Pins = &Pins{}
	if md, content := resolve(h); md.HTTP.Digest != digest.FromString("two") || content != "two" {
		t.Errorf("the next build gets %+v, %q", md.HTTP, content)
	}
}

// TestPinsFailures: a failure is nobody else's, and who waits can give up.
func TestPinsFailures(t *testing.T) {
	var p Pins
	if _, err := pinned(t.Context(), &p, "k", func() (int, error) { return 0, io.EOF }); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	looking, end := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		if n, err := pinned(t.Context(), &p, "k", func() (int, error) { close(looking); <-end; return 3, nil }); n != 3 || err != nil {
			t.Error(n, err)
		}
	})
	<-looking
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := pinned(ctx, &p, "k", func() (int, error) { return 4, nil }); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	close(end)
	wg.Wait()
	if n, err := pinned(t.Context(), &p, "k", func() (int, error) { return 5, nil }); n != 3 || err != nil {
		t.Error(n, err)
	}
}

// agents has one agent, that says hello.
type agents struct {
	wg sync.WaitGroup
}

func (a *agents) DialAgent(_ context.Context, id string) (net.Conn, error) {
	if id != "default" {
		return nil, fs.ErrNotExist
	}
	here, there := net.Pipe()
	a.wg.Go(func() {
		fmt.Fprint(there, "hello")
		there.Close()
	})
	return here, nil
}

// TestGitAgent: git finds the agent that the build was given, never the user's own.
func TestGitAgent(t *testing.T) {
	a := &agents{}
	v := &gitVersion{
		g:   &Git{Ref: git.Ref{Remote: "git@h.example:x"}, Agent: "default", KnownHosts: "h.example ssh-ed25519 AAAA\n"},
		env: &Env{Dir: t.TempDir(), Environ: []string{"SSH_AUTH_SOCK=/the/user's", "PATH=/bin"}, SSH: a},
	}
	o, err := v.options(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(o.Env, func(kv string) bool { return strings.HasPrefix(kv, "SSH_AUTH_SOCK=") })
	if b, err := os.ReadFile(o.KnownHosts); err != nil || string(b) != v.g.KnownHosts || i != 1 {
		t.Fatalf("%q %v %q", b, err, o.Env)
	}
	c, err := net.Dial("unix", strings.TrimPrefix(o.Env[i], "SSH_AUTH_SOCK="))
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); string(b) != "hello" {
		t.Errorf("%q, %v", b, err)
	}
	c.Close()
	if err := v.Close(); err != nil {
		t.Error(err)
	}
	if es, _ := os.ReadDir(v.env.Dir); len(es) > 0 {
		t.Errorf("left behind: %v", es)
	}
	none := &gitVersion{g: &Git{Agent: "other"}, env: &Env{Dir: t.TempDir(), SSH: a}}
	if _, err := none.options(t.Context()); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	without := &gitVersion{g: &Git{Agent: "default"}, env: v.env}
	without.env.SSH = nil
	if o, err := without.options(t.Context()); err != nil || len(o.Env) != 1 {
		t.Errorf("%q, %v", o.Env, err)
	}
	without.Close()
}

func TestGitCredentials(t *testing.T) {
	for name, x := range map[string]struct {
		remote        string
		secrets       secrets
		token, header string
	}{
		"token":        {"https://h.example/x", secrets{"GIT_AUTH_TOKEN": "t"}, "t", ""},
		"of the host":  {"https://h.example/x", secrets{"GIT_AUTH_TOKEN": "t", "GIT_AUTH_TOKEN.h.example": "h"}, "h", ""},
		"header first": {"https://h.example/x", secrets{"GIT_AUTH_TOKEN": "t", "GIT_AUTH_HEADER": "basic x"}, "", "basic x"},
		"not by ssh":   {"git@h.example:x", secrets{"GIT_AUTH_TOKEN": "t"}, "", ""},
		"nor by git":   {"git://h.example/x", secrets{"GIT_AUTH_TOKEN": "t"}, "", ""},
	} {
		v := &gitVersion{g: &Git{Ref: git.Ref{Remote: x.remote}, TokenSecret: "GIT_AUTH_TOKEN", HeaderSecret: "GIT_AUTH_HEADER"}, env: &Env{Secrets: x.secrets}}
		if token, header, err := v.credentials(t.Context()); token != x.token || header != x.header || err != nil {
			t.Errorf("%s: %q, %q, %v", name, token, header, err)
		}
	}
}

type uploads struct {
	content string
	sent    int
}

func (u *uploads) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Path != "/one" || len(req.Header.Values("Authorization")) > 0 {
		return nil, fmt.Errorf("no such upload: %s %v", req.URL, req.Header)
	}
	u.sent++
	return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(strings.NewReader(u.content)), ContentLength: -1}, nil
}

// TestUploads fetches what the client of a build sends itself, once, and without secrets.
func TestUploads(t *testing.T) {
	u := &uploads{content: "archive"}
	env := &Env{Dir: t.TempDir(), Uploads: u, Secrets: secrets{"HTTP_AUTH_TOKEN_" + UploadHost: "x"}}
	v, err := (&HTTP{URL: "http://" + UploadHost + "/one", Filename: "context"}).Resolve(t.Context(), env, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	tr, err := v.Open(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	f, err := tr.Open("context")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if b, err := io.ReadAll(f); err != nil || string(b) != u.content || u.sent != 1 {
		t.Errorf("got %q, %v; sent %d times", b, err, u.sent)
	}
	if _, err := (&HTTP{URL: "http://" + UploadHost + "/other"}).Resolve(t.Context(), env, nil); err == nil || !strings.Contains(err.Error(), "no such upload") {
		t.Errorf("another one: %v", err)
	}
}
