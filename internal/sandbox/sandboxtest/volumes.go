package sandboxtest

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/internal/sandbox"
)

// changes asks for what the last process changed in a volume.
func changes(t testing.TB, s sandbox.Session, v *sandbox.Volume) outcome {
	t.Helper()
	var b bytes.Buffer
	if err := s.Changes(context.Background(), v, &b); err != nil {
		t.Fatalf("changes: %v", err)
	}
	o := outcome{changes: b.Bytes()}
	o.entries, o.order = readTar(t, &b)
	return o
}

// testVolumeChanges: what a process changes in a volume can be had, and put on top of the volume's
// layers it is what the process saw.
func testVolumeChanges(t *testing.T, h *harness) {
	l := mounted(t)
	v, other := volume(l), volume()
	ms := []sandbox.Mount{
		{Dest: "/v", Volume: v, Source: ".", Writable: true},
		{Dest: "/sub", Volume: v, Source: "d"},
		{Dest: "/deeper", Volume: v, Source: "d/sub", Writable: true},
		{Dest: "/other", Volume: other, Source: ".", Writable: true},
	}
	s := h.mounts(t, nil, ms...)
	for range 2 { // each process begins with the layers alone
		o := sh(t, s, `cat /v/d/f /sub/sub/g; echo new > /v/d/new; cat /sub/new; echo more > /deeper/h; rm /v/d/f; ls /sub /v/d/sub
			chmod 711 /v/d; touch -d @5 /v/owned; chown 3:4 /v/owned; mkdir -m 2750 /other/a; ln -s x /other/a/l; echo root > /root/x; touch /sub/no 2>/dev/null || echo read-only`)
		o.wantOut(t, "filedeepernew\n/sub:\nnew\nout\nsub\n\n/v/d/sub:\ng\nh\nread-only\n")
		o.wantNames(t, "root", "root/x")
		o = changes(t, s, v)
		o.wantNames(t, "d", "d/.wh.f", "d/new", "d/sub", "d/sub/h", "owned")
		if e := o.entries["owned"]; e.Uid != 3 || e.Gid != 4 || e.ModTime.Unix() != 5 || e.Mode != 0o640 || e.content != "x" {
			t.Errorf("owned is %+v", e)
		}
		if e := o.entries["d"]; e.Mode != 0o711 {
			t.Errorf("d has mode %o", e.Mode)
		}
		if again := changes(t, s, v); !bytes.Equal(again.changes, o.changes) {
			t.Error("the changes are others when they are asked for a second time")
		}
		changes(t, s, other).wantNames(t, "a", "a/l")
		ms[0].Volume = volume(l, layerFile(t, bytes.NewReader(o.changes)))
		sh(t, h.mounts(t, nil, ms[0]), "cd /v; cat d/new d/sub/h; ls d; stat -c '%a %u %Y' d owned | cut -c1-7").
			wantOut(t, "new\nmore\nnew\nout\nsub\n711 0 1\n640 3 5\n")
	}
	sh(t, s, "rm /root/x; ls /v/d /other").wantOut(t, "/other:\n\n/v/d:\nf\nout\nsub\n")
	changes(t, s, v).wantNames(t)
}

// testVolumeOfFailedProcess: what a process did to volumes before it failed is not lost.
func testVolumeOfFailedProcess(t *testing.T, h *harness) {
	v := volume()
	s := h.mounts(t, nil, sandbox.Mount{Dest: "/cache", Volume: v, Source: ".", Writable: true})
	if err := s.Changes(context.Background(), v, &bytes.Buffer{}); err == nil {
		t.Error("there are changes, and nothing has run")
	}
	o := run(t, s, shell("echo kept > /cache/kept; echo lost > /lost; kill -9 $$"))
	o.wantExit(t, 137)
	if o := changes(t, s, v); len(o.order) != 1 || o.entries["kept"].content != "kept\n" {
		t.Errorf("changes are %v", o.order)
	}
	if err := s.Changes(context.Background(), volume(), &bytes.Buffer{}); err == nil {
		t.Error("a volume that the session does not have has changes")
	}
	if o := run(t, s, shell("true")); o.err == nil {
		t.Error("a process runs after one that failed")
	}
}

// testVolumeUntouched: of a read-only volume, and of one that was looked at, there are no changes.
func testVolumeUntouched(t *testing.T, h *harness) {
	l := mounted(t)
	ro, rw, part := volume(l), volume(l), volume(l)
	s := h.mounts(
		t, nil, sandbox.Mount{Dest: "/ro", Volume: ro, Source: "."}, sandbox.Mount{Dest: "/rw", Volume: rw, Source: ".", Writable: true},
		sandbox.Mount{Dest: "/part", Volume: part, Source: "d/sub", Writable: true}, sandbox.Mount{Dest: "/part/g", Volume: ro, Source: "run"},
	)
	sh(t, s, "ls -lR /ro /rw > /dev/null; cat /rw/d/f /part/g > /dev/null").wantNames(t)
	for _, v := range []*sandbox.Volume{ro, rw, part} {
		changes(t, s, v).wantNames(t)
	}
}

// testMemoryFile: a file in memory has its owner and mode, cannot be changed, and leaves nothing.
func testMemoryFile(t *testing.T, h *harness) {
	s := h.mounts(
		t, nil, sandbox.Mount{Dest: "/run/secrets/s", File: &sandbox.File{Content: []byte("top\x00secret\n"), Mode: 0o400, UID: 1000, GID: 50}},
		sandbox.Mount{Dest: "/etc/passwd", File: &sandbox.File{Content: []byte("over\n"), Mode: 0o444}},
		sandbox.Mount{Dest: "/bin/tool", File: &sandbox.File{Content: []byte("#!/bin/sh\necho runs\n"), Mode: 0o755}},
		sandbox.Mount{Dest: "/big", File: &sandbox.File{Content: bytes.Repeat([]byte("0123456789abcdef"), 32<<10), Mode: 0o600}},
		sandbox.Mount{Dest: "/empty", File: &sandbox.File{Mode: 0o600}},
	)
	for range 2 {
		o := sh(t, s, `stat -c '%n %F %a %u %g %s' /run/secrets/s /etc/passwd /empty; od -c /run/secrets/s | head -n 1; cat /etc/passwd; tool; md5sum < /big
			for c in "rm /run/secrets/s" "chmod 777 /run/secrets/s" "chown 7 /run/secrets/s" "truncate -s 0 /run/secrets/s" "chmod 700 /run" "mv /run/secrets/s /x" "sh -c 'echo > /run/secrets/s'"; do eval "$c" 2>/dev/null && echo "$c works"; done; true`)
		o.wantOut(t, "/run/secrets/s regular file 400 1000 50 11\n/etc/passwd regular file 444 0 0 5\n/empty regular empty file 600 0 0 0\n"+
			"0000000   t   o   p  \\0   s   e   c   r   e   t  \\n\nover\nruns\n8f0166794e0083d237c8ca0e676860e6  -\nchmod 700 /run works\n")
		o.wantNames(t)
	}
	p := shell("cat /run/secrets/s; cat /big")
	p.User = sandbox.User{UID: 1000, GID: 1000}
	o := run(t, s, p)
	o.wantExit(t, 1)
	if !strings.HasPrefix(o.out, "top\x00secret\ncat: ") {
		t.Errorf("output %q", o.out)
	}
}

// testReadOnlyRoot: nothing can be written but to mounts; what the session itself made is there.
func testReadOnlyRoot(t *testing.T, h *harness) {
	v := volume()
	s := h.start(t, func(c *sandbox.Config) {
		c.ReadOnlyRoot = true
		c.Mounts = []sandbox.Mount{{Dest: "/new/out", Volume: v, Source: ".", Writable: true}}
	})
	p := shell(`pwd; for c in "touch /x" "rm /etc/group" "chmod 700 /root" "mkdir /new/dir"; do $c 2>&1 | grep -c 'Read-only file system'; done; echo y > /new/out/y; echo z > /dev/shm/z`)
	p.Cwd = "/work/dir"
	o := run(t, s, p)
	if o.err != nil {
		t.Fatal(o.err, o.out)
	}
	o.wantOut(t, "/work/dir\n1\n1\n1\n1\n")
	o.wantNames(t, "work", "work/dir")
	changes(t, s, v).wantNames(t, "y")
}

// testSuccess: which exit statuses count as success is the caller's to say.
func testSuccess(t *testing.T, h *harness) {
	s := h.start(t, nil)
	p := shell("echo > /x; exit 3")
	p.Success = []int{2, 3}
	o := run(t, s, p)
	if o.err != nil {
		t.Fatal(o.err)
	}
	o.wantNames(t, "x")
	p.Args[2] = "kill -9 $$"
	p.Success = []int{137}
	if o := run(t, s, p); o.err != nil {
		t.Error(o.err)
	}
	p.Args[2] = "test -e /x"
	run(t, s, p).wantExit(t, 0)
}

func testSetLimits(t *testing.T, h *harness) {
	p := shell("ulimit -Sn; ulimit -Hn; ulimit -Sc; ulimit -Hc")
	p.Limits = []sandbox.Limit{{Resource: unix.RLIMIT_NOFILE, Soft: 77, Hard: 99}, {Resource: unix.RLIMIT_CORE, Soft: 0, Hard: unix.RLIM_INFINITY}}
	s := h.start(t, nil)
	if o := run(t, s, p); o.err != nil || o.out != "77\n99\n0\nunlimited\n" {
		t.Errorf("%v: %q", o.err, o.out)
	}
	// The next step has the usual ones.
	sh(t, s, "ulimit -Sn; ulimit -Hn").wantOut(t, "1048576\n1048576\n")
}
