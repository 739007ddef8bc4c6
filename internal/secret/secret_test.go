package secret

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for in, want := range map[string]Source{
		"id=a":                        {ID: "a"},
		"id=a,src=/f":                 {ID: "a", File: "/f"},
		"id=a,source=f":               {ID: "a", File: "f"},
		"ID=a,SRC=f,type=file":        {ID: "a", File: "f"},
		"id=a,env=E":                  {ID: "a", Env: "E"},
		"type=env,id=a":               {ID: "a"},
		"type=env,id=a,src=E":         {ID: "a", Env: "E"},
		"type=env,id=a,env=E,src=f":   {ID: "a", Env: "E", File: "f"},
		`id=a,"src=/with,comma"`:      {ID: "a", File: "/with,comma"},
		"id=a,src=/with=equal":        {ID: "a", File: "/with=equal"},
		"id=a,src=f,id=b":             {ID: "b", File: "f"},
		"type=file,id=a,env=E,src=/f": {ID: "a", Env: "E", File: "/f"},
	} {
		if got, err := Parse(in); err != nil || got != want {
			t.Errorf("%s: %+v %v, want %+v", in, got, err, want)
		}
	}
	for in, want := range map[string]string{
		"": "EOF", "a": "not a list of KEY=VALUE", "src=f": "no id", "id=": "no id", "id=a,foo=b": `"foo" is not known`, "id=a,type=x": `"x" is neither`, `id=a,"`: "quote",
	} {
		if got, err := Parse(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %+v %v, want %s", in, got, err, want)
		}
	}
}

// TestSecrets: where values come from, and that they are read late.
func TestSecrets(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	write := func(name, content string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("f", "early")
	write("both", "file both")
	write("largest", strings.Repeat("x", MaxSize))
	env := map[string]string{"E": "value", "both": "variable both", "huge": strings.Repeat("x", MaxSize+1)}
	s, err := Open([]Source{
		{ID: "file", File: "f"},
		{ID: "env", Env: "E"},
		{ID: "f"},
		{ID: "both"},
		{ID: "unset", Env: "nosuch"},
		{ID: "envfirst", Env: "E", File: "nosuch"},
		{ID: "largest", File: "largest"},
		{ID: "grows", File: "largest"},
		{ID: "huge", Env: "huge"},
		{ID: "twice", Env: "nosuch"},
		{ID: "twice", Env: "E"},
	}, func(k string) (string, bool) { v, ok := env[k]; return v, ok })
	if err != nil {
		t.Fatal(err)
	}
	write("f", "late")
	for id, want := range map[string]string{
		"file": "late", "env": "value", "f": "late", "both": "variable both", "unset": "", "envfirst": "value", "largest": strings.Repeat("x", MaxSize), "twice": "value",
	} {
		if got, err := s.Secret(context.Background(), id); err != nil || string(got) != want {
			t.Errorf("%s: %.20q %v", id, got, err)
		}
	}
	if _, err := s.Secret(context.Background(), "other"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	write("largest", strings.Repeat("x", MaxSize+1))
	for _, id := range []string{"grows", "huge"} {
		if _, err := s.Secret(context.Background(), id); err == nil || !strings.Contains(err.Error(), "more than 512000 are refused") {
			t.Errorf("%s: %v", id, err)
		}
	}
	if err := os.Remove("f"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Secret(context.Background(), "f"); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is gone: %v", err)
	}
	for _, src := range []Source{{ID: "nosuch"}, {ID: "a", File: "nosuch"}, {ID: "big", File: "largest"}} {
		if _, err := Open([]Source{src}, func(string) (string, bool) { return "", false }); err == nil || !strings.Contains(err.Error(), src.ID) {
			t.Errorf("%+v: %v", src, err)
		}
	}
}
