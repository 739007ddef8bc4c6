package sshagent

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

func TestParse(t *testing.T) {
	for in, want := range map[string]Source{
		"default":            {ID: "default"},
		"":                   {ID: "default"},
		"k":                  {ID: "k"},
		"k=/a":               {ID: "k", Paths: []string{"/a"}},
		"k=/a,/b=c":          {ID: "k", Paths: []string{"/a", "/b=c"}},
		"k=":                 {ID: "k", Paths: []string{""}},
		"k=/a,raw=true":      {ID: "k", Paths: []string{"/a"}, Raw: true},
		"default=/a,raw=0":   {ID: "default", Paths: []string{"/a"}},
		"=/run/socket":       {ID: "default", Paths: []string{"/run/socket"}},
		"k=raw=true,/socket": {ID: "k", Paths: []string{"/socket"}, Raw: true},
	} {
		if got, err := Parse(in); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v %v, want %+v", in, got, err, want)
		}
	}
	for _, in := range []string{"k=raw=true", "k=/a,/b,raw=true", "k=/a,raw=x"} {
		if got, err := Parse(in); err == nil {
			t.Errorf("%s: %+v", in, got)
		}
	}
}

// keyFile makes a key, its file, and what an agent says of it.
func keyFile(t *testing.T, dir, name, passphrase string) (path string, pub ssh.PublicKey, key ed25519.PrivateKey) {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(key, "")
	if passphrase != "" {
		block, err = ssh.MarshalPrivateKeyWithPassphrase(key, "", []byte(passphrase))
	}
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	if pub, err = ssh.NewPublicKey(key.Public()); err != nil {
		t.Fatal(err)
	}
	return path, pub, key
}

func dial(t *testing.T, a *Agents, id string) net.Conn {
	t.Helper()
	c, err := a.DialAgent(context.Background(), id)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// client talks to an agent. It reads from its connection all the time: nobody else can.
func client(t *testing.T, a *Agents, id string) agent.ExtendedAgent {
	t.Helper()
	return agent.NewClient(dial(t, a, id))
}

func getenv(kv ...string) func(string) string {
	return func(k string) string {
		for i := 0; i < len(kv); i += 2 {
			if kv[i] == k {
				return kv[i+1]
			}
		}
		return ""
	}
}

// listen runs an agent with a key behind a socket.
func listen(t *testing.T, dir string) (path string, keys agent.Agent) {
	t.Helper()
	keys = agent.NewKeyring()
	_, _, key := keyFile(t, dir, "agents-key", "")
	if err := keys.Add(agent.AddedKey{PrivateKey: key, Comment: "in the agent"}); err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, "socket")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); _ = agent.ServeAgent(keys, c) }()
		}
	}()
	return path, keys
}

// TestKeys: an agent made of key files signs with them, on any number of connections.
func TestKeys(t *testing.T) {
	dir := t.TempDir()
	one, pub, _ := keyFile(t, dir, "one", "")
	two, _, _ := keyFile(t, dir, "two", "")
	a, err := Open([]Source{{ID: "default", Paths: []string{one, two}}, {ID: "other", Paths: []string{two}}}, getenv())
	if err != nil {
		t.Fatal(err)
	}
	for id, n := range map[string]int{"default": 2, "other": 1} {
		for range 2 {
			c := client(t, a, id)
			keys, err := c.List()
			if err != nil || len(keys) != n {
				t.Errorf("%s: %v %v", id, keys, err)
			}
		}
	}
	c := client(t, a, "default")
	sig, err := c.SignWithFlags(pub, []byte("text"), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := pub.Verify([]byte("text"), sig); err != nil {
		t.Error(err)
	}
}

// TestReadOnly: nothing can be changed, neither in an agent made of keys nor in one behind a socket.
func TestReadOnly(t *testing.T) {
	dir := t.TempDir()
	path, _, key := keyFile(t, dir, "one", "")
	sock, behind := listen(t, dir)
	a, err := Open([]Source{{ID: "keys", Paths: []string{path}}, {ID: "socket", Paths: []string{sock}}, {ID: "default"}}, getenv("SSH_AUTH_SOCK", sock))
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"keys", "socket", "default"} {
		c := client(t, a, id)
		keys, err := c.List()
		if err != nil || len(keys) != 1 {
			t.Fatalf("%s: %v %v", id, keys, err)
		}
		for what, err := range map[string]error{
			"add": c.Add(agent.AddedKey{PrivateKey: key}), "remove": c.Remove(keys[0]), "remove all": c.RemoveAll(),
			"lock": c.Lock([]byte("x")), "unlock": c.Unlock([]byte("x")),
		} {
			if err == nil {
				t.Errorf("%s: a build can %s", id, what)
			}
		}
		if _, err := c.Extension("session-bind@openssh.com", nil); err == nil {
			t.Errorf("%s: extensions work", id)
		}
		if keys, err := c.List(); err != nil || len(keys) != 1 {
			t.Errorf("%s: then %v %v", id, keys, err)
		}
	}
	if keys, err := behind.List(); err != nil || len(keys) != 1 {
		t.Errorf("the agent has %v %v", keys, err)
	}
}

// TestRaw: what is said to a raw socket reaches it as it is; both ends see the other's end.
func TestRaw(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b, _ := io.ReadAll(c)
		_, _ = c.Write(bytes.ToUpper(b))
	}()
	a, err := Open([]Source{{ID: "x", Paths: []string{path}, Raw: true}}, getenv())
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, a, "x")
	if _, err := c.Write([]byte("anything")); err != nil {
		t.Fatal(err)
	}
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || string(b) != "ANYTHING" {
		t.Errorf("%q %v", b, err)
	}
}

// TestHalfClosed: who has asked, and closes its side, gets the answer.
func TestHalfClosed(t *testing.T) {
	path, _, _ := keyFile(t, t.TempDir(), "one", "")
	a, err := Open([]Source{{ID: "x", Paths: []string{path}}}, getenv())
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, a, "x")
	if _, err := c.Write([]byte{0, 0, 0, 1, 11}); err != nil { // SSH_AGENTC_REQUEST_IDENTITIES
		t.Fatal(err)
	}
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || len(b) < 9 || b[4] != 12 || b[8] != 1 {
		t.Errorf("%q %v", b, err)
	}
}

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	sock, _ := listen(t, dir)
	key, _, _ := keyFile(t, dir, "key", "")
	locked, _, _ := keyFile(t, dir, "locked", "phrase")
	junk := filepath.Join(dir, "junk")
	if err := os.WriteFile(junk, []byte("secret canary"), 0o600); err != nil {
		t.Fatal(err)
	}
	large := filepath.Join(dir, "large")
	if err := os.WriteFile(large, make([]byte, maxKey+1), 0o600); err != nil {
		t.Fatal(err)
	}
	for want, ss := range map[string][]Source{
		"$SSH_AUTH_SOCK is not set":          {{ID: "default"}},
		"no such file":                       {{ID: "default", Paths: []string{filepath.Join(dir, "nosuch")}}},
		"a socket must be the only path":     {{ID: "default", Paths: []string{key, sock}}},
		"protected by a passphrase":          {{ID: "default", Paths: []string{locked}}},
		"neither a socket nor a private":     {{ID: "default", Paths: []string{junk}}},
		"more than 102400 bytes":             {{ID: "default", Paths: []string{large}}},
		"raw needs a socket":                 {{ID: "default", Paths: []string{key}, Raw: true}},
		`SSH agent "default" is given twice`: {{ID: "default", Paths: []string{key}}, {ID: "default", Paths: []string{sock}}},
	} {
		_, err := Open(ss, getenv())
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "canary") {
			t.Errorf("%v: %v, want %s", ss, err, want)
		}
	}
	a, err := Open([]Source{{ID: "default", Paths: []string{sock}}}, getenv())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.DialAgent(context.Background(), "other"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if err := os.Remove(sock); err != nil {
		t.Fatal(err)
	}
	if _, err := a.DialAgent(context.Background(), "default"); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a socket that is gone: %v", err)
	}
}
