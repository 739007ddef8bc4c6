package conformance

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/kiln-build/kiln/test/compare"
	"github.com/kiln-build/kiln/test/refbuild"
)

// tally counts how the cases ended that agreed with BuildKit.
type tally struct {
	images   atomic.Int32 // the same from all three
	refusals atomic.Int32 // all three fail
	known    atomic.Int32 // buildah differs, and the case says why
}

func (y *tally) String() string {
	return fmt.Sprintf("Kiln, BuildKit and buildah agree on %d images and refuse %d builds alike; buildah is known to differ in %d",
		y.images.Load(), y.refusals.Load(), y.known.Load())
}

// secondOpinion compares Kiln's image, nil if the build failed as it should,
// with buildah's. A case that is said to differ must differ, or the reason is out of date.
func (b *bed) secondOpinion(t *testing.T, c *Case, got v1.Image) {
	t.Helper()
	if b.buildah == nil || t.Failed() {
		return
	}
	a, err := b.buildah.kept(c)
	if err != nil || a == nil {
		t.Fatalf("no answer of buildah: %v", err)
	}
	differs, err := b.disagree(c, a, got)
	if err != nil {
		t.Fatal(err)
	}
	switch {
	case differs == "" && c.Buildah != "":
		t.Errorf("buildah agrees, though the case's header says that it does not: %s", c.Buildah)
	case differs == "" && got == nil:
		b.tally.refusals.Add(1)
	case differs == "":
		b.tally.images.Add(1)
	case c.Buildah != "":
		b.tally.known.Add(1)
	default:
		t.Errorf("buildah disagrees:%s", differs)
	}
}

// disagree says in what buildah's answer is not Kiln's, and what BuildKit's is
// there: where the two agree with each other, Kiln is wrong.
func (b *bed) disagree(c *Case, a *refbuild.Answer, got v1.Image) (string, error) {
	switch {
	case got == nil && a.Image == nil:
		return "", nil
	case got == nil:
		return "\n  it builds what is meant to fail", nil
	case a.Image == nil:
		return "\n  it cannot build it:\n" + a.Log, nil
	}
	r, err := compare.Images(a.Image, got, c.meaning())
	if err != nil || r.Equal() {
		return "", err
	}
	kit, err := b.buildkit.kept(c)
	if err != nil || kit == nil {
		return "", fmt.Errorf("no answer of BuildKit: %w", err)
	}
	r2, err := compare.Images(kit.Image, got, c.meaning())
	if err != nil {
		return "", err
	}
	theirs := map[string]string{}
	for _, d := range r2.Diffs {
		theirs[d.Where] = d.A
	}
	var out strings.Builder
	for _, d := range r.Diffs {
		kit, ok := theirs[d.Where]
		if !ok {
			kit = d.B
		}
		fmt.Fprintf(&out, "\n  %s: buildah %s, Kiln %s, BuildKit %s", d.Where, d.A, d.B, kit)
	}
	return out.String(), nil
}
