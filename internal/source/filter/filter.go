// Package filter shows the part of a tree that include and exclude patterns
// leave of it: what BuildKit's local source makes of a build context with its
// .dockerignore and with the paths that a Dockerfile names.
//
// Patterns mean what they mean in BuildKit, and are matched by the same code
// (moby/patternmatcher). A path is there if it or a directory above it matches
// an include pattern (or there are none) and no exclude pattern, where later
// patterns that begin with "!" take back earlier ones. Directories that are
// themselves left out are there if something below them is not.
package filter

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
	"sync"

	"github.com/moby/patternmatcher"
	"github.com/opencontainers/go-digest"
	"github.com/tonistiigi/fsutil"

	"github.com/kiln-build/kiln/internal/tree"
)

// Filter returns the part of t that is left. followPaths are paths, perhaps
// with wildcards, that are included together with whatever the symbolic links
// in them lead to; they are looked up now, everything else is done lazily.
// A directory is read only if something in it can be left.
//
// If a pattern cannot be parsed, or the links cannot be read, every method of
// the tree returns that error.
func Filter(t tree.Tree, include, exclude, followPaths []string) tree.Tree {
	f := &filtered{under: t, dirs: map[string]verdict{}, below: map[string]bool{}}
	if followPaths != nil {
		targets, err := fsutil.FollowLinks(linkFS{t}, followPaths)
		if err != nil {
			return failed{fmt.Errorf("follow links in the context: %w", err)}
		}
		if targets != nil {
			include = append(append([]string(nil), include...), targets...)
			include = dedupe(include)
		}
	}
	var err error
	if f.include, err = newMatcher(include, false); err != nil {
		return failed{fmt.Errorf("parse include patterns %q: %w", include, err)}
	}
	if f.exclude, err = newMatcher(exclude, true); err != nil {
		return failed{fmt.Errorf("parse exclude patterns %q: %w", exclude, err)}
	}
	if f.include == nil && f.exclude == nil {
		return t
	}
	return f
}

// dedupe drops paths below others, as fsutil does with include patterns before
// it uses them. The root among them means that there is nothing to filter.
func dedupe(in []string) []string {
	out := make([]string, 0, len(in))
	last := ""
	for _, s := range in {
		if s == "." {
			return nil
		}
		if strings.HasPrefix(s, last+"/") {
			continue
		}
		out = append(out, s)
		last = s
	}
	return out
}

// filtered is a tree less what patterns take from it.
type filtered struct {
	under            tree.Tree
	include, exclude *matcher // nil: no patterns

	mu    sync.Mutex // a PatternMatcher is not for concurrent use
	dirs  map[string]verdict
	below map[string]bool
}

// verdict is what patterns say of one path.
type verdict struct {
	in, ex patternmatcher.MatchInfo // for directories: what those below need
	out    bool                     // the path itself is left out
	pruned bool                     // and so is everything below it
}

// Lstat implements tree.Tree.
func (f *filtered) Lstat(p string) (tree.Node, error) {
	parent, err := f.dir(path.Dir(p))
	if err != nil {
		return tree.Node{}, err
	}
	if p == "." {
		return f.under.Lstat(p)
	}
	if parent.pruned {
		return tree.Node{}, notExist("lstat", p)
	}
	n, err := f.under.Lstat(p)
	if err != nil {
		return tree.Node{}, err
	}
	ok, err := f.visible(parent, p, n)
	if err == nil && !ok {
		err = notExist("lstat", p)
	}
	if err != nil {
		return tree.Node{}, err
	}
	return n, nil
}

// ReadDir implements tree.Tree.
func (f *filtered) ReadDir(p string) ([]tree.Entry, error) {
	if p != "." {
		if _, err := f.Lstat(p); err != nil {
			return nil, err
		}
	}
	d, err := f.dir(p)
	if err != nil {
		return nil, err
	}
	if d.pruned {
		return nil, notExist("read directory", p)
	}
	es, err := f.under.ReadDir(p)
	if err != nil {
		if d.out && errors.Is(err, fs.ErrPermission) {
			return nil, nil // nothing that we may read is wanted of it
		}
		return nil, err
	}
	left := es[:0:0]
	for _, e := range es {
		ok, err := f.visible(d, path.Join(p, e.Name), e.Node)
		if err != nil {
			return nil, err
		}
		if ok {
			left = append(left, e)
		}
	}
	return left, nil
}

// Readlink implements tree.Tree.
func (f *filtered) Readlink(p string) (string, error) {
	if err := f.keeps("read link", p); err != nil {
		return "", err
	}
	return f.under.Readlink(p)
}

// Open implements tree.Tree.
func (f *filtered) Open(p string) (io.ReadCloser, error) {
	if err := f.keeps("open", p); err != nil {
		return nil, err
	}
	return f.under.Open(p)
}

// ContentDigest implements tree.Digester as far as the tree below does.
func (f *filtered) ContentDigest(p string) (digest.Digest, error) {
	if err := f.keeps("digest of", p); err != nil {
		return "", err
	}
	return tree.ContentDigest(f.under, p)
}

// keeps is an error if a path is left out, were it a file. It saves looking at
// the path, which what is done with it next does anyway.
func (f *filtered) keeps(what, p string) error {
	parent, err := f.dir(path.Dir(p))
	if err != nil {
		return err
	}
	v := parent
	if !parent.pruned && p != "." {
		if v, err = f.judge(parent, p, false); err != nil {
			return err
		}
	}
	if v.out {
		return notExist(what, p)
	}
	return nil
}

// visible reports whether an existing path, in a directory that is not pruned,
// is left: as itself, or as the parent of something that is.
func (f *filtered) visible(parent verdict, p string, n tree.Node) (bool, error) {
	v, err := f.judge(parent, p, n.IsDir())
	if err != nil || v.pruned {
		return false, err
	}
	if !v.out {
		return true, nil
	}
	if !n.IsDir() {
		return false, nil
	}
	return f.hasVisible(v, p)
}

// hasVisible reports whether anything below a directory is left. It stops at
// the first that is.
func (f *filtered) hasVisible(d verdict, p string) (bool, error) {
	f.mu.Lock()
	known, ok := f.below[p]
	f.mu.Unlock()
	if ok {
		return known, nil
	}
	es, err := f.under.ReadDir(p)
	if err != nil && !errors.Is(err, fs.ErrPermission) && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	found := false
	for _, e := range es {
		if found, err = f.visible(d, path.Join(p, e.Name), e.Node); err != nil {
			return false, err
		}
		if found {
			break
		}
	}
	f.mu.Lock()
	f.below[p] = found
	f.mu.Unlock()
	return found, nil
}

// dir is the verdict on a path that is taken to be a directory.
func (f *filtered) dir(p string) (verdict, error) {
	if p == "." {
		return verdict{}, nil
	}
	f.mu.Lock()
	v, ok := f.dirs[p]
	f.mu.Unlock()
	if ok {
		return v, nil
	}
	parent, err := f.dir(path.Dir(p))
	if err != nil || parent.pruned {
		return verdict{out: true, pruned: parent.pruned}, err
	}
	return f.judge(parent, p, true)
}

// judge matches a path, given the verdict on its parent.
func (f *filtered) judge(parent verdict, p string, isDir bool) (verdict, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if v, ok := f.dirs[p]; ok && isDir {
		return v, nil
	}
	var v verdict
	if f.include != nil {
		m, info, err := f.include.MatchesUsingParentResults(p, parent.in)
		if err != nil {
			return v, fmt.Errorf("match include patterns with %q: %w", p, err)
		}
		v.in, v.out = info, !m
		v.pruned = !m && isDir && f.include.prunable(p)
	}
	if f.exclude != nil && !v.pruned {
		m, info, err := f.exclude.MatchesUsingParentResults(p, parent.ex)
		if err != nil {
			return v, fmt.Errorf("match exclude patterns with %q: %w", p, err)
		}
		v.ex, v.out = info, v.out || m
		v.pruned = m && isDir && f.exclude.prunable(p)
	}
	if isDir {
		f.dirs[p] = v
	}
	return v, nil
}

func notExist(what, p string) error {
	return fmt.Errorf("%s %q: left out by patterns: %w", what, p, fs.ErrNotExist)
}

// failed is a tree that cannot be had.
type failed struct{ err error }

func (t failed) Lstat(string) (tree.Node, error)      { return tree.Node{}, t.err }
func (t failed) ReadDir(string) ([]tree.Entry, error) { return nil, t.err }
func (t failed) Readlink(string) (string, error)      { return "", t.err }
func (t failed) Open(string) (io.ReadCloser, error)   { return nil, t.err }
