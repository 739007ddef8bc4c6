package export

import (
	"slices"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/tree/memtree"
)

// TestSplitPlatforms: whatever a client calls its platforms, each has one directory, in the tree.
func TestSplitPlatforms(t *testing.T) {
	var ts []PlatformTree
	for _, id := range []string{"linux/arm64", "", "../out", "..", ".", `a\b:c`} {
		ts = append(ts, PlatformTree{ID: id, Platform: ocispec.Platform{OS: "linux", Architecture: "arm", Variant: "v7"}, Tree: memtree.New(nil)})
	}
	all := SplitPlatforms(ts, time.Unix(0, 0))
	entries, err := all.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name)
	}
	want := []string{".._out", "_", "__", "a_b_c", "linux_arm64", "linux_arm_v7"}
	if slices.Sort(got); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
