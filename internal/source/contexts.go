package source

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/kiln-build/kiln/internal/source/filter"
	"github.com/kiln-build/kiln/internal/tree"
)

// Selection says what of a local build context is wanted.
type Selection struct {
	Name string
	// Session is whose context it is, where contexts of several clients can be had.
	Session          string
	Include, Exclude []string // patterns of an ignore file
	// Follow are the paths, perhaps with wildcards, that alone are used: those who
	// have to fetch a context need to fetch no more. Nil: all of it.
	Follow []string
	// Progress is told how many bytes have come of a context that has to be fetched; nil: nobody wants to know.
	Progress func(bytes int64) `json:"-"`
	// SharedKey is equal for contexts that are likely to have much in common; may be empty.
	SharedKey string
}

// LocalSelection is what an LLB source operation local://NAME with these attributes selects.
func LocalSelection(name string, attrs map[string]string) (Selection, error) {
	s := Selection{Name: name, Session: attrs["local.session"], SharedKey: attrs["local.sharedkeyhint"]}
	for attr, to := range map[string]*[]string{
		"local.includepattern": &s.Include, "local.excludepatterns": &s.Exclude, "local.followpaths": &s.Follow,
	} {
		if v := attrs[attr]; v != "" {
			if err := json.Unmarshal([]byte(v), to); err != nil {
				return s, fmt.Errorf("build context %q: %s: %w", name, attr, err)
			}
		}
	}
	return s, nil
}

// Contexts opens the local contexts of a build.
type Contexts interface {
	// OpenContext returns what s selects, and at most what s.Follow leaves out besides.
	// The tree is good until the build ends.
	OpenContext(ctx context.Context, s Selection) (tree.Tree, error)
}

// Trees are contexts that can be read without being fetched, by name.
type Trees map[string]tree.Tree

// OpenContext implements Contexts.
func (ts Trees) OpenContext(_ context.Context, s Selection) (tree.Tree, error) {
	t, ok := ts[s.Name]
	if !ok {
		return nil, fmt.Errorf("there is no build context %q", s.Name)
	}
	if len(s.Include) > 0 || len(s.Exclude) > 0 {
		t = filter.Filter(t, s.Include, s.Exclude, nil)
	}
	return t, nil
}
