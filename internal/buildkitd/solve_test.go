package buildkitd

import (
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
)

func TestEpochOfArgs(t *testing.T) {
	const key, arg = "source-date-epoch", "build-arg:SOURCE_DATE_EPOCH"
	own := map[string]string{key: "7"}
	for v, want := range map[string][]string{"5": {"5", "7"}, "context": {"", "7"}, "": {"", "7"}} {
		req := &controlapi.SolveRequest{
			FrontendAttrs: map[string]string{arg: v}, Exporters: []*controlapi.Exporter{{Type: "tar"}, {Type: "oci", Attrs: own}},
		}
		epochOfArgs(req)
		for i, e := range req.Exporters {
			if e.Attrs[key] != want[i] {
				t.Errorf("%s=%q: exporter %s has %q, want %q", arg, v, e.Type, e.Attrs[key], want[i])
			}
		}
	}
}

// TestNoAttestations: what buildx asks for if nobody has said anything is nothing that was asked for.
func TestNoAttestations(t *testing.T) {
	for attr, want := range map[[2]string]bool{
		{"attest:provenance", "mode=min,inline-only=true"}: true,
		{"attest:provenance", "mode=max"}:                  false,
		{"attest:sbom", ""}:                                false,
		{"build-arg:BUILDKIT_ATTEST_SBOM", ""}:             false,
		{"build-arg:ATTEST", "x"}:                          true,
	} {
		if err := noAttestations(map[string]string{attr[0]: attr[1]}); (err == nil) != want {
			t.Errorf("%q: %v", attr, err)
		}
	}
}

func TestCachesOfArgs(t *testing.T) {
	got := cachesOfArgs(map[string]string{"cache-from": "a,localhost:5000/b:c"})
	if len(got) != 2 || got[0].Type != "registry" || got[1].Attrs["ref"] != "localhost:5000/b:c" {
		t.Errorf("got %v", got)
	}
	if got := cachesOfArgs(map[string]string{"cache-from": "a", "cache-imports": "[]"}); len(got) > 0 {
		t.Errorf("with cache-imports: %v", got)
	}
}
