package sandboxtest

import (
	"archive/tar"
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/internal/sandbox"
)

func testSuppliedFiles(t *testing.T, h *harness) {
	const look = "cat /etc/resolv.conf /etc/hosts /etc/hostname"
	const want = "nameserver 192.0.2.1\n127.0.0.1 localhost\nbuildkitsandbox\n"
	for name, img := range map[string][]entry{
		"missing":           nil,
		"files":             {file("etc/resolv.conf", "image's"), file("etc/hosts", "image's"), file("etc/hostname", "image's")},
		"dangling symlinks": {symlink("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf"), symlink("etc/hosts", "/no/where/hosts")},
		"symlinks":          {dir("run"), file("run/r", "image's"), symlink("etc/resolv.conf", "../run/r"), symlink("etc/hosts", "/run/../run/h")},
		"symlinked etc":     {dir("usr/etc"), file("etc/.wh..wh..opq", ""), file(".wh.etc", "")},
		"opaque etc":        {dir("etc"), file("etc/.wh..wh..opq", ""), file("etc/other", "x")},
		"escaping symlink":  {symlink("etc/resolv.conf", "../../../../../../etc/hidden/resolv.conf")},
	} {
		t.Run(name, func(t *testing.T) {
			layers := []string{h.base}
			if name == "symlinked etc" {
				layers = append(layers, image(t, file(".wh.etc", "")), image(t, dir("usr/etc"), symlink("etc", "usr/etc")))
			} else if img != nil {
				layers = append(layers, image(t, img...))
			}
			s := h.start(t, nil, layers...)
			o := sh(t, s, look)
			o.wantOut(t, want)
			for _, n := range o.order {
				if e := o.entries[n]; e.Typeflag != tar.TypeDir {
					t.Errorf("%q is in the layer", n)
				}
			}
			if name == "files" || name == "missing" || name == "symlinks" || name == "opaque etc" {
				o.wantNames(t)
			}
			// Changes next to them, and the files of the image untouched below.
			o = sh(t, s, look+" > /all; echo new > /etc/new; echo more 2>/dev/null >> /etc/hosts && exit 1; test -L /etc/resolv.conf || ! rm -f /etc/resolv.conf 2>/dev/null")
			for _, n := range o.order {
				if base := n[strings.LastIndexByte(n, '/')+1:]; !slices.Contains([]string{"all", "etc", "new", "usr"}, base) {
					t.Errorf("%q is in the layer", n)
				}
			}
			if got := o.entries["all"].content; got != want {
				t.Errorf("the second step saw %q", got)
			}
		})
	}
}

// testEtcKeepsItsAttributes: a directory that a mount point had to be shown in
// is as the image has it, and so it is when it is copied up.
func testEtcKeepsItsAttributes(t *testing.T, h *harness) {
	odd := entry{Header: tar.Header{
		Typeflag: tar.TypeDir, Name: "etc/", Mode: 0o2710, Uid: 7, Gid: 8,
		PAXRecords: map[string]string{"SCHILY.xattr.user.mark": "kept"},
	}}
	s := h.start(t, nil, h.base, h.tools, image(t, odd))
	const look = "stat -c '%a %u %g %Y' /etc; guesttool getxattr /etc user.mark; ls /etc/passwd"
	sh(t, s, look).wantOut(t, "2710 7 8 1700000000\n6b657074\n/etc/passwd\n")
	o := sh(t, s, "touch /etc/new")
	if e := o.entries["etc"]; e.Header == nil || e.Mode != 0o2710 || e.Uid != 7 || e.Gid != 8 || e.PAXRecords["SCHILY.xattr.user.mark"] != "kept" {
		t.Errorf("/etc in the layer is %+v", e.Header)
	}
}

// testScratch: an image without any directory. /proc, /sys and /dev stay in the
// layer, as BuildKit leaves them; /etc, in which files were shown, does not.
func testScratch(t *testing.T, h *harness) {
	img := image(t, dir("bin"), program("bin/busybox", busybox(t)))
	s := h.start(t, nil, img)
	p := sandbox.Process{Args: []string{"/bin/busybox", "sh", "-c", "busybox cat /etc/hosts /proc/self/stat > /dev/null && busybox ls /"}, Env: []string{path}, Cwd: "/"}
	o := run(t, s, p)
	if o.err != nil {
		t.Fatalf("%v\n%s", o.err, o.out)
	}
	o.wantOut(t, "bin\ndev\netc\nproc\nsys\n")
	o.wantNames(t, "dev", "proc", "sys")
	for _, n := range o.order {
		if e := o.entries[n]; e.Mode != 0o755 || e.Uid != 0 || e.Typeflag != tar.TypeDir {
			t.Errorf("%s is %+v", n, e.Header)
		}
	}
	p.Args = []string{"/bin/busybox", "touch", "/etc/x"}
	run(t, s, p).wantNames(t, "etc", "etc/x")
	again := h.start(t, nil, img, layerFile(t, bytes.NewReader(o.changes)))
	run(t, again, p).wantNames(t, "etc", "etc/x")
}

func testKernelFilesystems(t *testing.T, h *harness) {
	o := h.once(t, `for d in null zero full random urandom tty; do test -c /dev/$d || echo no $d; done
		for l in fd stdin stdout stderr ptmx; do test -e /dev/$l -o -L /dev/$l || echo no $l; done
		stat -c %a /dev/shm; test -d /dev/pts || echo no pts; test -d /dev/mqueue || echo no mqueue
		test "$(cat /proc/self/comm)" = cat || echo no proc; test -d /sys/fs || echo no sys; touch /sys/x 2>/dev/null && echo sys is writable
		dd if=/dev/zero bs=1k count=4 2>/dev/null | wc -c; head -c 4 /dev/urandom | wc -c; echo x > /dev/full 2>/dev/null && echo full is not
		stat -c %a /tmp; echo shared > /dev/shm/x; cat /dev/shm/x; ls /proc | grep -c '^[0-9]'`)
	if got := strings.TrimSpace(o.out); !strings.HasPrefix(got, "1777\n4096\n4\n1777\nshared\n") {
		t.Errorf("output:\n%s", got)
	}
	s := h.start(t, nil)
	sh(t, s, "echo x > /dev/shm/left")
	sh(t, s, "ls /dev/shm").wantOut(t, "")
}

func testWorkingDirectory(t *testing.T, h *harness) {
	s := h.start(t, nil)
	at := func(cwd, script string) outcome {
		t.Helper()
		p := shell(script)
		p.Cwd, p.User = cwd, sandbox.User{UID: 1000, GID: 1000}
		o := run(t, s, p)
		if o.err != nil {
			t.Fatalf("%s: %v\n%s", cwd, o.err, o.out)
		}
		return o
	}
	sh(t, s, "mkdir -p /real/dir; ln -s real /link; ln -s /real/dir /abs")
	o := at("/missing/one", "pwd; stat -c '%u %a' . ..")
	o.wantOut(t, "/missing/one\n0 755\n0 755\n")
	o.wantNames(t, "missing", "missing/one")
	at("/link/dir", "pwd -P").wantOut(t, "/real/dir\n")
	at("/abs", "pwd -P").wantOut(t, "/real/dir\n")
	o = at("/abs/new", "pwd -P")
	o.wantOut(t, "/real/dir/new\n")
	at("", "pwd").wantOut(t, "/\n")
	o = at("/up//and/./down/..", "pwd -P; stat -c '%u %a' down")
	o.wantOut(t, "/up/and\n0 755\n")
	o.wantNames(t, "up", "up/and", "up/and/down")
	at("/abs/..", "pwd -P").wantOut(t, "/real\n")
	p := shell("pwd")
	p.Cwd = "/etc/passwd/x"
	run(t, s, p).wantExit(t, 126)
}
