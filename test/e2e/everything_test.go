package e2e

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/kiln-build/kiln/test/kilnrun"
	"github.com/kiln-build/kiln/test/testenv"
)

// everything is a Dockerfile that uses all that there is, with what its builds are given.
type everything struct {
	*kilnrun.Bed
	context, dir string
	web          string // HOST:PORT
	sum          string // sha256 of file.txt there
	keys         map[string]ssh.PublicKey
	more         []string // options of clients: secrets and agents
	env          []string // of clients
}

// Secrets that steps are given, and print.
const (
	secretFile  = "secret-of-a-file"
	secretToken = "secret-of-a-variable"
)

func newEverything(t *testing.T, bed *kilnrun.Bed) *everything {
	t.Helper()
	e := &everything{Bed: bed, keys: map[string]ssh.PublicKey{}, env: []string{"CI_TOKEN=" + secretToken}}
	made := filepath.Join(bed.Dir, "everything")
	if err := os.CopyFS(made, os.DirFS(filepath.Join("testdata", "everything"))); err != nil {
		t.Fatal(err)
	}
	e.context, e.dir = filepath.Join(made, "context"), filepath.Join(made, "dir")
	site := filepath.Join(made, "site")
	if err := os.Mkdir(site, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "sh", "-eu", filepath.Join(made, "site.sh"))
	cmd.Dir = site
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make the site: %v\n%s", err, out)
	}
	e.sum = fmt.Sprintf("%x", sha256.Sum256([]byte(read(t, filepath.Join(site, "file.txt")))))
	put(t, filepath.Join(e.context, "archive.tar"), []byte(read(t, filepath.Join(site, "archive.tar"))))
	h, err := testenv.Web(site)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	e.web = srv.Listener.Addr().String()
	secret := put(t, filepath.Join(bed.Dir, "secret"), []byte(secretFile))
	e.more = []string{
		"--secret", "id=file,src=" + secret, "--secret", "id=token,env=CI_TOKEN",
		"--ssh", "key=" + e.key(t, "key"), "--ssh", "default=" + e.agent(t),
	}
	return e
}

// key makes a private key, and returns its file.
func (e *everything) key(t *testing.T, name string) string {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(key, "")
	if err != nil {
		t.Fatal(err)
	}
	if e.keys[name], err = ssh.NewPublicKey(pub); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// agent starts OpenSSH's ssh-agent with a key of its own, and returns its socket.
func (e *everything) agent(t *testing.T) string {
	t.Helper()
	sock := filepath.Join(e.Dir, "agent.sock")
	agent := exec.CommandContext(t.Context(), "ssh-agent", "-D", "-a", sock)
	agent.Stdout = nil
	if err := agent.Start(); err != nil {
		t.Skipf("there is no ssh-agent: scripts/deps.sh e2e, as root: %v", err)
	}
	t.Cleanup(func() { _ = agent.Process.Kill(); _ = agent.Wait() })
	eventually(t, "the agent listens", func() bool { _, err := os.Stat(sock); return err == nil })
	add := exec.CommandContext(t.Context(), "ssh-add", "-q", e.key(t, "agent"))
	add.Env = append(os.Environ(), "SSH_AUTH_SOCK="+sock)
	if out, err := add.CombinedOutput(); err != nil {
		t.Fatalf("ssh-add: %v\n%s", err, out)
	}
	return sock
}

// build builds it as the client, and pushes.
func (e *everything) build(c *client, ref string, more ...string) (out string) {
	c.t.Helper()
	c.env = append(c.env, e.env...)
	return c.build(order{
		dir:  e.context,
		args: []string{"REGISTRY=" + e.Host, "WEB=" + e.web, "SUM=" + e.sum, "CLIENT=" + c.name},
		contexts: map[string]string{
			"dir": e.dir, "image": "docker-image://" + e.Host + "/library/busybox:latest",
			"repo": "http://" + e.web + "/repo.git", "page": "http://" + e.web + "/file.txt",
		},
		opts: map[string]string{"ulimit": "nofile=1234:2345", "add-hosts": "added=10.1.2.3", "shm-size": "8388608", "cgroup-parent": "builds"},
		more: append(append([]string{"--output", "type=image,push=true,name=" + ref}, e.more...), more...),
	})
}

// check looks at every file that the Dockerfile describes.
func (e *everything) check(t *testing.T, ref, client string) {
	t.Helper()
	fs := rootfs(t, ref)
	text := func(p, want string) {
		t.Helper()
		if got, ok := fs[p]; !ok || got.Data != want {
			t.Errorf("%s is %q (%v), not %q", p, got.Data, ok, want)
		}
	}
	of := "of " + client + "\n"
	for p, want := range map[string]string{
		"/client": of, "/out/cache.owner": "5:6:751\n", "/out/cache.seen": of, "/out/cache.private": "", "/out/bind": "one\n",
		"/out/bind.context": "mounted\n", "/out/tmpfs": "full\n", "/out/secret.owner": "7:8:440\n",
		"/out/secret.size": fmt.Sprintf("%d\n%d\n", len(secretFile), len(secretToken)), "/out/network": "from the web\n",
		"/out/limits": "1234\n8192\n10.1.2.3\n", "/out/heredocs": of + "of ${CLIENT}\n", "/out/script": "a script of " + client,
		"/files/copied/one.txt": "one\n", "/files/copied/b/three.txt": "three\n", "/files/parents/b/three.txt": "three\n",
		"/files/heredoc/literal.txt": e.sum + "\n", "/files/heredoc/as-it-is.txt": "${SUM}\n", "/files/web/file.txt": "from the web\n",
		"/files/unpacked/file.txt": "from the web\n", "/files/local/file.txt": "from the web\n", "/files/git/sub/deep": "deep\n",
		"/files/git/whole/top": "one\n", "/files/git/whole/inner/inner": "inner\n", "/files/contexts/dir": "a named context\n",
		"/files/contexts/repo": "two\n", "/files/contexts/page": "from the web\n",
	} {
		text(p, want)
	}
	if passwd := fs["/out/bind.image"].Data; !strings.Contains(passwd, "root:") {
		t.Errorf("the image's passwd is %q", passwd)
	}
	for _, p := range []string{"/files/packed/archive.tar", "/files/git/whole/.git/HEAD"} {
		if _, ok := fs[p]; !ok {
			t.Errorf("there is no %s", p)
		}
	}
	for _, p := range []string{
		"/files/copied/two.md", "/files/copied/b/four.md", "/files/copied/ignored", "/files/parents/b/four.md", "/files/git/sub/.git",
		"/out/lost", "/tok", "/run/secrets", "/scratch/x", "/cache/client", "/context",
	} {
		if _, ok := fs[p]; ok {
			t.Errorf("there is %s", p)
		}
	}
	if h := fs["/files/copied/one.txt"]; h.Header != nil && (h.Uid != 5 || h.Gid != 6 || h.Mode&0o777 != 0o644) {
		t.Errorf("/files/copied/one.txt has the owner %d:%d and mode %o", h.Uid, h.Gid, h.Mode)
	}
	for name, key := range e.keys {
		signed(t, fs["/ssh/"+name].Data, key, "text of "+client)
	}
}

// signed verifies what the program sign has printed.
func signed(t *testing.T, printed string, by ssh.PublicKey, text string) {
	t.Helper()
	k, s, ok := strings.Cut(strings.TrimSpace(printed), " ")
	if !ok || k != hex.EncodeToString(by.Marshal()) {
		t.Errorf("a step was told of the key %q, not of %x", k, by.Marshal())
		return
	}
	wire, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	var sig ssh.Signature
	if err := ssh.Unmarshal(wire, &sig); err != nil {
		t.Fatalf("the signature %x: %v", wire, err)
	}
	if err := by.Verify([]byte(text), &sig); err != nil {
		t.Errorf("the signature of %q: %v", text, err)
	}
}

// TestClientsEverything builds a Dockerfile that uses all that there is with both clients. No step of
// one is the other's.
func TestClientsEverything(t *testing.T) {
	guard(t)
	bed := kilnrun.Open(t, busybox, debian)
	e := newEverything(t, bed)
	s := serveBed(t, bed)
	for _, c := range s.clients() {
		t.Run(c.name, func(t *testing.T) {
			ref := bed.Host + "/everything-" + c.name
			out := e.build(c.in(t), ref)
			contains(t, out, "file ***", "variable ***")
			for _, secret := range []string{secretFile, secretToken} {
				if strings.Contains(out, secret) {
					t.Errorf("%q is printed:\n%s", secret, out)
				}
			}
			e.check(t, ref, c.name)
			if t.Failed() {
				t.Log(out)
			}
		})
	}
	for _, secret := range []string{secretFile, secretToken} {
		if strings.Contains(s.log(), secret) {
			t.Errorf("the server logs %q", secret)
		}
	}
	noSecretBelow(t, canaries{secretFile: "the file", secretToken: "the variable"}, bed.Store(), filepath.Join(bed.Dir, "registry"))
}
