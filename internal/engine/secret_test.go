package engine_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/engine"
	"github.com/kiln-build/kiln/internal/secret"
	"github.com/kiln-build/kiln/internal/source/remote"
)

// TestSecrets: a secret is where the step asks for it, not in its output, and not in the next step.
func TestSecrets(t *testing.T) {
	b := newBed(t)
	b.secrets = secrets{"token": "canary-tok3n\n", "env": "canary-env", "key": "-----\ncanary-line-one\ncanary-line-two\n"}
	g := &graph{}
	one := g.run(`cat /run/secrets/token; echo "$TOKEN and $EMPTY."; cat /key; stat -c '%a %u %g %s' /run/secrets/token /key; sleep 0.05; printf canary-; sleep 0.05; echo env
		ls /run/secrets > /list; wc -c < /key >> /list`, []engine.Mount{
		{Dest: "/run/secrets/token", Secret: &engine.SecretMount{ID: "token", Owner: engine.Owner{Mode: 0o400}}},
		{Dest: "/key", Secret: &engine.SecretMount{ID: "key", Owner: engine.Owner{UID: 5, GID: 6, Mode: 0o644}}},
		{Dest: "/run/secrets/none", Secret: &engine.SecretMount{ID: "none", Optional: true}},
	}, g.root())
	one.Do.(*engine.Exec).SecretEnv = []engine.SecretEnv{{Name: "TOKEN", ID: "env"}, {Name: "EMPTY", ID: "none", Optional: true}}
	g.run("ls /run /key 2>&1; echo $TOKEN; env; cat /proc/mounts | grep -e secrets -e key", nil, one).Do.(*engine.Exec).Success = []int{1}
	fs, steps, starts, err := b.solve(t, nil, &g.Graph)
	if err != nil || steps != 2 || starts != 2 {
		t.Fatalf("%d steps in %d sessions: %v", steps, starts, err)
	}
	if want := "***\n*** and .\n***\n***\n***\n400 0 0 13\n644 5 6 38\n***\n"; !strings.HasPrefix(b.output, want) {
		t.Errorf("output is %q, want %q", b.output, want)
	}
	if got := content(t, fs, "list"); got != "token\n38\n" {
		t.Errorf("the step saw %q", got)
	}
	if strings.Contains(b.output, "canary") {
		t.Errorf("a secret was printed: %q", b.output)
	}
	noCanary(t, b.st.Root())
	// Another value is no other step; another id is.
	b.secrets["token"] = "changed"
	if _, n, _, err := b.solve(t, nil, &g.Graph); err != nil || n != 0 {
		t.Errorf("%d steps with another value; %v", n, err)
	}
	one.Do.(*engine.Exec).Mounts[0].Secret.ID = "env"
	if _, n, _, err := b.solve(t, nil, &g.Graph); err != nil || n == 0 {
		t.Errorf("%d steps with another secret; %v", n, err)
	}
}

// noCanary looks for secrets in everything below a directory.
func noCanary(t *testing.T, root string) {
	t.Helper()
	files := 0
	if err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		c, err := os.ReadFile(p)
		if strings.Contains(string(c), "canary") {
			t.Errorf("%s has a secret", p)
		}
		files++
		return err
	}); err != nil || files == 0 {
		t.Error(files, err)
	}
}

// TestSecretMissing: a step does not run without what it needs.
func TestSecretMissing(t *testing.T) {
	for name, x := range map[string]struct {
		mount   []engine.Mount
		env     []engine.SecretEnv
		secrets remote.Secrets
		want    string
		code    int
	}{
		"none at all": {mount: []engine.Mount{{Dest: "/s", Secret: &engine.SecretMount{ID: "x"}}}, want: `secret x: not found`, code: diag.ExitDockerfile},
		"not this":    {mount: []engine.Mount{{Dest: "/s", Secret: &engine.SecretMount{ID: "x"}}}, secrets: secrets{"y": ""}, want: `secret x: not found`, code: diag.ExitDockerfile},
		"environment": {env: []engine.SecretEnv{{Name: "N", ID: "x"}}, want: `secret x: not found`, code: diag.ExitDockerfile},
		"too large": {
			env: []engine.SecretEnv{{Name: "N", ID: "x"}}, secrets: secrets{"x": strings.Repeat("x", secret.MaxSize+1)},
			want: `secret "x" has 512001 bytes`, code: diag.ExitFailure,
		},
		"failing":  {env: []engine.SecretEnv{{Name: "N", ID: "x", Optional: true}}, secrets: failing{}, want: `secret "x": the vault is shut`, code: diag.ExitFailure},
		"no agent": {mount: []engine.Mount{{Dest: "/s", SSH: &engine.SSHMount{ID: "default"}}}, want: `no SSH key "default": there is no such agent`, code: diag.ExitDockerfile},
	} {
		f := newFixture(t)
		op := f.exec("write a 1")
		op.Do.(*engine.Exec).Mounts, op.Do.(*engine.Exec).SecretEnv = x.mount, x.env
		f.c.Secrets = x.secrets
		_, err := f.solve(op)
		if err == nil || !strings.Contains(err.Error(), x.want) || diag.ExitCode(err) != x.code || len(f.box.ran) > 0 {
			t.Errorf("%s: %v (exit code %d), want %s; ran %q", name, err, diag.ExitCode(err), x.want, f.box.ran)
		}
	}
}

type failing struct{}

func (failing) Secret(context.Context, string) ([]byte, error) {
	return nil, errors.New("the vault is shut")
}

// agents answer with their name, and then in capitals.
type agents map[string]bool

// DialAgent implements remote.SSH.
func (a agents) DialAgent(_ context.Context, id string) (net.Conn, error) {
	works, ok := a[id]
	if !ok {
		return nil, fmt.Errorf("%q: %w", id, fs.ErrNotExist)
	}
	if !works {
		return nil, errors.New("it is on fire")
	}
	ours, theirs := net.Pipe()
	go func() {
		defer ours.Close()
		b := make([]byte, 4)
		if _, err := io.ReadFull(ours, b); err == nil {
			fmt.Fprintf(ours, "%s: %s\n", id, strings.ToUpper(string(b)))
		}
	}()
	return theirs, nil
}

// TestSSH: a step reaches the agent that it asks for, and the next one reaches none.
func TestSSH(t *testing.T) {
	b := newBed(t)
	b.agent = agents{"one": true, "two": true}
	g := &graph{}
	one := g.run("stat -c '%F %a %u' /a /b > /out; test -e /none || echo none >> /out; guesttool talk /a ping >> /out; guesttool talk /b pong >> /out", []engine.Mount{
		{Dest: "/usr/bin/guesttool", Input: 1, Source: "usr/bin/guesttool"},
		{Dest: "/a", SSH: &engine.SSHMount{ID: "one", Owner: engine.Owner{Mode: 0o600}}},
		{Dest: "/b", SSH: &engine.SSHMount{ID: "two", Owner: engine.Owner{UID: 7, Mode: 0o666}}},
		{Dest: "/none", SSH: &engine.SSHMount{ID: "three", Optional: true}},
	}, g.root(), g.add(local("tools")))
	g.run("ls /a /b > /after 2>&1; true", nil, one)
	fs, _, starts, err := b.solve(t, nil, &g.Graph)
	if err != nil || starts != 2 {
		t.Fatalf("%d sessions; %v", starts, err)
	}
	if got := content(t, fs, "out"); got != "socket 600 0\nsocket 666 7\nnone\none: PING\ntwo: PONG\n" {
		t.Errorf("the step saw %q", got)
	}
	if got := content(t, fs, "after"); strings.Count(got, "No such file") != 2 {
		t.Errorf("the next step saw %q", got)
	}
	if _, err := fs.Lstat("a"); err == nil {
		t.Error("the socket is in the result")
	}
}
