// Package traps holds one test: that docs/kaniko-traps.md names tests that exist.
package traps

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/test/testenv"
)

// switches are those of kaniko's fork (v1.28) that stand for a bug or behaviour which users met.
const switches = `COPY_AS_ROOT COPY_CHMOD_ON_IMPLICIT_DIRS CHOWN_ON_IMPLICIT_DIRS RUN_HONOR_GROUP EXPAND_HEREDOC UNTAR_SKIP_ROOT
BUILDKIT_ARG_ENV_PRECEDENCE VOLUME_SKIP_MKDIR NO_PROPAGATE_ANNOTATIONS OCI_SCRATCH_BASE PRESERVE_HARDLINKS RELATIVE_LINK_TARGETS
SKIP_WRITE_WHITEOUTS SECUREJOIN_EXTRACTION PRESERVE_MOUNTED_PATHS REPRODUCIBLE_PRESERVE_BASE_LAYERS ROLLING_CACHE_KEY HASH_DIR_FRAMING
RESOLVE_CACHE_KEY INFER_CROSS_STAGE_CACHE_KEY CACHE_LOOKAHEAD SKIP_CACHED_STAGES CACHE_PROBE_AFTER_MISS SCOPED_DOCKERIGNORE
PRECOMPILE_DOCKERIGNORE SHARED_BASE_CACHE CROSS_REPO_MOUNT SKIP_RELABEL_RECOMPRESS OCI_WARMER WARMER_CACHE_LOCK IGNORE_CACHED_MANIFEST
RUN_VIA_TINI RUN_MOUNT_BIND CLEAN_KANIKO_DIR DEPRECATE_INTER_STAGE_RESTORE DISABLE_HTTP2 PATH_SCOPED_REGISTRY_AUTH`

// rows are the tests of the document's table, by switch.
func rows(t *testing.T, root string) map[string][]string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, "docs", "kaniko-traps.md"))
	if err != nil {
		t.Fatal(err)
	}
	all := map[string][]string{}
	for line := range strings.Lines(string(b)) {
		cells := strings.Split(strings.TrimSpace(line), "|")
		m := regexp.MustCompile("^ `([A-Z0-9_]+)` $").FindStringSubmatch(strings.Join(cells[min(1, len(cells)):min(2, len(cells))], ""))
		if m == nil {
			continue
		}
		if all[m[1]] != nil || len(cells) != 5 {
			t.Errorf("%s is there twice, or its row has not three cells", m[1])
		}
		all[m[1]] = strings.Fields(cells[3])
	}
	return all
}

func TestTableNamesTests(t *testing.T) {
	root, err := testenv.Root()
	if err != nil {
		t.Fatal(err)
	}
	all := rows(t, root)
	for _, s := range strings.Fields(switches) {
		if len(all[s]) == 0 {
			t.Errorf("%s has no test", s)
		}
	}
	for s, tests := range all {
		if !strings.Contains(" "+strings.ReplaceAll(switches, "\n", " ")+" ", " "+s+" ") {
			t.Errorf("%s is no switch of kaniko's", s)
		}
		for _, name := range tests {
			if !exists(t, root, name) {
				t.Errorf("%s: there is no %s", s, name)
			}
		}
	}
}

// exists reports whether there is a test: case:NAME, or DIRECTORY.TestName.
func exists(t *testing.T, root, name string) bool {
	t.Helper()
	if c, ok := strings.CutPrefix(name, "case:"); ok {
		_, err := os.Stat(filepath.Join(root, "test", "conformance", "cases", c+".txtar"))
		return err == nil
	}
	dir, test, ok := strings.Cut(name, ".Test")
	if !ok {
		return false
	}
	files, err := filepath.Glob(filepath.Join(root, filepath.FromSlash(dir), "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), "\nfunc Test"+test+"(t *testing.T) {") {
			return true
		}
	}
	return false
}

// TestMissingIsFound: or the test above could not fail.
func TestMissingIsFound(t *testing.T) {
	root, err := testenv.Root()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"case:nosuch", "test/e2e.TestNoSuch", "test/traps.TestTableNames", "nowhere.TestX", "plain", ""} {
		if exists(t, root, name) {
			t.Errorf("%q is said to exist", name)
		}
	}
	if !exists(t, root, "test/traps.TestMissingIsFound") {
		t.Error("this test is said not to exist")
	}
}
