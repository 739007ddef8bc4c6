package sandboxtest

import (
	"archive/tar"
	"testing"

	"github.com/kiln-build/kiln/internal/sandbox"
)

// testImpliedDirectories: a directory that a layer has files in, but no entry for, is as the layers
// below have it, and is so when it is copied up.
func testImpliedDirectories(t *testing.T, h *harness) {
	known := func(name string, mode int64, uid int) entry {
		return entry{Header: tar.Header{
			Typeflag: tar.TypeDir, Name: name + "/", Mode: mode, Uid: uid, Gid: 8, PAXRecords: map[string]string{"SCHILY.xattr.user.mark": "of " + name},
		}}
	}
	low := image(
		t, known("d", 0o2711, 7), file("d/a", "a"), known("d/e", 0o700, 9), known("gone", 0o700, 7), known("hidden", 0o700, 7), known("hidden/in", 0o700, 7),
		known("again", 0o750, 7), known("etc", 0o751, 3), file("plain", "a file"),
	)
	top := []string{
		image(t, file(".wh.gone", ""), file("again/x", "x"), known("later", 0o700, 5)),
		image(
			t, file("d/e/f", "f"), file("gone/f", "f"), dir("hidden"), file("hidden/.wh..wh..opq", ""), file("hidden/in/f", "f"), file("again/y", "y"),
			file("new/deep/f", "f"), file("later/f", "f"), file("etc/x", "x"), file("plain/f", "f"),
		),
	}
	layers := append([]string{h.base, h.tools, low}, top...)
	const look = `cd $ROOT; stat -c '%n %a %u %g %Y' d d/e gone hidden hidden/in again new new/deep later plain; ls d d/e hidden again; guesttool getxattr d user.mark; guesttool getxattr d/e user.mark
		guesttool getxattr gone user.mark 2>/dev/null; stat -c '%a %u' etc; cat etc/x`
	const want = "d 2711 7 8 1700000000\nd/e 700 9 8 1700000000\ngone 755 0 0 0\nhidden 755 0 0 1700000000\nhidden/in 755 0 0 0\nagain 750 7 8 1700000000\n" +
		"new 755 0 0 0\nnew/deep 755 0 0 0\nlater 700 5 8 1700000000\nplain 755 0 0 0\n" +
		"again:\nx\ny\n\nd:\na\ne\n\nd/e:\nf\n\nhidden:\nin\n6f662064\n6f6620642f65\n\n751 3\nx"
	at := func(root, script string) sandbox.Process {
		p := shell(script)
		p.Env = append(p.Env, "ROOT="+root)
		return p
	}
	s := h.start(t, func(c *sandbox.Config) {
		c.Mounts = []sandbox.Mount{{Dest: "/again-here", Volume: volume(append([]string{low}, top...)...), Source: "."}}
	}, layers...)
	for _, root := range []string{"/", "/again-here"} {
		if o := run(t, s, at(root, look)); o.err != nil || o.out != want {
			t.Errorf("%s: %v\n%s\nwant\n%s", root, o.err, o.out, want)
		}
	}
	o := run(t, s, at("/", "touch d/e/new again/new; chmod 700 gone; chown 1 later/f"))
	o.wantNames(t, "again", "again/new", "d", "d/e", "d/e/new", "gone", "later", "later/f")
	for name, w := range map[string]struct {
		mode int64
		uid  int
		mark string
	}{"d": {0o2711, 7, "of d"}, "d/e": {0o700, 9, "of d/e"}, "again": {0o750, 7, "of again"}, "gone": {0o700, 0, ""}, "later": {0o700, 5, "of later"}} {
		if e := o.entries[name]; e.Header == nil || e.Mode != w.mode || e.Uid != w.uid || e.PAXRecords["SCHILY.xattr.user.mark"] != w.mark {
			t.Errorf("%s in the layer is %+v", name, e.Header)
		}
	}
	// Who may not enter it below may not enter it.
	p := at("/", "ls /d/e")
	p.User = sandbox.User{UID: 1000, GID: 1000}
	run(t, s, p).wantExit(t, 1)
}
