package auth

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/kiln-build/kiln/internal/diag"
)

func b64(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

// env makes a home with the given files, relative to it, and returns it.
func env(t *testing.T, files map[string]string) string {
	t.Helper()
	home := t.TempDir()
	t.Setenv("HOME", home)
	for _, v := range []string{"DOCKER_CONFIG", "DOCKER_AUTH_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"} {
		t.Setenv(v, "")
	}
	for path, content := range files {
		write(t, filepath.Join(home, path), content, 0o600)
	}
	return home
}

func write(t *testing.T, path, content string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
}

// lookup returns "user:password", or what the keychain has instead.
func lookup(t *testing.T, repository string) (string, error) {
	t.Helper()
	repo, err := name.NewRepository(repository)
	if err != nil {
		t.Fatal(err)
	}
	a, err := Default().ResolveContext(t.Context(), repo)
	if err != nil {
		return "", err
	}
	if a == authn.Anonymous {
		return "none", nil
	}
	cfg, err := a.Authorization()
	if err != nil {
		return "", err
	}
	switch {
	case cfg.IdentityToken != "":
		return "identity " + cfg.IdentityToken, nil
	case cfg.RegistryToken != "":
		return "registry " + cfg.RegistryToken, nil
	}
	return cfg.Username + ":" + cfg.Password, nil
}

func TestLookup(t *testing.T) {
	env(t, map[string]string{".docker/config.json": `{"auths": {
		"https://index.docker.io/v1/": {"auth": "` + b64("hub:pw") + `"},
		"quay.io": {"auth": "` + b64("quay:pw") + `"},
		"quay.io/team": {"auth": "` + b64("team:pw") + `"},
		"quay.io/team/app": {"auth": "` + b64("app:p:w") + `"},
		"only.example/team": {"auth": "` + b64("scoped:pw") + `"},
		"https://old.example/v1/": {"auth": "` + b64("old:pw") + `"},
		"http://plain.example": {"username": "plain", "password": "pw"},
		"https://path.example/deep/path": {"auth": "` + b64("path:pw") + `"},
		"token.example": {"identitytoken": "idt"},
		"bearer.example": {"registrytoken": "rt"},
		"acr.example": {"auth": "` + b64("00000000-0000-0000-0000-000000000000:") + `", "identitytoken": "refresh"},
		"port.example:5000": {"auth": "` + b64("port:pw") + `"},
		"nul.example": {"auth": "` + b64("nul:pw\x00\x00") + `"},
		"empty.example": {}
	}}`})
	for repo, want := range map[string]string{
		"debian":                        "hub:pw",
		"docker.io/team/app":            "hub:pw",
		"registry-1.docker.io/team/app": "hub:pw",
		"quay.io/other/app":             "quay:pw",
		"quay.io/team/app":              "app:p:w",
		"quay.io/team/app/sub":          "app:p:w",
		"quay.io/team/other":            "team:pw",
		"quay.io/teamster/app":          "quay:pw",
		"only.example/team/app":         "scoped:pw",
		"only.example/other/app":        "none",
		"old.example/a/b":               "old:pw",
		"plain.example/a/b":             "plain:pw",
		"path.example/a/b":              "none",
		"token.example/a/b":             "identity idt",
		"bearer.example/a/b":            "registry rt",
		"acr.example/a/b":               "identity refresh",
		"port.example:5000/a/b":         "port:pw",
		"port.example/a/b":              "none",
		"port.example:5001/a/b":         "none",
		"nul.example/a/b":               "nul:pw",
		"empty.example/a/b":             "none",
		// Names that only look like one that has a credential.
		"quay.io.evil.example/team/app": "none",
		"evil-quay.io/team/app":         "none",
		"sub.quay.io/team/app":          "none",
		"io/quay.io/team":               "hub:pw",
	} {
		if got, err := lookup(t, repo); err != nil || got != want {
			t.Errorf("%s: %q, %v; want %q", repo, got, err, want)
		}
	}
}

func TestPlaces(t *testing.T) {
	conf := func(user string) string { return `{"auths":{"r.example":{"auth":"` + b64(user+":pw") + `"}}}` }
	home := env(t, map[string]string{
		".docker/config.json":          conf("docker"),
		"other/config.json":            conf("other"),
		"authfile.json":                conf("authfile"),
		"run/containers/auth.json":     conf("runtime"),
		".config/containers/auth.json": conf("config"),
	})
	check := func(want string) {
		t.Helper()
		if got, err := lookup(t, "r.example/a/b"); err != nil || got != want+":pw" && got != want {
			t.Errorf("got %q, %v; want %q", got, err, want)
		}
	}
	remove := func(path string) {
		t.Helper()
		if err := os.Remove(filepath.Join(home, path)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("XDG_RUNTIME_DIR", home+"/run")
	check("docker")
	t.Setenv("REGISTRY_AUTH_FILE", home+"/authfile.json")
	check("authfile")
	t.Setenv("DOCKER_CONFIG", home+"/other")
	check("other")
	t.Setenv("DOCKER_AUTH_CONFIG", conf("inline"))
	check("inline")
	// One that has nothing for the registry is passed over.
	t.Setenv("DOCKER_AUTH_CONFIG", `{"auths":{"else.example":{"auth":"`+b64("a:b")+`"}}}`)
	check("other")
	remove("other/config.json")
	check("authfile")
	remove("authfile.json")
	check("runtime")
	t.Setenv("XDG_RUNTIME_DIR", "")
	check("config")
	remove(".config/containers/auth.json")
	check("none")
	t.Setenv("DOCKER_CONFIG", "")
	check("docker")
}

func TestBrokenFilesAreNamedButNotShown(t *testing.T) {
	for what, content := range map[string]string{
		"not JSON":   `{"auths": {"r.example": {"auth": "hunter2"`,
		"wrong type": `{"auths": {"r.example": {"password": ["hunter2"]}}}`,
		"no list":    `["hunter2"]`,
		"base64":     `{"auths": {"r.example": {"auth": "hunter2!"}}}`,
		"no colon":   `{"auths": {"r.example": {"auth": "` + b64("hunter2") + `"}}}`,
	} {
		home := env(t, map[string]string{".docker/config.json": content})
		_, err := lookup(t, "r.example/a/b")
		if err == nil || !strings.Contains(err.Error(), home+"/.docker/config.json") || diag.ExitCode(err) != diag.ExitRegistry {
			t.Errorf("%s: %v", what, err)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: shows the secret: %v", what, err)
		}
	}
	// A broken entry for another registry is nobody's trouble.
	env(t, map[string]string{".docker/config.json": `{"auths": {"x.example": {"auth": "!"}, "r.example": {"auth": "` + b64("a:b") + `"}}}`})
	if got, err := lookup(t, "r.example/a/b"); got != "a:b" {
		t.Errorf("%q, %v", got, err)
	}
}

// A helper that keeps its credentials in files.
const helperScript = `#!/bin/sh
dir=$HELPER_DIR
read -r in
case $1 in
get)
	case $in in *slow*) exec sleep 60;; *broken*) echo "no keyring here" >&2; exit 3;; *garbage*) echo hunter2; exit 0;; esac
	f="$dir/$(echo "$in" | tr '/:' '__')"
	[ -f "$f" ] || { echo "credentials not found in native keychain"; exit 1; }
	cat "$f";;
store)
	url=$(echo "$in" | sed 's/.*"ServerURL":"\([^"]*\)".*/\1/')
	echo "$in" > "$dir/$(echo "$url" | tr '/:' '__')";;
erase)
	rm "$dir/$(echo "$in" | tr '/:' '__')";;
esac
`

func withHelper(t *testing.T, home string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	write(t, filepath.Join(home, "bin/docker-credential-test"), helperScript, 0o700)
	t.Setenv("PATH", filepath.Join(home, "bin")+":"+os.Getenv("PATH"))
	t.Setenv("HELPER_DIR", dir)
	return dir
}

func TestHelpers(t *testing.T) {
	home := env(t, map[string]string{".docker/config.json": `{
		"auths": {"file.example": {"auth": "` + b64("file:pw") + `"}, "missing.example": {"auth": "` + b64("m:pw") + `"}},
		"credHelpers": {"helped.example": "test", "token.example": "test", "broken.example": "test",
			"garbage.example": "test", "missing.example": "not-here", "evil.example": "../../bin/sh"}}`})
	dir := withHelper(t, home)
	write(t, dir+"/helped.example", `{"ServerURL":"x","Username":"helper","Secret":"s3cret"}`, 0o600)
	write(t, dir+"/token.example", `{"Username":"<token>","Secret":"idt"}`, 0o600)
	for repo, want := range map[string]string{
		"helped.example/a/b": "helper:s3cret",
		"token.example/a/b":  "identity idt",
		"file.example/a/b":   "file:pw",
		"other.example/a/b":  "none",
	} {
		if got, err := lookup(t, repo); err != nil || got != want {
			t.Errorf("%s: %q, %v", repo, got, err)
		}
	}
	for repo, parts := range map[string][]string{
		"broken.example/a/b":  {`"docker-credential-test"`, "no keyring here", "exit status 3"},
		"garbage.example/a/b": {`"docker-credential-test"`, "protocol"},
		"missing.example/a/b": {`"docker-credential-not-here"`, "PATH"},
		"evil.example/a/b":    {"../../bin/sh", "plain name"},
	} {
		got, err := lookup(t, repo)
		for _, p := range parts {
			if err == nil || !strings.Contains(err.Error(), p) {
				t.Errorf("%s: %q, %v; want %q", repo, got, err, p)
			}
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("shows what the helper said: %v", err)
		}
		var d *diag.Error
		if errors.As(err, &d) && d.Hint != "" && !strings.Contains(d.Hint, home+"/.docker/config.json") {
			t.Errorf("hint %q", d.Hint)
		}
	}
}

func TestCredsStoreBeforeFile(t *testing.T) {
	home := env(t, map[string]string{".docker/config.json": `{"credsStore": "test", "auths": {
		"both.example": {"auth": "` + b64("file:pw") + `"}, "file.example": {"auth": "` + b64("file:pw") + `"}, "both.example/x": {}}}`})
	dir := withHelper(t, home)
	write(t, dir+"/both.example", `{"Username":"store","Secret":"pw"}`, 0o600)
	write(t, dir+"/https___index.docker.io_v1_", `{"Username":"hub","Secret":"pw"}`, 0o600)
	for repo, want := range map[string]string{
		"both.example/a/b": "store:pw", "file.example/a/b": "file:pw", "debian": "hub:pw", "no.example/a": "none",
	} {
		if got, err := lookup(t, repo); err != nil || got != want {
			t.Errorf("%s: %q, %v", repo, got, err)
		}
	}
}

func TestHelperThatHangsIsStopped(t *testing.T) {
	home := env(t, map[string]string{".docker/config.json": `{"credHelpers": {"slow.example": "test"}}`})
	withHelper(t, home)
	stop := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	go cancel(stop)
	repo, err := name.NewRepository("slow.example/a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Default().ResolveContext(ctx, repo); !errors.Is(err, stop) {
		t.Errorf("got %v", err)
	}
}

func TestStoreAndErase(t *testing.T) {
	const before = `{"auths":{"keep.example":{"auth":"eDp5","email":"me@example"},"https://r.example/v1/":{"auth":"eDp5"}},` +
		`"HttpHeaders":{"X":"y"},"futureField":{"n":12345678901234567890,"s":["a"]},"psFormat":"p"}`
	home := env(t, map[string]string{"real.json": before})
	t.Setenv("DOCKER_CONFIG", home+"/cfg")
	path := home + "/cfg/config.json"
	if err := os.Mkdir(home+"/cfg", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../real.json", path); err != nil {
		t.Fatal(err)
	}
	where, plain, err := Store(t.Context(), "r.example", "ann", "p:w")
	if err != nil || where != path || !plain {
		t.Fatal(where, plain, err)
	}
	if fi, err := os.Lstat(path); err != nil || fi.Mode()&os.ModeSymlink == 0 {
		t.Error("the symbolic link is gone")
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	if got, err := lookup(t, "r.example/a"); got != "ann:p:w" {
		t.Errorf("%q, %v", got, err)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"12345678901234567890", "futureField", "psFormat", "me@example", `"X": "y"`} {
		if !strings.Contains(string(raw), want) {
			t.Errorf("%s is lost:\n%s", want, raw)
		}
	}
	found, err := Erase(t.Context(), "r.example")
	if !found || err != nil {
		t.Errorf("erase: %v, %v", found, err)
	}
	if got, err := lookup(t, "r.example/a"); got != "none" {
		t.Errorf("after erase: %q, %v", got, err)
	}
	if found, err = Erase(t.Context(), "r.example"); found || err != nil {
		t.Errorf("again: %v, %v", found, err)
	}
	var a, b map[string]any
	raw, _ = os.ReadFile(path)
	if json.Unmarshal(raw, &a) != nil || json.Unmarshal([]byte(before), &b) != nil ||
		fmt.Sprint(a["futureField"], a["HttpHeaders"]) != fmt.Sprint(b["futureField"], b["HttpHeaders"]) {
		t.Errorf("changed more than the entry:\n%s", raw)
	}
	if left, err := filepath.Glob(home + "/.config.json.*"); len(left) != 0 || err != nil {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestStoreMakesTheFile(t *testing.T) {
	home := env(t, nil)
	for _, host := range []string{"docker.io", "index.docker.io"} {
		if _, _, err := Store(t.Context(), host, "ann", "pw"); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := os.ReadFile(home + "/.docker/config.json")
	if err != nil || strings.Count(string(raw), "auth\"") != 1 || !strings.Contains(string(raw), HubKey) {
		t.Errorf("%s, %v", raw, err)
	}
	fi, err := os.Stat(home + "/.docker")
	if err != nil || fi.Mode().Perm() != 0o700 {
		t.Error(fi.Mode(), err)
	}
	if found, err := Erase(t.Context(), "docker.io"); !found || err != nil {
		t.Error(found, err)
	}
}

func TestStoreInHelper(t *testing.T) {
	home := env(t, map[string]string{".docker/config.json": `{"credsStore": "test"}`})
	withHelper(t, home)
	where, plain, err := Store(t.Context(), "r.example", "ann", "pw")
	if err != nil || where != "docker-credential-test" || plain {
		t.Fatal(where, plain, err)
	}
	raw, err := os.ReadFile(home + "/.docker/config.json")
	if err != nil || strings.Contains(string(raw), b64("ann:pw")) || !strings.Contains(string(raw), `"r.example": {}`) {
		t.Errorf("%s, %v", raw, err)
	}
	if got, err := lookup(t, "r.example/a"); got != "ann:pw" {
		t.Errorf("%q, %v", got, err)
	}
	if found, err := Erase(t.Context(), "r.example"); !found || err != nil {
		t.Error(found, err)
	}
	if got, err := lookup(t, "r.example/a"); got != "none" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestStoreDestroysNothing(t *testing.T) {
	for _, content := range []string{`[1]`, `{"auths": 5}`, `{"auths": {`} {
		home := env(t, map[string]string{".docker/config.json": content})
		if _, _, err := Store(t.Context(), "r.example", "ann", "pw"); err == nil {
			t.Errorf("%s: no error", content)
		}
		if raw, err := os.ReadFile(home + "/.docker/config.json"); err != nil || string(raw) != content {
			t.Errorf("%s is now %s, %v", content, raw, err)
		}
	}
}

func TestCredentialsDoNotPrint(t *testing.T) {
	c := NewCredential("ann", "hunter2", "here")
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "cred", c)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "cred", c)
	text := fmt.Sprintf("%v %+v %#v %s %q", c, c, c, c, c) + log.String()
	if strings.Contains(text, "hunter2") || !strings.Contains(text, `user "ann" from here`) {
		t.Error(text)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"", "{}", `{"auths":{"a.example":{"auth":"eDp5"}}}`, `{"auths":{"https://a.example/v1/":{"identitytoken":"x"}}}`,
		`{"auths":{"a.example/ns":{"username":"u","password":"p"}}}`, `{"auths":null}`, `[]`,
	} {
		f.Add(s, "a.example", "a.example/ns/app")
	}
	f.Fuzz(func(t *testing.T, config, host, repo string) {
		cf, err := parse([]byte(config), "fuzz")
		if err != nil {
			return
		}
		cf.CredsStore, cf.CredHelpers = "", nil // no processes
		keys := lookupKeys(host, repo)
		c, err := cf.find(t.Context(), keys, helperGet)
		if err != nil || c == nil {
			return
		}
		if c.cfg.Username == "" && c.cfg.IdentityToken == "" && c.cfg.RegistryToken == "" {
			t.Errorf("an empty credential from %q", config)
		}
	})
}
