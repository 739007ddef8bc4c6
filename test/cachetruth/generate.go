package cachetruth

import (
	"archive/tar"
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strings"
)

// generator makes a project up. RUN steps have results that depend on nothing but what
// they see, and do not fail.
type generator struct {
	r *rand.Rand
	p *project
	// paths are what each stage is known to have, more or less.
	paths [][]string
	n     int // for names
}

// generate makes up a project. withRun false: no RUN step, which makes it quick.
func generate(r *rand.Rand, withRun bool) *project {
	g := &generator{r: r, p: &project{files: map[string]file{}, args: map[string]string{}}}
	g.context()
	for range 1 + r.IntN(4) {
		g.stage(withRun)
	}
	return g.p
}

// context makes up the files.
func (g *generator) context() {
	for _, name := range []string{"a", "b.txt", "dir/x", "dir/y.txt", "dir/sub/z", "deep/er/f", "sp ace"} {
		if chance(g.r, 80) {
			g.p.files[name] = g.file()
		}
	}
	g.p.files["a"] = g.file()
	g.p.files["dir/x"] = g.file()
	if chance(g.r, 50) {
		g.p.files["link"] = file{link: pick(g.r, "a", "dir", "dir/x", "../a", "/dir/x", "nosuch")}
	}
	if chance(g.r, 30) {
		g.p.files["dir/link"] = file{link: pick(g.r, "x", "../a", "sub")}
	}
	if chance(g.r, 30) {
		g.p.files["empty"] = file{dir: true, mode: pick[os.FileMode](g.r, 0o755, 0o700)}
	}
	if chance(g.r, 30) {
		g.p.files["t.tar"] = file{data: g.archive(), mode: 0o644}
	}
	if chance(g.r, 30) {
		g.p.ignore = g.ignoreLines()
	}
}

func (g *generator) file() file {
	return file{data: g.text(), mode: pick[os.FileMode](g.r, 0o644, 0o644, 0o600, 0o755)}
}

// text is short, of few letters: so that some files are equal.
func (g *generator) text() string {
	var b strings.Builder
	for range g.r.IntN(12) {
		b.WriteString(pick(g.r, "a", "b", "c", "\n", " "))
	}
	return b.String()
}

func (g *generator) archive() string {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for range 1 + g.r.IntN(3) {
		text := g.text()
		_ = w.WriteHeader(&tar.Header{Name: pick(g.r, "in/1", "in/2", "top"), Mode: 0o644, Size: int64(len(text)), Typeflag: tar.TypeReg})
		_, _ = w.Write([]byte(text))
	}
	_ = w.Close()
	return b.String()
}

func (g *generator) ignoreLines() []string {
	all := []string{"b.txt", "dir/sub", "**/*.txt", "!dir/y.txt", "deep", "# comment", "empty", "*.tar"}
	g.r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all[:1+g.r.IntN(3)]
}

func (g *generator) name(kind string) string {
	g.n++
	return fmt.Sprint(kind, g.n)
}

func (g *generator) stage(withRun bool) {
	i := len(g.p.stages)
	from := "BASE"
	known := []string{"/etc/passwd", "/etc"}
	switch {
	case i > 0 && chance(g.r, 30):
		n := g.r.IntN(i)
		from, known = stageName(n), slices.Clone(g.paths[n])
	case !withRun && chance(g.r, 40):
		from, known = "scratch", nil
	}
	g.p.stages = append(g.p.stages, stage{from: from})
	g.paths = append(g.paths, known)
	for range 1 + g.r.IntN(6) {
		s := &g.p.stages[i]
		s.instrs = append(s.instrs, g.instr(i, withRun))
	}
}

// instr is one instruction for stage i.
func (g *generator) instr(i int, withRun bool) string {
	kinds := []func(int) string{g.copyContext, g.copyContext, g.copyFrom, g.copyFrom, g.heredoc, g.add, g.setting, g.setting}
	if withRun {
		kinds = append(kinds, g.run, g.run, g.run, g.run, g.runMount)
	}
	return pick(g.r, kinds...)(i)
}

// made notes that stage i has a path now. The root is none: /proc is never the same twice.
func (g *generator) made(i int, p string) {
	if p = path.Clean("/" + p); p != "/" {
		g.paths[i] = append(g.paths[i], p)
	}
}

// known is a path of stage i, of which there may be none in the end.
func (g *generator) known(i int) string {
	if len(g.paths[i]) == 0 {
		return "/nosuch"
	}
	return pick(g.r, g.paths[i]...)
}

func (g *generator) flags(i int) string {
	f := ""
	if chance(g.r, 20) {
		f += " --chown=" + pick(g.r, "1000:1001", "7", "0:5")
	}
	if chance(g.r, 15) {
		f += " --chmod=" + pick(g.r, "755", "600", "0444")
	}
	if chance(g.r, 20) {
		f += " --link"
	}
	return f
}

// sources are names of the context that COPY can take.
func (g *generator) source() string {
	names := slices.Sorted(maps.Keys(g.p.files))
	names = slices.DeleteFunc(names, func(n string) bool { return strings.Contains(n, " ") })
	return pick(g.r, append(names, "dir", "dir/", ".", "dir/*", "d*r/x", "a")...)
}

func (g *generator) copyContext(i int) string {
	dest := g.name("/c")
	if chance(g.r, 30) {
		dest = pick(g.r, "/data/", "rel/", "./", "/etc/")
	}
	sources := g.source()
	if strings.HasSuffix(dest, "/") && chance(g.r, 30) {
		sources += " " + g.source()
	}
	if strings.ContainsAny(sources, "*") && !strings.HasSuffix(dest, "/") {
		dest += "/"
	}
	ex := ""
	if chance(g.r, 10) {
		ex = " --exclude=" + pick(g.r, "*.txt", "sub", "x")
	}
	g.made(i, dest)
	if path.Base(sources) == "x" || path.Base(sources) == "a" {
		g.made(i, dest)
	}
	return "COPY" + g.flags(i) + ex + " " + sources + " " + dest
}

func (g *generator) copyFrom(i int) string {
	if i == 0 {
		return g.copyContext(i)
	}
	n := g.r.IntN(i)
	dest := g.name("/f")
	src := g.known(n)
	g.made(i, dest)
	return "COPY --from=" + stageName(n) + g.flags(i) + " " + src + " " + dest
}

func (g *generator) heredoc(i int) string {
	dest := g.name("/h")
	g.made(i, dest)
	quote := pick(g.r, "", `"`)
	return "COPY" + g.flags(i) + " <<" + quote + "EOF" + quote + " " + dest + "\n" + strings.TrimSpace(g.text()) + pick(g.r, "", "$A0", "${E0:-none}") + "\nEOF"
}

func (g *generator) add(i int) string {
	dest := g.name("/t") + "/"
	g.made(i, dest)
	if _, ok := g.p.files["t.tar"]; ok && chance(g.r, 60) {
		return "ADD" + pick(g.r, "", " --chown=3:4") + " t.tar " + dest
	}
	return "ADD a dir " + dest
}

// setting is an instruction that makes no layer, or an empty directory.
func (g *generator) setting(i int) string {
	switch g.r.IntN(6) {
	case 0:
		n := pick(g.r, "A0", "A1")
		if chance(g.r, 50) {
			g.p.args[n] = g.word()
		}
		return "ARG " + n + pick(g.r, "", "="+g.word())
	case 1:
		return "ENV " + pick(g.r, "E0", "E1", "A0") + "=" + pick(g.r, g.word(), "$A0", "x${A1}y")
	case 2:
		d := pick(g.r, "/w", "/w/deeper", "sub", "/w$A0", "/etc")
		if !strings.Contains(d, "$") && strings.HasPrefix(d, "/") {
			g.made(i, d)
		}
		return "WORKDIR " + d
	case 3:
		return "USER " + pick(g.r, "0", "1000", "1000:50", "0:0")
	case 4:
		return "LABEL l=" + g.word()
	}
	return "ENV " + pick(g.r, "E0", "E2") + "=" + g.word()
}

func (g *generator) word() string { return pick(g.r, "one", "two", "three", "o", "on") }

// command is a shell command whose result depends on what it sees.
func (g *generator) command(i int) string {
	p, q := g.known(i), g.known(i)
	out := g.name("/r")
	g.made(i, out)
	return pick(g.r,
		"cat %p %q > %o 2>/dev/null || true",
		"mkdir -p %o && cp -r %p %o/ 2>/dev/null || true",
		"rm -rf %p 2>/dev/null || true",
		"rm -rf %p 2>/dev/null; mkdir -p %p && echo new > %p/again || true",
		"ln -sf %p %o",
		"ln %p %o 2>/dev/null || true",
		"chmod %m %p 2>/dev/null || true",
		"chown 5:6 %p 2>/dev/null || true",
		"mv %p %o 2>/dev/null || true",
		"find %p 2>/dev/null | sort > %o",
		`echo "$A0 $A1 $E0 $E1 $E2" > %o`,
		"env | sort > %o",
		"id > %o; pwd >> %o",
		"cat %p 2>/dev/null | wc -c > %o",
		// What loses most of what it sees: then a changed input has the same result.
		"cat %p 2>/dev/null | head -c 1 > %o",
		"if [ -e %p ]; then echo yes; else echo no; fi > %o",
		"if [ -d %p ]; then ls %p | wc -l; fi > %o",
		"touch %p 2>/dev/null; true",
		"echo "+g.word()+" > rel"+g.word()+" 2>/dev/null || true",
		strings.NewReplacer("%p", p).Replace("cat %p 2>/dev/null | tr a-c A-C > %o"),
	) + " #" + p + " " + q + " " + out + " " + pick(g.r, "755", "600", "u+s")
}

// expand puts a command's paths in.
func expand(c string) string {
	c, names, _ := strings.Cut(c, " #")
	f := strings.Fields(names)
	return strings.NewReplacer("%p", f[0], "%q", f[1], "%o", f[2], "%m", f[3]).Replace(c)
}

func (g *generator) run(i int) string {
	c := expand(g.command(i))
	if chance(g.r, 20) {
		return "RUN <<EOF\n" + c + "\n" + expand(g.command(i)) + "\nEOF"
	}
	return "RUN " + pick(g.r, "", "", "", "--network=none ") + c
}

func (g *generator) runMount(i int) string {
	out := g.name("/m")
	g.made(i, out)
	see := " find /mnt 2>/dev/null | sort > " + out + "; cat /mnt /mnt/* >> " + out + " 2>/dev/null; true"
	if i > 0 && chance(g.r, 40) {
		n := g.r.IntN(i)
		return "RUN --mount=type=bind,from=" + stageName(n) + ",source=" + pick(g.r, "/etc", g.known(n)) + ",target=/mnt" + see
	}
	if chance(g.r, 20) {
		return "RUN --mount=type=tmpfs,target=/mnt" + see
	}
	return "RUN --mount=type=bind,source=" + pick(g.r, "dir", "a", "dir/x", ".") + ",target=/mnt" + pick(g.r, "", ",rw") + see
}
