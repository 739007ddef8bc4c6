package e2e

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/test/kilnrun"
)

const guarded = "what nobody may read or change"

// hostileBed is a bed with files beside the store that the builder could write
// and read, and must not.
type hostileBed struct {
	*kilnrun.Bed
	guard string
}

func newHostileBed(t *testing.T) hostileBed {
	bed := kilnrun.Open(t, busybox)
	guard := filepath.Join(bed.Work, "guard")
	files{"secret": guarded, "dir/file": guarded, "Dockerfile": "FROM scratch\nLABEL x=" + guarded}.write(t, guard)
	if err := kilnrun.Own(guard); err != nil {
		t.Fatal(err)
	}
	return hostileBed{bed, guard}
}

// listing is all there is beside the store.
func (b hostileBed) listing(t *testing.T) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(b.Dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if p == b.Store() || p == filepath.Join(b.Dir, "registry") || strings.HasPrefix(p, filepath.Join(b.Dir, "context")) {
			if d.IsDir() {
				return filepath.SkipDir
			}
			return nil
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		line := fmt.Sprint(p, " ", fi.Mode(), " ", fi.Size())
		if fi.Mode().IsRegular() && fi.Size() < 1<<10 {
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			line += " " + string(data)
		}
		all = append(all, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// hostile is a build with bad input and what must come of it.
type hostile struct {
	name       string
	dockerfile string
	files      files
	// setup makes what files cannot; G in the Dockerfile and in link targets is the guarded directory.
	setup func(t *testing.T, dir string, b hostileBed)
	stdin func(t *testing.T, b hostileBed) []byte // a tar context
	args  []string
	// codes are the exit codes that will do. With 0 the image is looked at, too.
	codes []int
	says  []string
	has   []string // paths that the image must have
}

func (h hostile) run(t *testing.T, b hostileBed) {
	t.Helper()
	before := b.listing(t)
	dir, err := os.MkdirTemp(b.Dir, "context-*")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if h.dockerfile != "" {
		files{"Dockerfile": strings.ReplaceAll(h.dockerfile, "G/", b.guard+"/")}.write(t, dir)
	}
	h.files.write(t, dir)
	if h.setup != nil {
		h.setup(t, dir, b)
	}
	ref := b.Host + "/hostile:" + strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, strings.ToLower(t.Name()))
	args := append([]string{"build", "--progress", "plain", "--push", "--build-arg", "REGISTRY=" + b.Host, "-t", ref}, h.args...)
	start := time.Now()
	var out string
	var code int
	if h.stdin != nil {
		out, code = runIn(t, b.Runner, bytes.NewReader(h.stdin(t, b)), append(args, "-")...)
	} else {
		out, code = run(t, b.Runner, append(args, dir)...)
	}
	t.Logf("exit code %d after %.1f s: %s", code, time.Since(start).Seconds(), lastError(out))
	if !slices.Contains(h.codes, code) {
		t.Errorf("exit code %d, not one of %v", code, h.codes)
	}
	if code != 0 {
		want(t, out, code, code, append([]string{`(?m)^ERROR: .`}, h.says...)...)
		notPushed(t, ref)
	} else {
		h.image(t, ref)
	}
	if strings.Contains(out, guarded) {
		t.Errorf("kiln printed the guarded file:\n%s", out)
	}
	if after := b.listing(t); !slices.Equal(before, after) {
		t.Errorf("something was changed outside the store:\n%q\n%q", before, after)
	}
	if t.Failed() {
		t.Logf("kiln printed:\n%.6000s", out)
	}
}

func (h hostile) image(t *testing.T, ref string) {
	t.Helper()
	fs := rootfs(t, ref)
	for p, e := range fs {
		if strings.Contains(e.Data, guarded) {
			t.Errorf("the image has a file from outside as %s", p)
		}
	}
	for _, p := range h.has {
		if _, ok := fs[p]; !ok {
			t.Errorf("%s is not in the image", p)
		}
	}
}

func lastError(out string) string {
	if i := strings.LastIndex(out, "ERROR: "); i >= 0 {
		return strings.TrimSpace(out[i:])
	}
	return "no error"
}

func symlinks(pairs ...string) func(*testing.T, string, hostileBed) {
	return func(t *testing.T, dir string, b hostileBed) {
		for i := 0; i < len(pairs); i += 2 {
			if err := os.Symlink(strings.ReplaceAll(pairs[i+1], "G/", b.guard+"/"), filepath.Join(dir, pairs[i])); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func node(name string, mode uint32, dev uint64) func(*testing.T, string, hostileBed) {
	return func(t *testing.T, dir string, _ hostileBed) {
		if mode&unix.S_IFMT == unix.S_IFCHR {
			needRoot(t)
		}
		if err := unix.Mknod(filepath.Join(dir, name), mode, int(dev)); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(dir, name), 0o666); err != nil {
			t.Fatal(err)
		}
	}
}

const up = "../../../../../../../../../../../.."

// TestHostileContexts: contexts that point outside, or never end.
func TestHostileContexts(t *testing.T) {
	guard(t)
	b := newHostileBed(t)
	fileOrNot := []int{0, diag.ExitDockerfile}
	bad := []int{diag.ExitDockerfile}
	for _, h := range []hostile{
		{name: "symlink to a file, absolute", dockerfile: "FROM scratch\nCOPY l /x\n", setup: symlinks("l", "G/secret"), codes: fileOrNot, says: []string{`l`}},
		{name: "symlink to a file, relative", dockerfile: "FROM scratch\nCOPY l /x\n", setup: symlinks("l", "../kiln/guard/secret"), codes: fileOrNot},
		{name: "symlink to a directory", dockerfile: "FROM scratch\nCOPY d/secret /x\n", setup: symlinks("d", "G/"), codes: bad, says: []string{`d/secret`, `Dockerfile:2`}},
		{name: "symlink among others", dockerfile: "FROM scratch\nCOPY . /x/\n", files: files{"a": "a"}, setup: symlinks("l", "G/secret", "m", up+"/etc/passwd"), codes: []int{0}, has: []string{"/x/l"}},
		{name: "glob through a symlink", dockerfile: "FROM scratch\nCOPY d/* /x/\n", setup: symlinks("d", "G/dir"), codes: fileOrNot},
		{name: "symlink to itself", dockerfile: "FROM scratch\nCOPY l /x\n", setup: symlinks("l", "l"), codes: fileOrNot},
		{name: "symlink cycle", dockerfile: "FROM scratch\nCOPY a/b/c /x\n", setup: symlinks("a", "b", "b", "a"), codes: bad, says: []string{`a/b/c`}},
		{name: "FIFO", dockerfile: "FROM scratch\nCOPY f /x\n", setup: node("f", unix.S_IFIFO|0o666, 0), codes: fileOrNot, says: []string{`"?f"?`}},
		{name: "FIFO among others", dockerfile: "FROM scratch\nCOPY . /x/\n", setup: node("f", unix.S_IFIFO|0o666, 0), codes: fileOrNot, says: []string{`"?f"?`}},
		{name: "endless device", dockerfile: "FROM scratch\nCOPY z /x\n", setup: node("z", unix.S_IFCHR|0o666, unix.Mkdev(1, 5)), codes: fileOrNot, says: []string{`"?z"?`}},
		{name: "endless device among others", dockerfile: "FROM scratch\nCOPY . /x/\n", setup: node("z", unix.S_IFCHR|0o666, unix.Mkdev(1, 5)), codes: fileOrNot, says: []string{`"?z"?`}},
		{name: "socket", dockerfile: "FROM scratch\nCOPY . /x/\n", codes: fileOrNot, setup: func(t *testing.T, dir string, _ hostileBed) {
			l, err := net.Listen("unix", filepath.Join(dir, "s"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
		}},
		{name: "dot dot source", dockerfile: "FROM scratch\nCOPY ../kiln/guard/secret /x\n", codes: bad, says: []string{`kiln/guard/secret`, `Dockerfile:2`}},
		{name: "many dots source", dockerfile: "FROM scratch\nCOPY " + up + "/etc/passwd /x\n", codes: bad, says: []string{`etc/passwd`, `Dockerfile:2`}},
		{name: "absolute source", dockerfile: "FROM scratch\nCOPY G/secret /x\n", codes: bad, says: []string{`guard/secret`, `Dockerfile:2`}},
		{name: "dot dot from", dockerfile: "FROM scratch AS a\nCOPY f /f\nFROM scratch\nCOPY --from=a " + up + "/etc/passwd /x\n", files: files{"f": "f"}, codes: bad, says: []string{`etc/passwd`, `Dockerfile:4`}},
		{name: "symlink of a stage", dockerfile: "FROM scratch AS a\nCOPY . /\nFROM scratch\nCOPY --from=a /d/secret /x\n", setup: symlinks("d", "G/"), codes: bad, says: []string{`d/secret`, `Dockerfile:4`}},
		{name: "dot dot destination", dockerfile: "FROM scratch\nCOPY f " + up + "/G/new\nCOPY f ../../../y\n", files: files{"f": "f"}, codes: []int{0}, has: []string{"/y"}},
		{name: "destination through a symlink", dockerfile: "FROM scratch\nCOPY d /d\nCOPY f /d/new\nCOPY f /d/\n", files: files{"f": "f"}, setup: symlinks("d", "G/"), codes: fileOrNot},
		{name: "workdir", dockerfile: "FROM scratch\nWORKDIR " + up + "/G/w\nWORKDIR ../../../..\nCOPY f f\n", files: files{"f": "f"}, codes: []int{0}},
		{name: "Dockerfile is a directory", files: files{"Dockerfile/": ""}, codes: bad, says: []string{`Dockerfile`}},
		{name: "Dockerfile is a FIFO", setup: node("Dockerfile", unix.S_IFIFO|0o666, 0), codes: bad, says: []string{`Dockerfile`}},
		{name: "Dockerfile is a device", setup: node("Dockerfile", unix.S_IFCHR|0o666, unix.Mkdev(1, 5)), codes: bad, says: []string{`Dockerfile`}},
		{name: "Dockerfile is huge", setup: sparse("Dockerfile"), codes: bad, says: []string{`Dockerfile`}},
		{name: "dockerignore is a FIFO", dockerfile: "FROM scratch\nCOPY . /x\n", setup: node(".dockerignore", unix.S_IFIFO|0o666, 0), codes: fileOrNot, says: []string{`\.dockerignore`}},
		{name: "dockerignore is huge", dockerfile: "FROM scratch\nCOPY . /x\n", setup: sparse(".dockerignore"), codes: bad, says: []string{`\.dockerignore`}},
		{name: "dockerignore points outside", dockerfile: "FROM scratch\nCOPY a /x\n", files: files{"a": "a"}, setup: symlinks(".dockerignore", "G/secret"), codes: fileOrNot},
		{name: "dockerignore of evil patterns", dockerfile: "FROM scratch\nCOPY a /x\n", files: files{"a": "a", ".dockerignore": strings.Repeat("**/", 2000) + "x\n" + strings.Repeat("*", 5000) + "b\n[[[\n!!\n" + up + "\n"}, codes: fileOrNot},
		{name: "unreadable", dockerfile: "FROM scratch\nCOPY . /x/\n", files: files{"a": "a"}, codes: bad, says: []string{`"?a"?.*permission denied`}, setup: func(t *testing.T, dir string, _ hostileBed) {
			if err := os.Chmod(filepath.Join(dir, "a"), 0); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "odd names", dockerfile: "FROM scratch\nCOPY . /x/\n", files: files{"a\nb": "1", "c\x1b[31md": "2", "\xff\xfe": "3", strings.Repeat("n", 255): "4", ".wh.a": "5", ".wh..wh..opq": "6"}, codes: fileOrNot, says: []string{`\.wh\.`}},
		{name: "ADD of an evil tar", dockerfile: "FROM scratch\nADD t.tar /x/\n", setup: localTar, codes: fileOrNot, says: []string{`t\.tar`}},
	} {
		t.Run(h.name, func(t *testing.T) { h.run(t, b) })
	}
}

// sparse makes a file of 8 GiB that takes no room.
func sparse(name string) func(*testing.T, string, hostileBed) {
	return func(t *testing.T, dir string, _ hostileBed) {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte("FROM scratch\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(p, 8<<30); err != nil {
			t.Fatal(err)
		}
	}
}

func localTar(t *testing.T, dir string, b hostileBed) {
	if err := os.WriteFile(filepath.Join(dir, "t.tar"), tarBytes(t, evil(b)...), 0o644); err != nil {
		t.Fatal(err)
	}
}

// evil tries all ways out of where a tar is unpacked that names allow.
func evil(b hostileBed) []tarEntry {
	return []tarEntry{
		{Name: "ok", Body: "ok"},
		{Name: up + b.guard + "/new1", Body: "x"},
		{Name: b.guard + "/new2", Body: "x"},
		{Name: "a/../../../../b/../" + up + b.guard + "/secret", Body: "overwritten"},
		{Name: "link", Type: '2', Link: b.guard},
		{Name: "link/new3", Body: "x"},
		{Name: "rel", Type: '2', Link: up + b.guard},
		{Name: "rel/new4", Body: "x"},
		{Name: "rel/secret", Body: "overwritten"},
	}
}

// TestHostileTars: contexts from standard input that do not stay in their place.
func TestHostileTars(t *testing.T) {
	guard(t)
	b := newHostileBed(t)
	const dockerfile = "FROM scratch\nCOPY . /x/\n"
	tar := func(entries ...tarEntry) func(*testing.T, hostileBed) []byte {
		return func(t *testing.T, _ hostileBed) []byte {
			return tarBytes(t, append([]tarEntry{{Name: "Dockerfile", Body: dockerfile}}, entries...)...)
		}
	}
	bad := []int{diag.ExitDockerfile, diag.ExitFailure, diag.ExitUsage}
	any := append([]int{0}, bad...)
	for _, h := range []hostile{
		{name: "all ways out", codes: any, stdin: func(t *testing.T, b hostileBed) []byte {
			return tarBytes(t, append([]tarEntry{{Name: "Dockerfile", Body: dockerfile}}, evil(b)...)...)
		}},
		{name: "hard link out", codes: bad, says: []string{`"?h"?`}, stdin: func(t *testing.T, b hostileBed) []byte {
			return tarBytes(t, tarEntry{Name: "Dockerfile", Body: dockerfile}, tarEntry{Name: "h", Type: '1', Link: b.guard + "/secret"})
		}},
		{name: "hard link out, relative", codes: bad, says: []string{`"?h"?`}, stdin: func(t *testing.T, b hostileBed) []byte {
			return tarBytes(t, tarEntry{Name: "Dockerfile", Body: dockerfile}, tarEntry{Name: "h", Type: '1', Link: up + b.guard + "/secret"})
		}},
		{name: "hard link through a symlink", codes: bad, says: []string{`"?h"?`}, stdin: func(t *testing.T, b hostileBed) []byte {
			return tarBytes(t, tarEntry{Name: "Dockerfile", Body: dockerfile}, tarEntry{Name: "l", Type: '2', Link: b.guard}, tarEntry{Name: "h", Type: '1', Link: "l/secret"})
		}},
		{name: "Dockerfile is a symlink out", codes: bad, says: []string{`Dockerfile`}, stdin: func(t *testing.T, b hostileBed) []byte {
			return tarBytes(t, tarEntry{Name: "Dockerfile", Type: '2', Link: b.guard + "/Dockerfile"})
		}},
		{name: "hard link to itself", codes: bad, stdin: tar(tarEntry{Name: "h", Type: '1', Link: "h"})},
		{name: "1 EiB", codes: bad, says: []string{`big|too many|bytes`}, stdin: tar(tarEntry{Name: "big", Body: "x", Size: 1 << 60})},
		{name: "1 EiB Dockerfile", codes: bad, says: []string{`.`}, stdin: func(t *testing.T, _ hostileBed) []byte {
			return tarBytes(t, tarEntry{Name: "Dockerfile", Body: "FROM scratch\n", Size: 1 << 60})
		}},
		{name: "devices", codes: any, stdin: func(t *testing.T, _ hostileBed) []byte {
			entries := []tarEntry{{Name: "Dockerfile", Body: dockerfile}}
			for i := range 20000 {
				entries = append(entries, tarEntry{Name: fmt.Sprint("dev/", i), Type: "34"[i%2], Major: 8, Minor: int64(i % 256)})
			}
			return tarBytes(t, entries...)
		}},
		{name: "too many entries", codes: bad, says: []string{`too many`}, stdin: func(t *testing.T, _ hostileBed) []byte { return manyEntries(t) }},
		{name: "duplicates", codes: any, has: []string{"/x/d/f"}, stdin: tar(tarEntry{Name: "d", Body: "x"}, tarEntry{Name: "d", Type: '5', Mode: 0o755}, tarEntry{Name: "d/f", Body: "1"}, tarEntry{Name: "d/f", Body: "2"})},
		{name: "deep", codes: any, stdin: tar(tarEntry{Name: strings.Repeat("d/", 3000) + "f", Body: "x"})},
		{name: "truncated", codes: bad, stdin: func(t *testing.T, _ hostileBed) []byte {
			b := tarBytes(t, tarEntry{Name: "Dockerfile", Body: dockerfile}, tarEntry{Name: "f", Body: strings.Repeat("x", 10000)})
			return b[:5000]
		}},
		{name: "garbage", codes: bad, stdin: func(*testing.T, hostileBed) []byte { return bytes.Repeat([]byte{0xff, 0, 3}, 10000) }},
		{name: "empty", codes: bad, stdin: func(*testing.T, hostileBed) []byte { return nil }},
		{name: "truncated gzip", codes: bad, stdin: func(t *testing.T, _ hostileBed) []byte {
			z := gz(t, tarBytes(t, tarEntry{Name: "Dockerfile", Body: dockerfile}, tarEntry{Name: "f", Body: strings.Repeat("xyz", 100000)}))
			return z[:len(z)-20]
		}},
	} {
		t.Run(h.name, func(t *testing.T) { h.run(t, b) })
	}
}

// TestDecompressionBomb: a small download that is more than the disk ends in an
// error that says so, as context and as layer, and the store can still be used.
func TestDecompressionBomb(t *testing.T) {
	guard(t)
	needRoot(t)
	b := newHostileBed(t)
	smallTmpfs(t, b.Bed)
	chunk := bytes.Repeat([]byte("x"), 1<<20) // zeros would be holes, which take no room
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	for i := range 2 {
		head := tarBytes(t, tarEntry{Name: fmt.Sprint("big", i), Size: 512 << 20})
		if i == 0 {
			head = append(bytes.TrimSuffix(tarBytes(t, tarEntry{Name: "Dockerfile", Body: "FROM scratch\nCOPY . /\n"}), make([]byte, 1024)), head...)
		}
		if _, err := w.Write(head); err != nil {
			t.Fatal(err)
		}
		for range 512 {
			if _, err := w.Write(chunk); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := w.Write(make([]byte, 1024)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	t.Logf("the bomb has %d bytes", buf.Len())
	bomb := hostile{codes: []int{diag.ExitFailure}, says: []string{`no space left`, `hint: `}, stdin: func(*testing.T, hostileBed) []byte { return buf.Bytes() }}
	t.Run("context", func(t *testing.T) { bomb.run(t, b) })
	t.Run("layer", func(t *testing.T) {
		pushLayers(t, b.Host+"/evil:bomb", rawLayer(buf.Bytes()))
		hostile{dockerfile: "FROM " + b.Host + "/evil:bomb\nCOPY Dockerfile /D\n", codes: []int{diag.ExitFailure}, says: []string{`no space left`, `hint: `}}.run(t, b)
	})
	t.Run("after", func(t *testing.T) {
		hostile{dockerfile: "FROM " + b.Host + "/" + busybox + "\nRUN echo fine > /fine\n", codes: []int{0}, has: []string{"/fine"}}.run(t, b)
	})
}

func gz(t *testing.T, b []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// manyEntries is a gzip'd tar of more files than a layer may have.
func manyEntries(t *testing.T) []byte {
	t.Helper()
	var buf bytes.Buffer
	w, err := gzip.NewWriterLevel(&buf, gzip.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	end := make([]byte, 1024)
	if _, err := w.Write(bytes.TrimSuffix(tarBytes(t, tarEntry{Name: "Dockerfile", Body: "FROM scratch\nCOPY . /\n"}), end)); err != nil {
		t.Fatal(err)
	}
	block := tarBytes(t, tarEntry{Name: "0000000"})[:512]
	for i := range 1<<20 + 10 {
		copy(block, fmt.Sprintf("%07d", i))
		sum := 0
		copy(block[148:156], "        ")
		for _, c := range block {
			sum += int(c)
		}
		copy(block[148:156], fmt.Sprintf("%06o\x00 ", sum))
		if _, err := w.Write(block); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Write(end); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}
