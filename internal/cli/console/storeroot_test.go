package console

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

func TestStoreRoot(t *testing.T) {
	for name, c := range map[string]struct {
		flag string
		env  map[string]string
		want string
	}{
		"flag":           {"/flag", map[string]string{"KILN_ROOT": "/env", "HOME": "/home/u"}, "/flag"},
		"KILN_ROOT":      {"", map[string]string{"KILN_ROOT": "/env", "XDG_DATA_HOME": "/xdg"}, "/env"},
		"XDG":            {"", map[string]string{"XDG_DATA_HOME": "/xdg", "HOME": "/home/u"}, "/xdg/kiln"},
		"relative XDG":   {"", map[string]string{"XDG_DATA_HOME": "xdg", "HOME": "/home/u"}, "/home/u/.local/share/kiln"},
		"HOME":           {"", map[string]string{"HOME": "/home/u"}, "/home/u/.local/share/kiln"},
		"flag over HOME": {"/a/../b", map[string]string{"HOME": "/home/u"}, "/b"},
	} {
		got, err := StoreRoot(c.flag, func(k string) string { return c.env[k] })
		if err != nil || got != c.want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, c.want)
		}
	}
}

// Without a home, as in a pod, the store is somewhere that can be written.
func TestStoreRootWithoutHome(t *testing.T) {
	for _, home := range []string{"", "/"} {
		got, err := StoreRoot("", func(k string) string { return map[string]string{"HOME": home}[k] })
		if err != nil {
			t.Fatal(err)
		}
		if got != systemStore && !strings.HasPrefix(got, filepath.Join(os.TempDir(), "kiln-")) {
			t.Errorf("HOME=%q: %q", home, got)
		}
	}
}

func TestPrivateTemp(t *testing.T) {
	uid := os.Geteuid()
	tmp := t.TempDir()
	dir, err := privateTemp(tmp, uid)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := privateTemp(tmp, uid); err != nil || again != dir {
		t.Errorf("the second time: %q, %v", again, err)
	}
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("made with mode %v, %v", fi.Mode(), err)
	}
	if err := os.Chmod(dir, 0o770); err != nil {
		t.Fatal(err)
	}
	wantRefused(t, tmp, uid, "others may use it")
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(t.TempDir(), dir); err != nil {
		t.Fatal(err)
	}
	wantRefused(t, tmp, uid, "not a directory")
	// Made here by somebody who is not uid+1.
	if err := os.Mkdir(filepath.Join(tmp, "kiln-"+strconv.Itoa(uid+1)), 0o700); err != nil {
		t.Fatal(err)
	}
	wantRefused(t, tmp, uid+1, "belongs to another user")
}

func wantRefused(t *testing.T, tmp string, uid int, why string) {
	t.Helper()
	if _, err := privateTemp(tmp, uid); err == nil || !strings.Contains(err.Error(), why) {
		t.Errorf("got %v, want %q", err, why)
	}
}
