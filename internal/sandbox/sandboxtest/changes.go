package sandboxtest

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/sandbox"
)

func itoa(n int64) string { return strconv.FormatInt(n, 10) }

func testNoChanges(t *testing.T, h *harness) {
	o := h.once(t, "cat /etc/passwd > /dev/null; ls -laR / > /dev/null; cat /etc/resolv.conf; rm -f /nosuchfile; true > /dev/shm/x; echo > /dev/null")
	o.wantNames(t)
}

func testChangeTypes(t *testing.T, h *harness) {
	s := h.start(t, nil, h.base, h.tools)
	long := strings.Repeat("n", 255)
	o := sh(t, s, `mkdir /w; cd /w; echo hi > file; ln file hard; ln -s ../target sym; mkfifo fifo; mknod null c 1 3; mknod sda b 8 0
		guesttool socket /w/sock; mkdir dir; echo x > dir/x; chmod 1777 dir; ln dir/x zlast; touch empty
		echo long > `+long+`; printf 'odd' > "$(printf 'od\td \344')"
		guesttool settime file 1234567890 987654321; guesttool settime sym 1234567891 1; guesttool settime dir -1000 5; test -S sock`)
	want := []string{
		"w", "w/dir", "w/dir/x", "w/empty", "w/fifo", "w/file", "w/hard", "w/" + long, "w/null", "w/od\td \xe4", "w/sda", "w/sym", "w/zlast",
	}
	o.wantNames(t, want...)
	for name, typ := range map[string]byte{
		"w/dir": tar.TypeDir, "w/empty": tar.TypeReg, "w/fifo": tar.TypeFifo, "w/file": tar.TypeReg, "w/hard": tar.TypeLink,
		"w/null": tar.TypeChar, "w/sda": tar.TypeBlock, "w/sym": tar.TypeSymlink, "w/zlast": tar.TypeLink,
	} {
		if e := o.entries[name]; e.Header == nil || e.Typeflag != typ {
			t.Errorf("%s has type %+v, want %c", name, e.Header, typ)
		}
	}
	if e := o.entries["w/hard"]; e.Linkname != "w/file" {
		t.Errorf("w/hard links to %q", e.Linkname)
	}
	if e := o.entries["w/zlast"]; e.Linkname != "w/dir/x" {
		t.Errorf("w/zlast links to %q", e.Linkname)
	}
	if e := o.entries["w/sym"]; e.Linkname != "../target" || !e.ModTime.Equal(time.Unix(1234567891, 1)) {
		t.Errorf("w/sym: %q, %s", e.Linkname, e.ModTime)
	}
	if e := o.entries["w/file"]; e.content != "hi\n" || !e.ModTime.Equal(time.Unix(1234567890, 987654321)) || e.Mode != 0o644 {
		t.Errorf("w/file: %q %s %o", e.content, e.ModTime, e.Mode)
	}
	if e := o.entries["w/dir"]; e.Mode != 0o1777 || !e.ModTime.Equal(time.Unix(-1000, 5)) {
		t.Errorf("w/dir: %o %s", e.Mode, e.ModTime)
	}
	// The same again, from the layer and from the frozen upper.
	const look = `cd /w; stat -c '%n %F %a %u %g %h %s %t %T' * dir/* | grep -v sock; cat file hard zlast; readlink sym`
	inSession := sh(t, s, look)
	fromLayer := sh(t, h.start(t, nil, h.base, h.tools, layerFile(t, bytes.NewReader(o.changes))), look)
	a, b := withoutDirSizes(inSession.out), withoutDirSizes(fromLayer.out)
	if a != b {
		t.Errorf("the next step sees\n%s\na session on the layer\n%s", a, b)
	}
}

// withoutDirSizes leaves out what no tar can carry.
func withoutDirSizes(s string) string {
	var out []string
	for _, l := range strings.Split(s, "\n") {
		if f := strings.Fields(l); strings.Contains(l, " directory ") {
			l = strings.Join(f[:min(len(f), 5)], " ")
		}
		out = append(out, l)
	}
	return strings.Join(out, "\n")
}

func lowerTree() []entry {
	return []entry{
		dir("low"), dir("low/a"), file("low/a/1", "one"), file("low/a/2", "two"), dir("low/b"), file("low/b/3", "three"),
		file("low/f", "f"), hardlink("low/g", "low/f"), symlink("low/s", "a"), dir("low/empty"), dir("low/deep"), dir("low/deep/er"), file("low/deep/er/x", "x"),
	}
}

func testWhiteouts(t *testing.T, h *harness) {
	low := image(t, lowerTree()...)
	const wh = ".wh."
	for _, x := range []struct {
		name, script string
		want         []string
	}{
		{"remove file", "rm /low/f", []string{"low", "low/" + wh + "f"}},
		{"remove directory", "rm -r /low/a", []string{"low", "low/" + wh + "a"}},
		{"remove symlink", "rm /low/s", []string{"low", "low/" + wh + "s"}},
		{"replace directory", "rm -r /low/a; mkdir /low/a; touch /low/a/new", []string{"low", "low/a", "low/a/" + wh + "1", "low/a/" + wh + "2", "low/a/new"}},
		{"directory for file", "rm /low/f; mkdir /low/f; touch /low/f/x", []string{"low", "low/f", "low/f/x"}},
		{"file for directory", "rm -r /low/a; echo > /low/a", []string{"low", "low/a"}},
		{"directory for symlink", "rm /low/s; mkdir /low/s; touch /low/s/1; mv /low/s/1 /low/s/x", []string{"low", "low/s", "low/s/x"}},
		{"made and removed", "touch /low/new; rm /low/new; mkdir /low/d; rmdir /low/d", []string{"low"}},
		{"rename new file", "touch /low/n1; mv /low/n1 /low/n2", []string{"low", "low/n2"}},
		{"rename lower file", "mv /low/b/3 /low/b/4", []string{"low", "low/b", "low/b/" + wh + "3", "low/b/4"}},
		{"rename lower directory", "mv /low/deep /low/moved", []string{"low", "low/" + wh + "deep", "low/moved", "low/moved/er", "low/moved/er/x"}},
		{"new directories are not opaque", "mkdir -p /low/n/n/n", []string{"low", "low/n", "low/n/n", "low/n/n/n"}},
		{"remove and make again", "rm /low/a/1; echo again > /low/a/1", []string{"low", "low/a", "low/a/1"}},
		{"whiteout in whiteout", "rm /low/a/1; rm -r /low/a; mkdir /low/a", []string{"low", "low/a", "low/a/" + wh + "1", "low/a/" + wh + "2"}},
		{"replace directories in directories", "rm -r /low/deep; mkdir -p /low/deep/er; touch /low/deep/er/y", []string{"low/deep", "low/deep/er", "low/deep/er/" + wh + "x", "low/deep/er/y"}},
		{"replace one of many", "rm -r /low/a; mkdir /low/a; echo > /low/a/2; echo > /low/a/0", []string{"low/a", "low/a/0", "low/a/" + wh + "1", "low/a/2"}},
		{"change mode only", "chmod 600 /low/a/1", []string{"low", "low/a", "low/a/1"}},
	} {
		t.Run(x.name, func(t *testing.T) {
			s := h.start(t, nil, h.base, low)
			o := sh(t, s, x.script)
			// A parent directory is there if it was changed or had to be made for
			// what is in it: implementations differ, and the result does not.
			got := slices.DeleteFunc(slices.Clone(o.order), func(n string) bool { return n == "low" })
			want := slices.DeleteFunc(x.want, func(n string) bool { return n == "low" })
			if strings.HasPrefix(x.name, "change mode") {
				got = slices.DeleteFunc(got, func(n string) bool { return n == "low/a" })
				want = slices.DeleteFunc(want, func(n string) bool { return n == "low/a" })
			}
			if !slices.Equal(got, want) {
				t.Errorf("got %v, want %v", got, want)
			}
			const look = "find /low | sort; stat -c '%n %Y' /low/*; cat /low/a/* /low/f 2>/dev/null; true"
			here := sh(t, s, look)
			again := sh(t, h.start(t, nil, h.base, low, layerFile(t, bytes.NewReader(o.changes))), look)
			if here.out != again.out {
				t.Errorf("the next step sees\n%s\na session on the layer\n%s", here.out, again.out)
			}
		})
	}
}

// testUnchanged: what was touched and is as it was is no change, nor are the directories around it.
func testUnchanged(t *testing.T, h *harness) {
	low := image(t, lowerTree()...)
	for _, x := range []struct {
		name, script string
		want         []string
	}{
		{"moved away and back", "mv /low/b/3 /low/b/x; mv /low/b/x /low/b/3", nil},
		{"symlink moved away and back", "mv /low/s /low/x; mv /low/x /low/s", nil},
		{"mode changed and changed back", "chmod 600 /low/a/1; chmod 644 /low/a/1", nil},
		{"written with its time", "guesttool settime /low/a/1 7 0; echo -n one > /low/a/1; guesttool settime /low/a/1 1700000000 123456789", nil},
		{"content with the old time", "echo -n two > /low/a/1; guesttool settime /low/a/1 1700000000 123456789", []string{"low/a", "low/a/1"}},
		{"made and removed", "touch /low/a/x; rm /low/a/x", []string{"low", "low/a"}},
		{"directories around a change", "mv /low/a/1 /low/x; mv /low/x /low/a/1; echo > /low/b/new; chmod 600 /low/b/3; chmod 644 /low/b/3", []string{"low", "low/b", "low/b/new"}},
		{"time of a directory", "guesttool settime /low/empty 5 0", []string{"low", "low/empty"}},
		{"a new name", "ln /low/a/1 /low/a/3", []string{"low/a", "low/a/1", "low/a/3"}},
		{"replaced by the same", "rm -r /low/deep; mkdir -p /low/deep/er; echo -n x > /low/deep/er/x; guesttool settime /low/deep/er/x 1700000000 123456789", nil},
	} {
		t.Run(x.name, func(t *testing.T) {
			s := h.start(t, nil, h.base, h.tools, low)
			o := sh(t, s, x.script)
			got, want := o.order, x.want
			if !slices.Contains(want, "low") {
				got = slices.DeleteFunc(slices.Clone(got), func(n string) bool { return n == "low" })
			}
			if !slices.Equal(got, want) {
				t.Errorf("got %v, want %v", got, want)
			}
			const look = "find /low | sort | while read f; do stat -c '%n %a %u %Y %h' $f; done; cat /low/a/* /low/f /low/deep/er/*"
			here := sh(t, s, look)
			again := sh(t, h.start(t, nil, h.base, h.tools, low, layerFile(t, bytes.NewReader(o.changes))), look)
			if here.out != again.out {
				t.Errorf("the next step sees\n%s\na session on the layer\n%s", here.out, again.out)
			}
		})
	}
}

func testXattrs(t *testing.T, h *harness) {
	s := h.start(t, nil, h.base, h.tools)
	o := sh(t, s, `mkdir /d; echo > /f; for f in /d /f; do guesttool setxattr $f user.text 76616c; guesttool setxattr $f user.bin 00ff0a3d00; done`)
	for _, n := range []string{"d", "f"} {
		pax := o.entries[n].PAXRecords
		if pax["SCHILY.xattr.user.text"] != "val" || pax["SCHILY.xattr.user.bin"] != "\x00\xff\n=\x00" {
			t.Errorf("%s has %q", n, pax)
		}
		for k := range pax {
			if strings.Contains(k, "overlay") {
				t.Errorf("%s has %q", n, k)
			}
		}
	}
	// Read back from a layer file, and copied up when changed.
	second := h.start(t, nil, h.base, h.tools, layerFile(t, bytes.NewReader(o.changes)))
	o = sh(t, second, "guesttool getxattr /f user.bin; guesttool getxattr /d user.text; chmod 600 /f; guesttool getxattr /f user.bin")
	o.wantOut(t, "00ff0a3d00\n76616c\n00ff0a3d00\n")
	if got := o.entries["f"].PAXRecords["SCHILY.xattr.user.bin"]; got != "\x00\xff\n=\x00" {
		t.Errorf("after copy-up: %q", got)
	}
}

// testLowerKinds: what a layer file has besides files and directories.
func testLowerKinds(t *testing.T, h *harness) {
	first := image(t, dir("x"), file("x/hidden", "1"), file("x/removed", "2"), dir("y"), file("y/kept", "3"))
	second := image(
		t, dir("x"), file("x/.wh..wh..opq", ""), file("x/new", "4"), file("y/.wh.nothing", ""),
		entry{Header: tar.Header{Typeflag: tar.TypeChar, Name: "y/null", Mode: 0o666, Devmajor: 1, Devminor: 3}},
		entry{Header: tar.Header{Typeflag: tar.TypeBlock, Name: "y/sda", Mode: 0o600, Devmajor: 8}},
		entry{Header: tar.Header{Typeflag: tar.TypeBlock, Name: "y/sdb", Mode: 0o600, Devmajor: 8, Devminor: 16}},
		entry{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "y/fifo", Mode: 0o644}},
		file("y/h1", "linked"), hardlink("y/h2", "y/h1"), hardlink("y/h3", "y/h1"),
	)
	third := image(t, file("y/.wh.sda", ""))
	s := h.start(t, nil, h.base, first, second, third)
	o := sh(t, s, `ls /x; ls /y; stat -c '%n %t %T' /y/null; echo gone > /y/null; cat /y/null; stat -c %h /y/h2; ls -i /y/h1 /y/h3 | awk '{print $1}' | uniq | wc -l; test -p /y/fifo
		chmod 600 /y/null; stat -c '%t %T %a' /y/null; chown 5:6 /y/sdb; mv /y/sdb /y/sdc; stat -c '%F %t %T %u:%g' /y/sdc`)
	o.wantOut(t, "new\nfifo\nh1\nh2\nh3\nkept\nnull\nsdb\n/y/null 1 3\n3\n1\n1 3 600\nblock special file 8 10 5:6\n")
	if e := o.entries["y/sdc"]; e.Header == nil || e.Typeflag != tar.TypeBlock || e.Devmajor != 8 || e.Devminor != 16 || e.Uid != 5 {
		t.Errorf("the renamed device: %+v", e.Header)
	}
	if e := o.entries["y/null"]; e.Header == nil || e.Typeflag != tar.TypeChar || e.Devminor != 3 {
		t.Errorf("the copied-up device: %+v", e.Header)
	}
}

func testLargeSparse(t *testing.T, h *harness) {
	if testing.Short() {
		t.Skip("reads 9 GiB")
	}
	const size = 9 << 30 // does not fit the header's octal field
	s := h.start(t, nil, h.base, h.tools)
	var out bytes.Buffer
	w := &endOfTar{}
	if err := s.Run(context.Background(), shell("guesttool sparse /big "+itoa(size)), &out, w); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	hd, err := tar.NewReader(bytes.NewReader(w.head)).Next()
	if err != nil || hd.Name != "big" || hd.Size != size {
		t.Errorf("header %+v, %v", hd, err)
	}
	if !bytes.Contains(w.tail, []byte("end")) || w.n < size {
		t.Errorf("%d bytes, the end is missing", w.n)
	}
}

// endOfTar keeps the two ends of a stream.
type endOfTar struct {
	head, tail []byte
	n          int64
}

func (w *endOfTar) Write(b []byte) (int, error) {
	const keep = 4096
	w.n += int64(len(b))
	w.head = append(w.head, b[:min(len(b), keep-min(len(w.head), keep))]...)
	w.tail = append(w.tail, b[max(0, len(b)-keep):]...)
	w.tail = w.tail[max(0, len(w.tail)-keep):]
	return len(b), nil
}

func testMmap(t *testing.T, h *harness) {
	s := h.start(t, nil, h.base, h.tools)
	o := sh(t, s, "guesttool mmap /m")
	want := strings.Repeat("abcdefghijklmnopqrstuvwxyz", 1<<20/26+1)[:1<<20]
	if e := o.entries["m"]; e.content != want {
		t.Errorf("the mapped file has %d bytes in the layer", e.sum)
	}
	sh(t, s, "head -c 3 /m").wantOut(t, "abc")
}

func testUnlinked(t *testing.T, h *harness) {
	o := sh(t, h.start(t, nil, h.base, h.tools), "guesttool unlinked /var 2>/dev/null || { mkdir /var; guesttool unlinked /var; }")
	o.wantOut(t, "1048576 0\n")
	o.wantNames(t, "var")
}

func testDeepTree(t *testing.T, h *harness) {
	s := h.start(t, nil, h.base, h.tools)
	const depth = 400 // about as long as a path may be
	o := sh(t, s, fmt.Sprintf("mkdir /deep; guesttool deep /deep %d", depth))
	last := o.order[len(o.order)-1]
	if len(o.order) != depth+2 || !strings.HasSuffix(last, "/bottom") || o.entries[last].content != "deep" {
		t.Errorf("%d entries, the last is %d bytes long", len(o.order), len(last))
	}
	sh(t, s, "find /deep | wc -l").wantOut(t, itoa(depth+2)+"\n")
	if o := sh(t, s, "rm -r /deep"); !slices.Equal(o.order, []string{".wh.deep"}) {
		t.Errorf("removal gave %v", o.order)
	}
}

// testSameBytes: the same changes give the same tar.
func testSameBytes(t *testing.T, h *harness) {
	var first []byte
	for i := range 3 {
		s := h.start(t, nil, h.base, h.tools)
		o := sh(t, s, `mkdir /w; cd /w; for i in $(seq 20); do echo $i > f$i; guesttool settime f$i 1 0; done
			for n in a b c d; do guesttool setxattr f1 user.$n 00; done; rm /etc/passwd; guesttool settime /w 1 0; guesttool settime /etc 1 0`)
		if i == 0 {
			first = o.changes
		} else if !bytes.Equal(first, o.changes) {
			t.Fatal("the tar is not the same")
		}
	}
}

func testSessionChain(t *testing.T, h *harness) {
	steps := 320
	if testing.Short() {
		steps = 60
	}
	s := h.start(t, nil)
	begin := time.Now()
	var quarter time.Duration
	for i := range steps {
		if i == steps/4 {
			quarter = time.Since(begin)
		}
		o := sh(t, s, fmt.Sprintf("test $(cat /n 2>/dev/null || echo 0) = %d; echo %d > /n; mkdir -p /d; touch /d/f%d; test $((%d %% 3)) = 0 || rm /d/f%d; echo step %d", i, i+1, i, i, i, i))
		o.wantOut(t, fmt.Sprintf("step %d\n", i))
		want := []string{"d", "n"}
		if i%3 == 0 {
			want = []string{"d", fmt.Sprintf("d/f%d", i), "n"}
		}
		o.wantNames(t, want...)
	}
	t.Logf("%d steps in %s, the first quarter in %s", steps, time.Since(begin), quarter)
	sh(t, s, "cat /n; ls /d | wc -l; rm -r /d; mkdir /d; ls /d | wc -l").wantOut(t, fmt.Sprintf("%d\n%d\n0\n", steps, (steps+2)/3))
	sh(t, s, "ls /d | wc -l").wantOut(t, "0\n")
}

// testManyLayers: as many layers as docker allows, and more than an overlay takes.
func testManyLayers(t *testing.T, h *harness) {
	for _, n := range []int{127, 520} {
		if n > 127 && testing.Short() {
			continue
		}
		layers := []string{h.base}
		for i := 1; i < n; i++ {
			es := []entry{file("top", itoa(int64(i))), dir("d"), file(fmt.Sprintf("d/%d", i), "x")}
			if i > 1 {
				es = append(es, file(fmt.Sprintf("d/.wh.%d", i-1), ""))
			}
			layers = append(layers, image(t, es...))
		}
		s := h.start(t, nil, layers...)
		o := sh(t, s, "cat /top; ls /d; rm -r /d; mkdir /d; sed -i s/x/y/ /etc/passwd")
		o.wantOut(t, fmt.Sprintf("%d%d\n", n-1, n-1))
		sh(t, s, "ls /d; grep -c x /etc/passwd; /bin/busybox true")
	}
}

// testNoLayers: a session on nothing.
func testNoLayers(t *testing.T, h *harness) {
	s := h.start(t, nil, []string{}...)
	o := run(t, s, sandbox.Process{Args: []string{"/bin/sh"}, Env: []string{path}, Cwd: "/"})
	if e := o.wantExit(t, 127); !e.NotFound {
		t.Errorf("%+v", e)
	}
}
