package filter

import (
	"strings"

	"github.com/moby/patternmatcher"
)

// matcher is a PatternMatcher that also knows which directories need not be
// read. It prunes exactly the directories that fsutil's filter prunes, for the
// results depend on it where patterns contradict each other.
type matcher struct {
	*patternmatcher.PatternMatcher
	exclude bool
	// prefixes are the patterns that could let something below a directory in,
	// each with a slash at its end; nil if one of them has wildcards.
	prefixes []string
	wild     bool
}

func newMatcher(patterns []string, exclude bool) (*matcher, error) {
	if len(patterns) == 0 {
		return nil, nil
	}
	pm, err := patternmatcher.New(patterns)
	if err != nil {
		return nil, err
	}
	m := &matcher{PatternMatcher: pm, exclude: exclude}
	for _, p := range pm.Patterns() {
		// What lets something in: an include pattern, an exception to an exclude pattern.
		if p.Exclusion() != exclude {
			continue
		}
		s := strings.TrimSuffix(strings.TrimSuffix(p.String(), "/**"), "/*")
		m.wild = m.wild || strings.ContainsAny(s, `*[]?^\`)
		m.prefixes = append(m.prefixes, s+"/")
	}
	return m, nil
}

// prunable reports whether nothing below a directory can be let in, given that
// the directory itself is not.
func (m *matcher) prunable(dir string) bool {
	if m.wild {
		return false
	}
	for _, p := range m.prefixes {
		if strings.HasPrefix(p, dir+"/") {
			return false
		}
	}
	return true
}
