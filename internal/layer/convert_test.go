package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/tree"
)

func pax(k, v string) func(*ent) {
	return func(e *ent) {
		e.Format = tar.FormatPAX
		if e.PAXRecords == nil {
			e.PAXRecords = map[string]string{}
		}
		e.PAXRecords[k] = v
	}
}

func owner(uid, gid int) func(*ent) { return func(e *ent) { e.Uid, e.Gid = uid, gid } }

func typed(c byte) func(*ent) { return func(e *ent) { e.Typeflag = c } }

// convertCase is a tar, and what Convert makes of it: root first, one line a path.
type convertCase struct {
	name string
	in   []ent
	want string
}

func TestConvertFiles(t *testing.T) {
	testConvert(t, []convertCase{
		{"nothing", nil, `./ 755`},
		{"files", []ent{dir("a/", 0o1777), reg("a/b", "x"), reg("a/c", ""), symlink("l", "../../etc")}, `
			./ 755
			a/ 1777
			a/b "x"
			a/c ""
			l -> ../../etc`},
		{"root's entry is ignored", []ent{dir("./", 0o700), dir("/", 0o711), reg("./a", "x")}, `
			./ 755
			a "x"`},
		{"names stay in the root", []ent{reg("/abs", "1"), reg("../up", "2"), reg("a/../../../b", "3"), reg("./c//d/./e", "4")}, `
			./ 755
			abs "1"
			b "3"
			c/ 755 kiln.implied="y"
			c/d/ 755 kiln.implied="y"
			c/d/e "4"
			up "2"`},
		{"missing parents", []ent{reg("x/y/z", "1"), dir("x/", 0o700)}, `
			./ 755
			x/ 700
			x/y/ 755 kiln.implied="y"
			x/y/z "1"`},
		{"the last of one name wins", []ent{reg("a", "1"), reg("a", "22"), symlink("b", "x"), reg("b", "3"), reg("c", "4"), symlink("c", "y")}, `
			./ 755
			a "22"
			b "3"
			c -> y`},
		{"directory over directory keeps content", []ent{dir("d/", 0o700).with(pax("SCHILY.xattr.user.a", "1")), reg("d/f", "1"), dir("d/", 0o711).with(pax("SCHILY.xattr.user.b", "2"))}, `
			./ 755
			d/ 711 user.a="1" user.b="2"
			d/f "1"`},
		{"file over directory, and back", []ent{dir("d/", 0o700), reg("d/f", "1"), reg("d", "file"), dir("e/", 0o700), reg("e/f", "1"), reg("e", "file"), dir("e/", 0o711)}, `
			./ 755
			d "file"
			e/ 711`},
	})
}

func TestConvertWhiteoutsAndLinks(t *testing.T) {
	testConvert(t, []convertCase{
		{"whiteouts", []ent{reg("d/.wh.gone", ""), reg(".wh.top", "content is not looked at"), dir("d/.wh.dir/", 0o755)}, `
			./ 755
			d/ 755 kiln.implied="y"
			d/dir whiteout
			d/gone whiteout
			top whiteout`},
		{"opaque", []ent{dir("d/", 0o755), reg("d/f", "1"), reg("d/.wh..wh..opq", ""), reg("e/.wh..wh..opq", "")}, `
			./ 755
			d/ 755 opaque="y"
			d/f "1"
			e/ 755 kiln.implied="y" opaque="y"`},
		{"opaque root", []ent{reg(".wh..wh..opq", ""), reg("f", "1")}, `
			./ 755 opaque="y"
			f "1"`},
		{"whiteout and entry of one name", []ent{reg(".wh.a", ""), reg("a", "1"), reg("b", "2"), reg(".wh.b", ""), reg(".wh.c", ""), dir("c/", 0o700), dir("d/", 0o700), reg("d/f", "3"), reg(".wh.d", ""), reg(".wh.e", ""), reg("e/f", "4")}, `
			./ 755
			a "1"
			b "2"
			c/ 700 opaque="y"
			d/ 700 opaque="y"
			d/f "3"
			e/ 755 kiln.implied="y" opaque="y"
			e/f "4"`},
		{"overlayfs' own whiteout", []ent{dev("w", tar.TypeChar, 0, 0)}, `
			./ 755
			w whiteout`},
		{"AUFS' own files", []ent{reg(".wh..wh.aufs", ""), dir(".wh..wh.plnk/", 0o700), reg(".wh..wh.plnk/1.2", "x"), dir(".wh..wh.orph", 0o700), reg("a", "1")}, `
			./ 755
			a "1"`},
		{"devices", []ent{dev("null", tar.TypeChar, 1, 3), dev("sda", tar.TypeBlock, 8, 0), dev("big", tar.TypeBlock, 4095, 1048575), dev("zero", tar.TypeBlock, 0, 0), dev("fifo", tar.TypeFifo, 0, 0)}, `
			./ 755
			big 060600 4095,1048575
			fifo 010600 0,0
			null 020600 1,3
			sda 060600 8,0
			zero 060600 0,0`},
		{"hard links", []ent{reg("a", "1"), hardlink("b", "a"), hardlink("d/c", "./b"), hardlink("/e", "/../d/c"), symlink("s", "x"), hardlink("t", "s")}, `
			./ 755
			a "1" =a
			b "1" =a
			d/ 755 kiln.implied="y"
			d/c "1" =a
			e "1" =a
			s -> x =s
			t -> x =s`},
		{"hard links before their target", []ent{hardlink("a", "d/z"), hardlink("b", "a"), hardlink("c", "b"), reg("d/z", "1")}, `
			./ 755
			a "1" =a
			b "1" =a
			c "1" =a
			d/ 755 kiln.implied="y"
			d/z "1" =a`},
		{"a link to a file that is then replaced", []ent{reg("a", "old"), hardlink("b", "a"), reg("a", "new")}, `
			./ 755
			a "new"
			b "old"`},
		{"a link before its target, then replaced", []ent{hardlink("a", "z"), reg("a", "own"), reg("z", "1")}, `
			./ 755
			a "own"
			z "1"`},
		{"the same link twice", []ent{reg("a", "1"), hardlink("b", "a"), hardlink("b", "a")}, `
			./ 755
			a "1" =a
			b "1" =a`},
	})
}

func TestConvertNames(t *testing.T) {
	long := strings.Repeat("n", 255)
	deep := strings.Repeat("d/", 200)
	testConvert(t, []convertCase{
		{"symbolic links on the way", []ent{dir("usr/lib/", 0o755), symlink("lib", "usr/lib"), reg("lib/x", "1"), symlink("abs", "/usr"), reg("abs/lib/y", "2"), symlink("out", "../../.."), reg("out/z", "3"), symlink("usr/up", ".."), reg("usr/up/w", "4"), reg("lib/.wh.gone", ""), hardlink("hl", "lib/x")}, `
			./ 755
			abs -> /usr
			hl "1" =hl
			lib -> usr/lib
			out -> ../../..
			usr/ 755 kiln.implied="y"
			usr/lib/ 755
			usr/lib/gone whiteout
			usr/lib/x "1" =hl
			usr/lib/y "2"
			usr/up -> ..
			w "4"
			z "3"`},
		{"a dangling link's target is made", []ent{symlink("lib", "usr/lib"), reg("lib/x", "1")}, `
			./ 755
			lib -> usr/lib
			usr/ 755 kiln.implied="y"
			usr/lib/ 755 kiln.implied="y"
			usr/lib/x "1"`},
		{"a symbolic link replaces a directory", []ent{dir("d/", 0o755), reg("d/f", "1"), symlink("d", "e"), reg("d/g", "2")}, `
			./ 755
			d -> e
			e/ 755 kiln.implied="y"
			e/g "2"`},
		{"long names", []ent{reg(long, "1"), reg(deep+"f", "2").with(func(e *ent) { e.Format = tar.FormatGNU }), symlink("s", strings.Repeat("t", 4095))}, "./ 755\n" +
			func() string {
				s := ""
				for i := range 200 {
					s += strings.TrimSuffix(deep[:2*i+2], "/") + "/ 755 kiln.implied=\"y\"\n"
				}
				return s
			}() + deep + "f \"2\"\n" + long + " \"1\"\ns -> " + strings.Repeat("t", 4095)},
		{"xattrs", []ent{
			reg("cap", "x").with(pax("SCHILY.xattr.security.capability", "\x01\x00\x00\x02\x00")),
			reg("la", "x").with(pax("LIBARCHIVE.xattr.user.%3D%61", "AAE")),
			reg("both", "x").with(pax("LIBARCHIVE.xattr.user.a", "AAE")).with(pax("SCHILY.xattr.user.a", "s")),
			dir("private", 0o755).with(pax("SCHILY.xattr.trusted.overlay.opaque", "y")).with(pax("SCHILY.xattr."+XattrImplied, "y")),
			reg("other", "x").with(pax("KILN.thing", "y")),
			hardlink("both2", "both").with(pax("SCHILY.xattr.user.b", "t")),
		}, `
			./ 755
			both "x" =both user.a="s" user.b="t"
			both2 "x" =both user.a="s" user.b="t"
			cap "x" security.capability="\x01\x00\x00\x02\x00"
			la "x" user.=a="\x00\x01"
			other "x"
			private/ 755`},
		{"global PAX headers", []ent{{tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}}, ""}, reg("a", "1")}, `
			./ 755
			a "1"`},
		{"contiguous file", []ent{reg("a", "1").with(typed(tar.TypeCont))}, `
			./ 755
			a "1"`},
	})
}

func testConvert(t *testing.T, cases []convertCase) {
	t.Helper()
	for _, tt := range cases {
		t.Run(tt.name, func(t *testing.T) {
			got := brief(t, open(t, convert(t, mktar(t, tt.in...))))
			var want []string
			for l := range strings.SplitSeq(strings.TrimSpace(tt.want), "\n") {
				want = append(want, strings.TrimLeft(l, "\t"))
			}
			if w := strings.Join(want, "\n"); got != w {
				t.Errorf("got\n%s\nwant\n%s", got, w)
			}
		})
	}
}

// What Convert refuses, and that the error says why and where.
func TestConvertRefuses(t *testing.T) {
	for _, tt := range []struct {
		name string
		in   []ent
		want string
	}{
		{"link to nowhere", []ent{hardlink("a", "nowhere")}, `entry "a": hard link to "nowhere": no such entry in this layer`},
		{"link to outside", []ent{hardlink("a", "../../etc/shadow")}, "no such entry in this layer"},
		{"link to a whiteout", []ent{reg(".wh.b", ""), hardlink("a", "b")}, "no such entry in this layer"},
		{"link to a whiteout's name", []ent{reg(".wh.b", ""), hardlink("a", ".wh.b")}, "no such entry in this layer"},
		{"link to itself", []ent{hardlink("a", "a")}, "lead to each other"},
		{"link to itself, which is there", []ent{reg("a", "1"), hardlink("a", "a")}, "hard link to itself"},
		{"links in a circle", []ent{hardlink("a", "b"), hardlink("b", "c"), hardlink("c", "a")}, "lead to each other"},
		{"link to a directory", []ent{dir("d/", 0o755), hardlink("a", "d")}, "hard link to a directory"},
		{"link to a later directory", []ent{hardlink("a", "d"), dir("d/", 0o755)}, "hard link to a directory"},
		{"link to what was replaced", []ent{dir("d/", 0o755), reg("d/f", "1"), reg("d", "x"), hardlink("a", "d/f")}, "a parent is not a directory"},
		{"link in a directory that went away", []ent{dir("d", 0o755), hardlink("d/a", "nowhere"), reg("d", "file")}, "no such entry in this layer"},
		{"link to the root", []ent{hardlink("a", "/")}, "no such entry in this layer"},
		{"file as a parent", []ent{reg("a", "1"), reg("a/b", "2")}, `entry "a/b": a parent is not a directory`},
		{"link as a parent", []ent{hardlink("a", "z"), reg("a/b", "2"), reg("z", "")}, "a parent is not a directory"},
		{"symbolic links in a circle", []ent{symlink("a", "b"), symlink("b", "a"), reg("a/f", "")}, "too many symbolic links"},
		{"symbolic links that grow", []ent{symlink("a", "a/"+strings.Repeat("x/", 2000)), reg("a/f", "")}, "too"},
		{"whiteout of nothing", []ent{reg("d/.wh.", "")}, `invalid whiteout: "" is no file name`},
		{"whiteout of .", []ent{reg("d/.wh..", "")}, `invalid whiteout: "." is no file name`},
		{"whiteout of ..", []ent{reg("d/.wh...", "")}, `invalid whiteout: ".." is no file name`},
		{"whiteout of a whiteout", []ent{reg("d/.wh..wh.x", "")}, "invalid whiteout"},
		{"whiteout as a parent", []ent{reg("d/.wh.x/y", "")}, "reserve for deletions"},
		{"opaque marker as a parent", []ent{reg(".wh..wh..opq/y", "")}, "reserve for deletions"},
		{"long name", []ent{reg(strings.Repeat("n", 256), "")}, "longer than 255 bytes"},
		{"long path", []ent{reg(strings.Repeat("n/", 2047)+"xx", "")}, "longer than 4095 bytes"},
		{"very long path", []ent{reg(strings.Repeat("n/", 200_000)+"n", "")}, "longer than 4095 bytes"},
		{"long path by way of symbolic links", []ent{dir(strings.Repeat("n/", 2000), 0o755), symlink("s", strings.Repeat("n/", 2000)), reg("s/"+strings.Repeat("m/", 100)+"x", "")}, "path is longer"},
		{"symbolic link without target", []ent{symlink("a", "")}, "target of 0 bytes"},
		{"symbolic link with a long target", []ent{symlink("a", strings.Repeat("t", 4096))}, "target of 4096 bytes"},
		{"huge device", []ent{dev("a", tar.TypeChar, 4096, 0)}, "out of range"},
		{"huge minor", []ent{dev("a", tar.TypeBlock, 1, 1<<20)}, "out of range"},
		{"huge owner", []ent{reg("a", "").with(owner(1<<32, 0))}, "out of range"},
		{"unknown type", []ent{reg("a", "").with(typed('D'))}, `entry "a": unknown entry type 'D'`},
		{"xattr without a name", []ent{reg("a", "").with(pax("SCHILY.xattr.", "v"))}, "not possible"},
		{"xattr with a long name", []ent{reg("a", "").with(pax("SCHILY.xattr.user."+strings.Repeat("n", 251), "v"))}, "not possible"},
		{"xattr with a long value", []ent{reg("a", "").with(pax("SCHILY.xattr.user.a", strings.Repeat("v", 65537)))}, "more than 65536"},
		{"libarchive's xattr, damaged", []ent{reg("a", "").with(pax("LIBARCHIVE.xattr.user.a", "?"))}, "base64"},
		{"libarchive's xattr, name damaged", []ent{reg("a", "").with(pax("LIBARCHIVE.xattr.user.%zz", ""))}, "invalid URL escape"},
		{"libarchive's xattr, name with NUL", []ent{reg("a", "").with(pax("LIBARCHIVE.xattr.user.%00", ""))}, "not possible"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := filepath.Join(t.TempDir(), "layer")
			_, err := convertTo(p, bytes.NewReader(mktar(t, tt.in...)), Limits{})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("error %v, want %q", err, tt.want)
			}
			if _, err := Open(p); !errors.Is(err, ErrDamaged) {
				t.Errorf("what it leaves opens with %v", err)
			}
		})
	}
}

// header returns a tar whose one header, of a regular file a, was changed by
// hand. Tars that Go's writer would not write.
func header(t *testing.T, fn func(h []byte)) []byte {
	t.Helper()
	b := mktar(t, reg("a", ""))
	fn(b[:512])
	copy(b[148:], "        ")
	sum := 0
	for _, c := range b[:512] {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

func TestConvertMalformed(t *testing.T) {
	good := mktar(t, reg("a", strings.Repeat("x", 2000)))
	for _, tt := range []struct {
		name string
		in   []byte
		want string
	}{
		{"1 EiB in base 256", header(t, func(h []byte) { copy(h[124:], "\x80\x00\x00\x00\x10\x00\x00\x00\x00\x00\x00\x00") }), "MaxFileSize"},
		{"8 EiB in octal", header(t, func(h []byte) { copy(h[124:], "777777777777") }), "unexpected EOF"},
		{"negative size", header(t, func(h []byte) { copy(h[124:], "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00") }), "invalid tar header"},
		{"negative owner", header(t, func(h []byte) { copy(h[108:], "\xff\xff\xff\xff\xff\xff\xff\xff") }), "out of range"},
		{"negative device", header(t, func(h []byte) { h[156] = '3'; copy(h[329:], "\xff\xff\xff\xff\xff\xff\xff\xff") }), "out of range"},
		{"a file's content is cut off", good[:1000], "unexpected EOF"},
		{"a header is cut off", good[:300], "unexpected EOF"},
		{"garbage", bytes.Repeat([]byte("garbage "), 100), "invalid tar header"},
		{"wrong checksum", bytes.Replace(good, []byte("ustar"), []byte("xstar"), 1), "invalid tar header"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := convertTo(filepath.Join(t.TempDir(), "layer"), bytes.NewReader(tt.in), Limits{})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("error %v, want %q", err, tt.want)
			}
		})
	}
}

// What comes after the archive's end counts for the digest, and for nothing else.
func TestTrailingBytes(t *testing.T) {
	b := mktar(t, reg("a", "1"))
	for _, tail := range []string{"", "x", strings.Repeat("\x00", 9000), string(mktar(t, reg("b", "2"))) + "tail"} {
		r := open(t, convert(t, append(bytes.Clone(b), tail...)))
		if got := brief(t, r); got != "./ 755\na \"1\"" {
			t.Errorf("with %d bytes behind it: %s", len(tail), got)
		}
		if r.Info().TarSize != int64(len(b)+len(tail)) {
			t.Errorf("size %d", r.Info().TarSize)
		}
	}
	// No end marker, as some programs write it; and nothing at all.
	if got := brief(t, open(t, convert(t, b[:1024]))); got != "./ 755\na \"1\"" {
		t.Error(got)
	}
	if got := brief(t, open(t, convert(t, nil))); got != "./ 755" {
		t.Error(got)
	}
}

func TestLimits(t *testing.T) {
	big := strings.Repeat("x", 10_000)
	for _, tt := range []struct {
		name string
		lim  Limits
		in   []ent
		want string
	}{
		{"file", Limits{MaxFileSize: 9_999}, []ent{reg("a", big)}, "too many bytes in a file: the limit MaxFileSize is 9999"},
		{"stream", Limits{MaxBytes: 13_000}, []ent{reg("a", big), reg("b", "1"), reg("c", "1")}, "the limit MaxBytes is 13000"},
		{"entries", Limits{MaxEntries: 3}, []ent{reg("a", ""), reg("b/c/d", "")}, "too many entries in the layer: the limit MaxEntries is 3"},
		{"one entry again and again", Limits{MaxEntries: 3}, []ent{reg("a", ""), reg("a", ""), reg("a", ""), reg("a", "")}, "MaxEntries"},
		{"names", Limits{MaxNameBytes: 100}, []ent{reg(strings.Repeat("a", 101), "")}, "too many bytes of names and link targets: the limit MaxNameBytes is 100"},
		{"targets", Limits{MaxNameBytes: 100}, []ent{symlink("a", strings.Repeat("a", 50)), symlink("b", strings.Repeat("a", 50))}, "MaxNameBytes"},
		{"targets of links", Limits{MaxNameBytes: 100}, []ent{hardlink("a", strings.Repeat("a", 50)), hardlink("b", strings.Repeat("a", 50))}, "MaxNameBytes"},
		{"xattrs", Limits{MaxXattrBytes: 100}, []ent{
			reg("a", "").with(pax("SCHILY.xattr.user.a", strings.Repeat("x", 60))),
			reg("b", "").with(pax("SCHILY.xattr.user.a", strings.Repeat("y", 60))),
		}, "the limit MaxXattrBytes is 100"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := convertTo(filepath.Join(t.TempDir(), "layer"), bytes.NewReader(mktar(t, tt.in...)), tt.lim)
			var le *LimitError
			if !errors.As(err, &le) || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("error %v, want %q", err, tt.want)
			}
		})
	}
	// Equal sets of attributes count once.
	var es []ent
	for i := range 100 {
		es = append(es, reg(fmt.Sprint(i), "").with(pax("SCHILY.xattr.security.selinux", "system_u:object_r:usr_t:s0")))
	}
	if _, err := convertTo(filepath.Join(t.TempDir(), "layer"), bytes.NewReader(mktar(t, es...)), Limits{MaxXattrBytes: 100}); err != nil {
		t.Error(err)
	}
}

// endless is a tar that does not end: one file of zeros.
type endless struct {
	head []byte
	n    int64
}

func (e *endless) Read(p []byte) (int, error) {
	if len(e.head) > 0 {
		n := copy(p, e.head)
		e.head = e.head[n:]
		return n, nil
	}
	clear(p)
	e.n += int64(len(p))
	return len(p), nil
}

// A bomb of zeros ends at the limit, and takes neither memory nor disk on its way.
func TestZeroBomb(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "a", Size: 1 << 40}); err != nil {
		t.Fatal(err)
	}
	p := filepath.Join(t.TempDir(), "layer")
	_, err := convertTo(p, &endless{head: b.Bytes()}, Limits{MaxBytes: 256 << 20, MaxFileSize: 1 << 41})
	var le *LimitError
	if !errors.As(err, &le) || le.Name != "MaxBytes" {
		t.Errorf("error %v", err)
	}
	if n := diskUsage(t, p); n > 1<<20 {
		t.Errorf("%d bytes on disk", n)
	}
	// Behind the archive's end too.
	_, err = convertTo(p, &endless{}, Limits{MaxBytes: 64 << 20})
	if !errors.As(err, &le) || le.Name != "MaxBytes" {
		t.Errorf("error %v", err)
	}
}

func TestConvertCancelled(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "a", Size: 1 << 36}); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "layer"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	why := errors.New("because")
	ctx, cancel := context.WithCancelCause(context.Background())
	time.AfterFunc(50*time.Millisecond, func() { cancel(why) })
	start := time.Now()
	if _, err := Convert(ctx, &endless{head: b.Bytes()}, f, Limits{}); !errors.Is(err, why) {
		t.Errorf("error %v", err)
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("it took %v", d)
	}
}

// Convert's error is the source's: a registry's stream verifies itself at its end.
func TestConvertReportsReadErrors(t *testing.T) {
	why := errors.New("digest does not match")
	b := mktar(t, reg("a", "1"))
	for _, n := range []int{0, 100, 600, len(b)} {
		_, err := convertTo(filepath.Join(t.TempDir(), "layer"), io.MultiReader(bytes.NewReader(b[:n]), errReader{why}), Limits{})
		if !errors.Is(err, why) {
			t.Errorf("after %d bytes: error %v", n, err)
		}
	}
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

func TestMetadata(t *testing.T) {
	times := []time.Time{
		time.Unix(0, 0), time.Unix(-1, 0), time.Unix(-5, 999999999), time.Unix(1<<33, 1), time.Unix(1700000000, 123456789),
		time.Date(1901, 1, 1, 0, 0, 0, 5, time.UTC), time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC),
	}
	var es []ent
	for i, at := range times {
		es = append(es, reg(fmt.Sprintf("t%d", i), "").with(func(e *ent) { e.Format, e.ModTime = tar.FormatPAX, at }))
	}
	es = append(es, reg("suid", "").with(func(e *ent) { e.Mode = 0o106755; e.Uid, e.Gid = 4294967295, 4294967294 }))
	r := open(t, convert(t, mktar(t, es...)))
	for i, at := range times {
		n, err := r.Lstat(fmt.Sprintf("t%d", i))
		if err != nil || !n.MTime.Equal(at) {
			t.Errorf("time %v, %v, want %v", n.MTime, err, at)
		}
	}
	n, err := r.Lstat("suid")
	if err != nil || n.Mode != tree.ModeRegular|0o6755 || n.UID != 4294967295 || n.GID != 4294967294 {
		t.Errorf("%+v, %v", n, err)
	}
	// A link's own metadata is the file's, as when containerd applies it.
	r = open(t, convert(t, mktar(t, reg("a", "x").with(owner(1, 2)), hardlink("b", "a").with(owner(3, 4)).with(func(e *ent) { e.Mode = 0o600 }))))
	n, err = r.Lstat("a")
	if err != nil || n.UID != 3 || n.GID != 4 || n.Mode != tree.ModeRegular|0o600 || n.Nlink != 2 {
		t.Errorf("%+v, %v", n, err)
	}
}

func TestGNUSparse(t *testing.T) {
	// Sparse files as GNU tar writes them, in its three ways: a hole of 1 MiB, then "end".
	for _, format := range []string{"--sparse-version=1.0 --format=pax", "--sparse-version=0.1 --format=pax", "--format=gnu"} {
		b := gnuTar(t, format)
		p := convert(t, b)
		r := open(t, p)
		f, err := r.Open("s")
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(f)
		if err != nil || string(got) != strings.Repeat("\x00", 1<<20)+"end" {
			t.Errorf("%s: %d bytes, %v", format, len(got), err)
		}
		if n := diskUsage(t, p); n > 64<<10 {
			t.Errorf("%s: the layer file takes %d bytes", format, n)
		}
	}
}
