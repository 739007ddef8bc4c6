package sandboxtest

import (
	"archive/tar"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/internal/sandbox"
)

// mounts starts a session with mounts.
func (h *harness) mounts(t *testing.T, layers []string, ms ...sandbox.Mount) sandbox.Session {
	t.Helper()
	return h.start(t, func(c *sandbox.Config) { c.Mounts = ms }, append([]string{h.base}, layers...)...)
}

func volume(layers ...string) *sandbox.Volume { return &sandbox.Volume{Layers: layers} }

// mounted is a layer to be mounted from.
func mounted(t testing.TB) string {
	t.Helper()
	return image(
		t, dir("d"), file("d/f", "file"), dir("d/sub"), file("d/sub/g", "deeper"), symlink("d/out", "../../../etc/passwd"),
		symlink("link", "/d/sub"), symlink("flink", "d/f"), program("run", []byte("#!/bin/sh\necho ran $1\n")),
		entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: "owned", Mode: 0o640, Uid: 7, Gid: 8}, content: []byte("x")},
	)
}

func testMountKinds(t *testing.T, h *harness) {
	l := []string{mounted(t)}
	for _, x := range []struct {
		name, script, want string
		mount              sandbox.Mount
	}{
		{"directory", "cat /m/d/f /m/d/sub/g; /m/run here; stat -c '%a %u %g %Y' /m/owned /m", "filedeeperran here\n640 7 8 1700000000\n755 0 0 ", sandbox.Mount{Dest: "/m", Source: "."}},
		{"sub-path", "ls /m; cat /m/sub/g; cd /m/sub/../..; pwd -P", "f\nout\nsub\ndeeper/\n", sandbox.Mount{Dest: "/m", Source: "d"}},
		{"file", "cat /m; test -f /m && ls -l /m | cut -c1-10", "file-rw-r--r--\n", sandbox.Mount{Dest: "/m", Source: "d/f"}},
		{"executable", "/opt/bin/tool it", "ran it\n", sandbox.Mount{Dest: "/opt/bin/tool", Source: "run"}},
		{"link to directory", "cat /m/g", "deeper", sandbox.Mount{Dest: "/m", Source: "link"}},
		{"link to file", "cat /m", "file", sandbox.Mount{Dest: "/m", Source: "flink"}},
		{"link out of it", "head -n 1 /m/n/o/out", "root:x:0:0:root:/root:/bin/sh\n", sandbox.Mount{Dest: "/m/n/o", Source: "d"}},
		{"over a directory", "ls /root", "f\nout\nsub\n", sandbox.Mount{Dest: "/root", Source: "d"}},
		{"in dev", "cat /dev/pipes/d/f; ls -d /dev/null", "file/dev/null\n", sandbox.Mount{Dest: "/dev/pipes/", Source: "."}},
		{"in dev shm", "cat /dev/shm/x/f", "file", sandbox.Mount{Dest: "/dev/shm/x", Source: "d"}},
		{"over a supplied file", "cat /etc/hosts", "file", sandbox.Mount{Dest: "/etc/hosts", Source: "d/f"}},
	} {
		t.Run(x.name, func(t *testing.T) {
			x.mount.Volume = volume(l...)
			for _, w := range []bool{false, true} {
				x.mount.Writable = w
				s := h.mounts(t, nil, x.mount)
				for range 2 {
					o := sh(t, s, x.script)
					if !strings.HasPrefix(o.out, x.want) {
						t.Errorf("writable %v: output is\n%q\nwant\n%q", w, o.out, x.want)
					}
					o.wantNames(t)
				}
			}
		})
	}
}

func testMountWriting(t *testing.T, h *harness) {
	l := []string{mounted(t)}
	const try = `cd /m; for c in "touch new" "touch d/f" "rm d/f" "rm -r d" "mkdir x" "mv d e" "chmod 700 d/f" "ln -s a b" "chown 1 d"; do
		echo "$c: $($c 2>&1 | sed -n '$s/.*: //p')"; done; echo x > d/f; true`
	o := sh(t, h.mounts(t, nil, sandbox.Mount{Dest: "/m", Volume: volume(l...), Source: "."}), try)
	if n := strings.Count(o.out, "Read-only file system\n"); n != 10 {
		t.Errorf("%d refusals:\n%s", n, o.out)
	}
	o.wantNames(t)
	o = sh(t, h.mounts(t, nil, sandbox.Mount{Dest: "/m", Volume: volume(l...), Source: "d/f"}), "echo x >> /m || cat /m")
	if !strings.Contains(o.out, "Read-only file system\nfile") {
		t.Errorf("output %q", o.out)
	}

	s := h.mounts(t, nil, sandbox.Mount{Dest: "/m", Volume: volume(l...), Source: ".", Writable: true}, sandbox.Mount{Dest: "/one", Volume: volume(l...), Source: "d/f", Writable: true})
	for range 2 { // what is written is gone for the next process
		o = sh(t, s, `cat /one; ls /m/d; echo more >> /one; cat /one; echo new > /m/new; rm -r /m/d/sub; chmod 711 /m/d; mv /m/d /m/e; ls /m /m/e; echo kept > /kept`)
		o.wantOut(t, "filef\nout\nsub\nfilemore\n/m:\ne\nflink\nlink\nnew\nowned\nrun\n\n/m/e:\nf\nout\n")
		o.wantNames(t, "kept")
	}
}

// testMountPoints: where a mount goes to in the image, and that nothing of it is left.
func testMountPoints(t *testing.T, h *harness) {
	l := []string{mounted(t)}
	img := image(
		t, dir("real"), file("real/f", "image's"), symlink("abs", "/real"), symlink("rel", "real/../real"), symlink("dangling", "/no/where"),
		symlink("escape", "../../../../esc"), dir("full"), file("full/x", "x"), symlink("flink", "/real/f"),
	)
	for _, x := range []struct{ dest, source, look, script, names string }{
		{"/a/b/c", "d", "cat /a/b/c/f", "stat -c '%a %u' /a /a/b; touch /a/x", "a a/x"},
		{"/a/b/c", "d/f", "cat /a/b/c", "true", ""},
		{"/full", "d", "cat /full/f", "test ! -e /full/x", ""},
		{"/abs", "d", "cat /real/f", "true", ""},
		{"/rel/in", "d", "cat /real/in/f", "touch /real/y", "real real/y"},
		{"/dangling", "d", "cat /no/where/f", "true", ""},
		{"/escape/x", "d", "cat /esc/x/f", "true", ""},
		{"/flink", "d/f", "cat /real/f", "true", ""},
		{"/tmp/x", "d/f", "cat /tmp/x", "stat -c %a /tmp; touch /tmp/y", "tmp tmp/y"},
		{"/proc/sys", "d", "cat /proc/sys/f", "true", ""},
	} {
		t.Run(x.dest+" "+x.source, func(t *testing.T) {
			s := h.mounts(t, []string{img}, sandbox.Mount{Dest: x.dest, Volume: volume(l...), Source: x.source})
			for range 2 {
				o := sh(t, s, x.look+";"+x.script)
				if !strings.HasPrefix(o.out, "file") {
					t.Errorf("output %q", o.out)
				}
				o.wantNames(t, strings.Fields(x.names)...)
			}
		})
	}
	t.Run("step after it", func(t *testing.T) {
		s := h.mounts(t, nil, sandbox.Mount{Dest: "/a/b", Volume: volume(l...), Source: "d"})
		sh(t, s, "echo > /a/x").wantNames(t, "a", "a/x")
		sh(t, s, "rm /a/x; ls /a").wantNames(t, "a", "a/.wh.x")
	})
	for name, m := range map[string]sandbox.Mount{
		"missing source":        {Dest: "/m", Volume: volume(l...), Source: "no/such"},
		"directory over a file": {Dest: "/real/f", Volume: volume(l...), Source: "d"},
		"file over a directory": {Dest: "/real", Volume: volume(l...), Source: "d/f"},
		"below a file":          {Dest: "/real/f/g", Volume: volume(l...), Source: "d"},
		"root":                  {Dest: "/", Volume: volume(l...), Source: "d"},
		"in proc":               {Dest: "/proc/none", Volume: volume(l...), Source: "d"},
		"tmpfs over a file":     {Dest: "/real/f", Tmpfs: &sandbox.Tmpfs{}},
	} {
		t.Run(name, func(t *testing.T) {
			o := run(t, h.mounts(t, []string{img}, m), shell("true"))
			var e *sandbox.MountError
			if !errors.As(o.err, &e) || e.Dest != m.Dest || e.Reason == "" {
				t.Errorf("error %v", o.err)
			}
		})
	}
}

func testMountNested(t *testing.T, h *harness) {
	l := []string{mounted(t)}
	// In any order; in an existing directory of a read-only mount, in a new one of a writable, and under it all the image's.
	s := h.mounts(
		t, nil,
		sandbox.Mount{Dest: "/m/d/sub", Volume: volume(l...), Source: "link"},
		sandbox.Mount{Dest: "/m/d/f", Volume: volume(l...), Source: "owned"},
		sandbox.Mount{Dest: "/m", Volume: volume(l...), Source: "."},
		sandbox.Mount{Dest: "/w/new/er", Volume: volume(l...), Source: "d/f"},
		sandbox.Mount{Dest: "/w", Volume: volume(l...), Source: "d", Writable: true},
		sandbox.Mount{Dest: "/t/in/it", Volume: volume(l...), Source: "d"},
		sandbox.Mount{Dest: "/t", Tmpfs: &sandbox.Tmpfs{}, Writable: true},
		sandbox.Mount{Dest: "/m/d/sub/g", Volume: volume(l...), Source: "run"},
	)
	for range 2 {
		o := sh(t, s, "cat /m/d/f; /m/d/sub/g nested; cat /w/new/er; ls /w; echo y > /w/new/y; cat /t/in/it/f; touch /t/z")
		o.wantOut(t, "xran nested\nfilef\nnew\nout\nsub\nfile")
		o.wantNames(t)
	}
	o := run(t, h.mounts(t, nil, sandbox.Mount{Dest: "/m", Volume: volume(l...), Source: "."}, sandbox.Mount{Dest: "/m/missing", Volume: volume(l...), Source: "d"}), shell("true"))
	if o.err == nil || !strings.Contains(o.err.Error(), "/m/missing") {
		t.Errorf("a mount point in a read-only mount: %v", o.err)
	}
	// The last of two at one place is seen.
	sh(t, h.mounts(t, nil, sandbox.Mount{Dest: "/m", Volume: volume(l...), Source: "d"}, sandbox.Mount{Dest: "/m", Volume: volume(l...), Source: "d/sub"}), "ls /m").wantOut(t, "g\n")
}

func testMountTmpfs(t *testing.T, h *harness) {
	img := image(t, entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: "had/", Mode: 0o750}}, file("had/x", "x"))
	s := h.mounts(t, []string{img}, sandbox.Mount{Dest: "/small", Tmpfs: &sandbox.Tmpfs{Size: 1 << 20}, Writable: true},
		sandbox.Mount{Dest: "/had", Tmpfs: &sandbox.Tmpfs{}, Writable: true}, sandbox.Mount{Dest: "/none", Tmpfs: &sandbox.Tmpfs{}})
	for range 2 {
		o := sh(t, s, `ls /none; touch /none/x 2>&1 | grep -c 'Read-only'; stat -c %a /small /had; ls /small /had; df -k /small | awk 'END {print $2}'; dd if=/dev/zero of=/small/f bs=1k count=2000 2>&1 | grep -c 'No space'; touch /had/y
			cp /bin/busybox /had/true; /had/true; echo $?`)
		o.wantOut(t, "1\n1777\n750\n/had:\n\n/small:\n1024\n1\n0\n")
		o.wantNames(t)
	}
}

func testMountMany(t *testing.T, h *harness) {
	first, second := mounted(t), image(t, file("d/f", "second"), file("d/.wh.sub", ""), dir("d/n"))
	var ms []sandbox.Mount
	script := ""
	for i := range 20 {
		m := sandbox.Mount{Dest: fmt.Sprintf("/m%d", i), Volume: volume(first, second), Source: "d", Writable: i%3 == 0}
		if i%2 == 0 {
			m.Volume = volume(first)
		}
		ms = append(ms, m)
		script += fmt.Sprintf("cat /m%d/f; ls /m%d | wc -l;", i, i)
	}
	// The root's own layer is mounted once more, too.
	ms = append(ms, sandbox.Mount{Dest: "/again", Volume: volume(h.base), Source: "etc/group"})
	o := sh(t, h.mounts(t, []string{first}, ms...), script+"head -n 1 /again; cat /d/f")
	o.wantOut(t, strings.Repeat("file3\nsecond3\n", 10)+"root:x:0:\nfile")
	o.wantNames(t)
}
