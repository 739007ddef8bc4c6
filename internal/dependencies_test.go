package layering

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/mod/modfile"
)

// TestDependenciesAreExplained: every direct dependency has its line, and no
// line speaks of what is gone.
func TestDependenciesAreExplained(t *testing.T) {
	mod, err := os.ReadFile("../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile("../docs/dependencies.md")
	if err != nil {
		t.Fatal(err)
	}
	f, err := modfile.Parse("go.mod", mod, nil)
	if err != nil {
		t.Fatal(err)
	}
	direct := map[string]bool{}
	for _, r := range f.Require {
		if !r.Indirect {
			direct[r.Mod.Path] = true
			if !strings.Contains(string(doc), r.Mod.Path) {
				t.Errorf("%s has no line in docs/dependencies.md", r.Mod.Path)
			}
		}
	}
	for line := range strings.Lines(string(doc)) {
		first, _, _ := strings.Cut(strings.TrimPrefix(line, "| "), " |")
		if !strings.HasPrefix(line, "| ") || !strings.Contains(first, "/") {
			continue
		}
		for _, m := range strings.Split(first, ", ") {
			if !direct[m] {
				t.Errorf("docs/dependencies.md speaks of %s, which is no direct dependency", m)
			}
		}
	}
}
