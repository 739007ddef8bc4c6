package filter

import (
	"strings"
	"testing"

	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"

	"github.com/kiln-build/kiln/internal/tree"
	"github.com/kiln-build/kiln/internal/tree/memtree"
)

// FuzzDockerignore: whatever an ignore file says, filtering ends without a
// panic, and a file is there if and only if docker's matcher does not ignore it.
func FuzzDockerignore(f *testing.F) {
	for _, s := range []string{
		"*", "**", "*\n!a", "!a\n*", "a/", "/a", "./a", "a/../b", "**/f", "!**/f", "[a-", "\\", "a/**/f\n!a/b", "# a\n \n\ufeffa", ".", "..", "!", "a\x00", "*/*",
	} {
		f.Add(s)
	}
	files := []string{"a/b/f", "a/f", "b", "c/d/e/f", "c/d/g", "node_modules/x/y", ".git/HEAD", "f"}
	all := map[string]memtree.File{}
	for _, p := range files {
		all[p] = memtree.File{Data: p}
	}
	base := memtree.New(all)
	f.Fuzz(func(t *testing.T, text string) {
		patterns, err := ignorefile.ReadAll(strings.NewReader(text))
		if err != nil || len(patterns) == 0 {
			return
		}
		matcher, err := patternmatcher.New(patterns)
		if err != nil {
			return
		}
		ft := Filter(base, nil, patterns, nil)
		seen := map[string]bool{}
		if err := tree.Walk(ft, ".", func(p string, n tree.Node) error {
			seen[p] = n.IsRegular()
			return nil
		}); err != nil {
			return // a pattern that only fails when it is used
		}
		for _, p := range files {
			ignored, err := ignores(matcher, p)
			if err != nil {
				return
			}
			if seen[p] == ignored {
				t.Errorf("%q: %s: there %v, ignored %v", patterns, p, seen[p], ignored)
			}
		}
	})
}

// ignores asks as BuildKit's transfer of a context does: from the root
// downwards, with what was found for the directory above. (Asking for a path alone can
// give another answer: "a/**/f" with "!a/b".)
func ignores(m *patternmatcher.PatternMatcher, p string) (ignored bool, err error) {
	var info patternmatcher.MatchInfo
	for i := 0; i <= len(p); i++ {
		if i < len(p) && p[i] != '/' {
			continue
		}
		if ignored, info, err = m.MatchesUsingParentResults(p[:i], info); err != nil {
			return false, err
		}
	}
	return ignored, nil
}
