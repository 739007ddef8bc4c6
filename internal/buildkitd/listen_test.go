package buildkitd

import (
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/store"
)

// TestListenUnix makes a socket for its user alone, in place of one whose server is gone, but not of
// one that is alive or of something else.
func TestListenUnix(t *testing.T) {
	dir, err := os.MkdirTemp("", "kiln") // sockets' paths must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "new", "s.sock")
	l, err := Listen("unix://"+path, ListenOptions{GID: -1})
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Lstat(path); err != nil || fi.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("the socket is %v, %v", fi.Mode(), err)
	}
	if l.Addr().String() != path || Open(l) {
		t.Errorf("it is at %s, open: %v", l.Addr(), Open(l))
	}
	if _, err := Listen("unix://"+path, ListenOptions{GID: -1}); err == nil || !strings.Contains(err.Error(), "another server") {
		t.Errorf("a second server: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) > 0 {
		t.Errorf("%v is left, %v", left, err)
	}

	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	l, err = Listen("unix://"+path, ListenOptions{GID: os.Getgid()})
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Lstat(path); err != nil || fi.Mode() != fs.ModeSocket|0o660 {
		t.Errorf("a group's socket is %v, %v", fi.Mode(), err)
	}
	l.Close()

	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen("unix://"+path, ListenOptions{GID: -1}); err == nil {
		t.Error("a file is in the way, and nobody minds")
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "mine" {
		t.Errorf("the file is %q, %v", b, err)
	}
}

func TestListenElsewhere(t *testing.T) {
	for _, addr := range []string{"", "unix://", "tcp://", "127.0.0.1:0", "npipe://x", "fd://"} {
		if l, err := Listen(addr, ListenOptions{GID: -1}); err == nil {
			l.Close()
			t.Errorf("%q is an address", addr)
		}
	}
	for addr, open := range map[string]bool{"tcp://127.0.0.1:0": false, "tcp://0.0.0.0:0": true} {
		l, err := Listen(addr, ListenOptions{GID: -1})
		if err != nil {
			t.Fatal(err)
		}
		if Open(l) != open {
			t.Errorf("%s is open to others: %v", addr, !open)
		}
		l.Close()
	}
	env := func(dir string) func(string) string { return func(string) string { return dir } }
	for want, got := range map[string]string{
		"unix:///run/user/7/buildkit/buildkitd.sock": DefaultAddr(7, env("/run/user/7:/x")),
		"unix:///run/buildkit/buildkitd.sock":        DefaultAddr(0, env("/run/user/0")),
	} {
		if got != want {
			t.Errorf("the default is %s, not %s", got, want)
		}
	}
}

func TestServerTLSFiles(t *testing.T) {
	nothing := filepath.Join(t.TempDir(), "none.pem")
	for _, c := range [][3]string{{"", "k", ""}, {"c", "", ""}, {nothing, nothing, ""}} {
		if _, err := ServerTLS(c[0], c[1], c[2]); err == nil {
			t.Errorf("%q is accepted", c)
		}
	}
}

func TestReadConfig(t *testing.T) {
	path := filepath.Join(t.TempDir(), "buildkitd.toml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(`
insecure-entitlements = ["network.host"]
[grpc]
  address = ["tcp://0.0.0.0:1234"]
  gid = 5
[worker.oci]
  snapshotter = "overlayfs"
  max-parallelism = 3
  reservedSpace = "1GB"
  maxUsedSpace = 2000000000
[registry."docker.io"]
  mirrors = ["mirror.example.com"]
[registry."R.example.com:5000"]
  http = true
  ca = ["/ca.pem"]
  [[registry."R.example.com:5000".keypair]]
    key = "/k.pem"
    cert = "/c.pem"
`)
	c, ignored, err := ReadConfig(path, true)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(ignored, []string{"worker.oci.snapshotter"}) {
		t.Errorf("ignored is %q", ignored)
	}
	if c.Worker.OCI.Parallelism != 3 || *c.GRPC.GID != 5 || !slices.Equal(c.Entitlements, []string{"network.host"}) {
		t.Errorf("read: %+v", c)
	}
	st, err := store.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if l, ok, err := c.Limit(st); err != nil || !ok || l.Reserved != 1_000_000_000 || l.MaxUsed != 2_000_000_000 {
		t.Errorf("limit %+v, %v, %v", l, ok, err)
	}
	var o registry.Options
	c.Registries(&o)
	if !slices.Equal(o.Insecure, []string{"R.example.com:5000"}) || !slices.Equal(o.Mirrors["docker.io"], []string{"mirror.example.com"}) {
		t.Errorf("registries %+v", o)
	}
	if k := o.Certs["r.example.com:5000"]; !slices.Equal(k.CAs, []string{"/ca.pem"}) || len(k.Pairs) != 1 || k.Pairs[0].Key != "/k.pem" {
		t.Errorf("certificates %+v", o.Certs)
	}

	write(`debug = "perhaps"`)
	if _, _, err := ReadConfig(path, true); err == nil {
		t.Error("a value of the wrong type is accepted")
	}
	write("# " + strings.Repeat("x", maxConfig))
	if _, _, err := ReadConfig(path, true); err == nil {
		t.Error("a huge file is accepted")
	}
	if _, _, err := ReadConfig(path+"2", false); err != nil {
		t.Errorf("one that is not there: %v", err)
	}
	if _, _, err := ReadConfig(path+"2", true); err == nil {
		t.Error("one that is asked for and not there is empty")
	}
}
