package refbuild

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/test/testenv"
)

// TestVersions: the programs are kept by names with these versions, and built of those that are pinned.
func TestVersions(t *testing.T) {
	root, err := testenv.Root()
	if err != nil {
		t.Fatal(err)
	}
	for file, pin := range map[string]string{
		"oracle": "github.com/moby/buildkit " + Version, "buildx": "github.com/docker/buildx " + BuildxVersion,
	} {
		b, err := os.ReadFile(filepath.Join(root, "test", file, "go.mod"))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(b), pin+" ") && !strings.Contains(string(b), pin+"\n") {
			t.Errorf("test/%s/go.mod does not pin %s", file, pin)
		}
	}
}
