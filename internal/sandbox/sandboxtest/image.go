package sandboxtest

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/layer"
)

// entry is an entry of a test image's layer.
type entry struct {
	tar.Header
	content []byte
}

func dir(name string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755}}
}

func file(name, content string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, content: []byte(content)}
}

func program(name string, content []byte) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o755}, content: content}
}

func symlink(name, target string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
}

func hardlink(name, target string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}}
}

// imageTime is the time of everything in a test image.
var imageTime = time.Unix(1700000000, 123456789)

// writeTar makes the tar of a layer.
func writeTar(t testing.TB, entries []entry) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		h.Format = tar.FormatPAX
		if h.ModTime.IsZero() {
			h.ModTime = imageTime
		}
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(e.content))
		}
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatalf("make test image: %v", err)
		}
		if _, err := tw.Write(e.content); err != nil {
			t.Fatalf("make test image: %v", err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatalf("make test image: %v", err)
	}
	return b.Bytes()
}

// layerFile makes a layer file of a tar.
func layerFile(t testing.TB, r io.Reader) string {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "layer-*")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := layer.Convert(context.Background(), r, f, layer.Limits{}); err != nil {
		t.Fatalf("make layer file: %v", err)
	}
	return f.Name()
}

// image makes a layer file of entries.
func image(t testing.TB, entries ...entry) string {
	t.Helper()
	return layerFile(t, bytes.NewReader(writeTar(t, entries)))
}

// applets are the names that the test images have busybox under.
const applets = "ash sh [ adduser awk basename cat chmod chown cmp cp cut date dd df dirname du echo env expr false find " +
	"grep head hexdump hostname id ifconfig ip kill ln ls md5sum mkdir mkfifo mknod mktemp mv nc nohup od ping printf ps pwd readlink " +
	"realpath rm rmdir sed seq setsid sleep sort stat su sync tail tar test timeout touch tr true truncate umount uname uniq wc which whoami xargs yes mount cttyhack"

// busybox reads the static busybox that the test images are made of.
func busybox(t testing.TB) []byte {
	t.Helper()
	for _, p := range []string{os.Getenv("KILN_TEST_BUSYBOX"), "/bin/busybox", "/usr/bin/busybox", "/bin/busybox-static"} {
		if b, err := os.ReadFile(p); err == nil {
			if bytes.Contains(b, []byte("/lib64/ld-linux")) {
				continue // a dynamic one
			}
			return b
		}
	}
	t.Fatal("the sandbox tests need a static busybox: apt-get install busybox-static, or KILN_TEST_BUSYBOX=/path/of/it")
	return nil
}

// base are the entries of an image with a shell.
func base(t testing.TB) []entry {
	t.Helper()
	es := []entry{
		dir("bin"), program("bin/busybox", busybox(t)), dir("dev"), dir("etc"),
		file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n"),
		file("etc/group", "root:x:0:\nuser:x:1000:\nstaff:x:50:user\n"),
		dir("proc"), dir("sys"),
		{Header: tar.Header{Typeflag: tar.TypeDir, Name: "root/", Mode: 0o700}},
		{Header: tar.Header{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777}},
		dir("usr"), dir("usr/bin"),
	}
	for _, a := range strings.Fields(applets) {
		es = append(es, symlink("bin/"+a, "busybox"))
	}
	return es
}
