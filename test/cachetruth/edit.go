package cachetruth

import (
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
)

// edit returns the project after a small change, and what it was.
func edit(r *rand.Rand, p *project, withRun bool) (*project, string) {
	c := p.clone()
	g := &generator{r: r, p: c, n: 1000 + r.IntN(1000)}
	for i, s := range c.stages {
		g.paths = append(g.paths, []string{"/etc"})
		for _, in := range s.instrs { // what instructions have as their last word mostly is a path
			if f := strings.Fields(strings.SplitN(in, "\n", 2)[0]); strings.HasPrefix(f[len(f)-1], "/") {
				g.made(i, f[len(f)-1])
			}
		}
	}
	names := slices.Sorted(maps.Keys(c.files))
	name := pick(r, names...)
	i := r.IntN(len(c.stages))
	s := &c.stages[i]
	at := r.IntN(len(s.instrs))
	f := c.files[name]
	switch n := r.IntN(14); {
	case n == 0:
		return c, "nothing"
	case n <= 3 && !f.dir && f.link == "":
		f.data = g.text()
		c.files[name] = f
		return c, "content of " + name
	case n == 4 && f.link == "":
		f.mode = pick[os.FileMode](r, 0o644, 0o600, 0o755, 0o700)
		c.files[name] = f
		return c, "mode of " + name
	case n == 5 && f.link != "":
		c.files[name] = file{link: pick(r, "a", "dir", "dir/x", "b.txt")}
		return c, "target of " + name
	case n == 6:
		c.files[pick(r, "new", "dir/new", "dir/sub/new", "d", "di/rx")] = g.file()
		return c, "another file"
	case n == 7 && name != "a" && name != "dir/x":
		delete(c.files, name)
		return c, "without " + name
	case n == 8:
		other := pick(r, names...)
		c.files[name], c.files[other] = c.files[other], f
		return c, name + " and " + other + " swapped"
	case n == 9:
		c.args[pick(r, "A0", "A1")] = g.word()
		return c, "build argument"
	case n == 10:
		c.ignore = g.ignoreLines()
		return c, "ignore file"
	case n == 11 && len(s.instrs) > 1:
		s.instrs = slices.Delete(s.instrs, at, at+1)
		return c, "without an instruction of " + stageName(i)
	case n == 12 && len(s.instrs) > 1:
		to := r.IntN(len(s.instrs))
		s.instrs[at], s.instrs[to] = s.instrs[to], s.instrs[at]
		return c, "instructions of " + stageName(i) + " swapped"
	}
	in := g.instr(i, withRun)
	if chance(r, 50) {
		s.instrs = slices.Insert(s.instrs, at, in)
		return c, "another instruction in " + stageName(i)
	}
	s.instrs[at] = in
	return c, "an instruction of " + stageName(i) + " replaced"
}
