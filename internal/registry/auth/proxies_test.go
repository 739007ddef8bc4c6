package auth

import (
	"maps"
	"os"
	"path/filepath"
	"testing"
)

func TestProxies(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	t.Setenv("HTTP_PROXY", "http://user:secret@builders.own:1")
	got, err := Proxies()
	if err != nil || len(got) != 0 {
		t.Errorf("without a config: %v, %v", got, err)
	}
	config := `{"proxies": {"default": {"httpProxy": "http://p:3128", "noProxy": "a,b"}, "tcp://other": {"ftpProxy": "x"}}}`
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"HTTP_PROXY": "http://p:3128", "http_proxy": "http://p:3128", "NO_PROXY": "a,b", "no_proxy": "a,b"}
	if got, err = Proxies(); err != nil || !maps.Equal(got, want) {
		t.Errorf("got %v, %v", got, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"proxies": 3}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Proxies(); err == nil {
		t.Error("a config of the wrong kind is taken")
	}
}
