package registry_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/registry"
)

func TestNormalizeRef(t *testing.T) {
	sum := "sha256:" + strings.Repeat("a", 64)
	for in, want := range map[string]string{
		"debian":                         "docker.io/library/debian:latest",
		"debian:bookworm":                "docker.io/library/debian:bookworm",
		"team/app":                       "docker.io/team/app:latest",
		"docker.io/debian":               "docker.io/library/debian:latest",
		"index.docker.io/team/app:1":     "docker.io/team/app:1",
		"quay.io/team/app":               "quay.io/team/app:latest",
		"localhost/app":                  "localhost/app:latest",
		"localhost:5000/app:v1":          "localhost:5000/app:v1",
		"[::1]:5000/app":                 "[::1]:5000/app:latest",
		"debian@" + sum:                  "docker.io/library/debian@" + sum,
		"r.example:5000/a/b:1@" + sum:    "r.example:5000/a/b:1@" + sum,
		"a/b/c/d/e":                      "docker.io/a/b/c/d/e:latest",
		"192.168.1.1:5000/x__y--z.w/app": "192.168.1.1:5000/x__y--z.w/app:latest",
	} {
		got, err := registry.NormalizeRef(in)
		if err != nil || got != want {
			t.Errorf("%s: %q, %v; want %q", in, got, err, want)
		}
		again, err := registry.NormalizeRef(got)
		if err != nil || again != got {
			t.Errorf("%s: not stable: %q, %v", in, again, err)
		}
	}
	for in, want := range map[string]string{
		"":                              "",
		"Debian":                        "lower case",
		"r.example/Team/App:1":          "lower case",
		"https://r.example/a":           "https://",
		"a b":                           "",
		"app:":                          "",
		"app@sha256:short":              "",
		"../../etc":                     "",
		"r.example/a/../b":              "",
		"app:v1:v2":                     "",
		strings.Repeat("a/", 200) + "a": "",
		strings.Repeat("a", 5000):       "too long",
		"app\x1b[31m":                   "",
		strings.Repeat("0", 64):         "",
		"r.example/a@md5:" + sum[len("sha256:"):]: "",
	} {
		_, err := registry.NormalizeRef(in)
		var d *diag.Error
		if !errors.As(err, &d) || d.Code != diag.ExitUsage || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v; want %q", in, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "\x1b") {
			t.Errorf("%q: the error has control characters", in)
		}
	}
}

func TestRepository(t *testing.T) {
	sum := "sha256:" + strings.Repeat("a", 64)
	for in, want := range map[string]string{
		"debian": "docker.io/library/debian", "r.example:5000/a/b:1@" + sum: "r.example:5000/a/b", "docker.io/a/b": "docker.io/a/b",
	} {
		if got, err := registry.Repository(in); err != nil || got != want {
			t.Errorf("%s: %q, %v", in, got, err)
		}
	}
	if _, err := registry.Repository("A"); err == nil {
		t.Error("no error")
	}
}

func FuzzNormalizeRef(f *testing.F) {
	for _, s := range []string{"debian", "r.example:5000/a/b:1", "a@sha256:" + strings.Repeat("a", 64), "[::1]:5000/a", "A/b", ":@/"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		full, err := registry.NormalizeRef(s)
		if err != nil {
			return
		}
		if again, err := registry.NormalizeRef(full); err != nil || again != full {
			t.Errorf("%q: %q, then %q, %v", s, full, again, err)
		}
		repo, err := registry.Repository(s)
		if err != nil || !strings.HasPrefix(full, repo) || strings.Contains(repo, "..") {
			t.Errorf("%q: repository %q, %v", s, repo, err)
		}
	})
}
