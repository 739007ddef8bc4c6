package sandboxtest

import (
	"archive/tar"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/internal/sandbox"
)

// dockerCaps is docker's default set of capabilities, as in /proc/PID/status.
const dockerCaps = "00000000a80425fb"

func testRoot(t *testing.T, h *harness) {
	o := h.once(t, `id -u; id -g; grep -E '^Cap|^NoNew' /proc/self/status; umask; echo $$; hostname
		touch /f; chown 123:456 /f; stat -c %u:%g /f; chmod 4755 /f; stat -c %a /f
		mknod /n c 1 3; mknod /b b 8 1; echo gone > /n; stat -c '%F %t %T' /n /b`)
	for _, want := range []string{
		"0\n0\n", "CapPrm:\t" + dockerCaps, "CapEff:\t" + dockerCaps, "CapBnd:\t" + dockerCaps,
		"CapInh:\t0000000000000000", "CapAmb:\t0000000000000000", "NoNewPrivs:\t0",
		"0022\n1\nbuildkitsandbox\n", "123:456\n4755\n", "character special file 1 3\nblock special file 8 1\n",
	} {
		if !strings.Contains(o.out, want) {
			t.Errorf("output has no %q:\n%s", want, o.out)
		}
	}
	o.wantNames(t, "b", "f", "n")
	if e := o.entries["f"]; e.Uid != 123 || e.Gid != 456 || e.Mode != 0o4755 {
		t.Errorf("/f is %d:%d %o", e.Uid, e.Gid, e.Mode)
	}
	if e := o.entries["n"]; e.Typeflag != tar.TypeChar || e.Devmajor != 1 || e.Devminor != 3 {
		t.Errorf("/n is %c %d,%d", e.Typeflag, e.Devmajor, e.Devminor)
	}
	if e := o.entries["b"]; e.Typeflag != tar.TypeBlock || e.Devmajor != 8 || e.Devminor != 1 {
		t.Errorf("/b is %c %d,%d", e.Typeflag, e.Devmajor, e.Devminor)
	}
}

func testUser(t *testing.T, h *harness) {
	s := h.start(t, nil)
	p := shell(`id -u; id -g; id -G; grep -E '^Cap(Prm|Eff|Bnd)' /proc/self/status; touch /no 2>/dev/null || echo refused
		echo mine > /tmp/mine; echo out > /dev/stdout; echo err > /dev/stderr; cat /proc/1/status >/dev/null && echo sees itself`)
	p.User = sandbox.User{UID: 1000, GID: 1001, Groups: []uint32{50, 2000}}
	o := run(t, s, p)
	if o.err != nil {
		t.Fatalf("%v\n%s", o.err, o.out)
	}
	none := "0000000000000000"
	o.wantOut(t, "1000\n1001\n1001 50 2000\nCapPrm:\t"+none+"\nCapEff:\t"+none+"\nCapBnd:\t"+dockerCaps+"\nrefused\nout\nerr\nsees itself\n")
	o.wantNames(t, "tmp", "tmp/mine")
	if e := o.entries["tmp/mine"]; e.Uid != 1000 || e.Gid != 1001 {
		t.Errorf("owner is %d:%d", e.Uid, e.Gid)
	}
	if e := o.entries["tmp"]; e.Mode != 0o1777 {
		t.Errorf("/tmp has mode %o", e.Mode)
	}
}

func testSetuid(t *testing.T, h *harness) {
	s := h.start(t, nil)
	// busybox gives up set-user-ID for most applets, not for su.
	sh(t, s, "cp /bin/busybox /usr/bin/su; chmod 4755 /usr/bin/su; sed -i 's/^root:x:/root::/' /etc/passwd; echo 'root::1::::::' > /etc/shadow")
	p := shell("id -u; /usr/bin/su root -c 'id -u; echo made > /by-root'")
	p.User = sandbox.User{UID: 1000, GID: 1000}
	o := run(t, s, p)
	if o.err != nil {
		t.Fatalf("%v\n%s", o.err, o.out)
	}
	o.wantOut(t, "1000\n0\n")
	if e := o.entries["by-root"]; e.Header == nil || e.Uid != 0 {
		t.Errorf("what su wrote: %+v", o.order)
	}
	sh(t, s, "su user -c 'id -u' | grep -qx 1000")
}

func testFileCapabilities(t *testing.T, h *harness) {
	s := h.start(t, nil, h.base, h.tools)
	// VFS_CAP_REVISION_2 with the effective bit, CAP_CHOWN alone.
	const chown = "0100000201000000000000000000000000000000"
	o := sh(t, s, "cp /bin/busybox /chown-tool; guesttool setxattr /chown-tool security.capability "+chown)
	if got := o.entries["chown-tool"].PAXRecords["SCHILY.xattr.security.capability"]; got != "\x01\x00\x00\x02\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" {
		t.Errorf("security.capability in the layer is %q", got)
	}
	asUser := func(s sandbox.Session) {
		t.Helper()
		p := shell("mkdir -p /tmp/d; cd /tmp/d; rm -f x; ln -sf /chown-tool chown; touch x; ./chown 5:5 x; stat -c %u x")
		p.User = sandbox.User{UID: 1000, GID: 1000}
		o := run(t, s, p)
		if o.out != "5\n" {
			t.Errorf("the capability has no effect: %s", o.out)
		}
	}
	asUser(s)
	// And from a layer file.
	second := h.start(t, nil, h.base, h.tools, layerFile(t, strings.NewReader(string(o.changes))))
	sh(t, second, "guesttool getxattr /chown-tool security.capability | grep -qx "+chown)
	asUser(second)
}
