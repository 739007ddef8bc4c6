// Package cachetruth holds one test: whatever a cache gives is what a build without
// one would have made. It generates Dockerfiles and build contexts, builds them
// with no cache, with every kind of cache, after small edits and by two builders at
// once, and compares the images.
//
//	go test ./test/cachetruth                         a few cases
//	scripts/cachetruth 2000                           many
//	KILN_CACHETRUTH_SEED=17 go test ./test/cachetruth one case again
package cachetruth

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// file is one of a build context: a directory if it is nothing else.
type file struct {
	data string
	link string // target of a symbolic link
	dir  bool
	mode os.FileMode
}

// stage is one of a Dockerfile.
type stage struct {
	from   string   // "BASE", "scratch" or an earlier stage's name
	instrs []string // whole instructions, heredocs too
}

// project is what is built.
type project struct {
	files  map[string]file
	ignore []string // lines of .dockerignore
	args   map[string]string
	stages []stage
}

func (p *project) clone() *project {
	c := &project{files: maps.Clone(p.files), ignore: slices.Clone(p.ignore), args: maps.Clone(p.args)}
	for _, s := range p.stages {
		c.stages = append(c.stages, stage{s.from, slices.Clone(s.instrs)})
	}
	return c
}

func stageName(i int) string { return fmt.Sprint("s", i) }

// dockerfile writes the stages out. Each is used by what comes after it, or not.
func (p *project) dockerfile(base string) string {
	var b strings.Builder
	for i, s := range p.stages {
		from := s.from
		if from == "BASE" {
			from = base
		}
		fmt.Fprintf(&b, "FROM %s AS %s\n", from, stageName(i))
		for _, in := range s.instrs {
			b.WriteString(in + "\n")
		}
	}
	return b.String()
}

// write makes dir the project's build context, changing no file that is as it should be.
func (p *project) write(dir, base string) error {
	all := maps.Clone(p.files)
	all["Dockerfile"] = file{data: p.dockerfile(base), mode: 0o644}
	if len(p.ignore) > 0 {
		all[".dockerignore"] = file{data: strings.Join(p.ignore, "\n") + "\n", mode: 0o644}
	}
	if err := removeOthers(dir, all); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if err := all[name].write(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// removeOthers removes what is not in the context any more, or of another type.
func removeOthers(dir string, all map[string]file) error {
	needed := map[string]bool{".": true}
	for name := range all {
		for d := filepath.Dir(name); d != "."; d = filepath.Dir(d) {
			needed[d] = true
		}
	}
	return filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		f, listed := all[name]
		keep := needed[name] && d.IsDir() || listed && f.dir == d.IsDir() && (f.link != "") == (d.Type()&os.ModeSymlink != 0)
		if keep {
			return nil
		}
		if err := os.RemoveAll(p); err != nil {
			return err
		}
		if d.IsDir() {
			return filepath.SkipDir
		}
		return nil
	})
}

func (f file) write(p string) error {
	if f.dir {
		if err := os.MkdirAll(p, 0o755); err != nil {
			return err
		}
		return os.Chmod(p, f.mode)
	}
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		return err
	}
	if f.link != "" {
		if have, err := os.Readlink(p); err == nil && have == f.link {
			return nil
		}
		_ = os.Remove(p)
		return os.Symlink(f.link, p)
	}
	if have, err := os.ReadFile(p); err != nil || string(have) != f.data {
		if err := os.WriteFile(p, []byte(f.data), 0o600); err != nil {
			return err
		}
	}
	return os.Chmod(p, f.mode)
}

// pick is one of some.
func pick[T any](r *rand.Rand, of ...T) T { return of[r.IntN(len(of))] }

// chance is true in so many of a hundred cases.
func chance(r *rand.Rand, percent int) bool { return r.IntN(100) < percent }
