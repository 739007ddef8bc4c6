package frontend

import (
	"bytes"
	"strings"
	"testing"

	"github.com/moby/buildkit/client/llb"
)

func TestReadDefinition(t *testing.T) {
	def, err := llb.Image("x").Run(llb.Shlex("true")).Root().Marshal(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := llb.WriteTo(def, &b); err != nil {
		t.Fatal(err)
	}
	for _, anew := range []bool{false, true} {
		got, err := ReadDefinition(bytes.NewReader(b.Bytes()), anew)
		if err != nil || len(got.Def) != len(def.Def) {
			t.Fatalf("%v, %v", got, err)
		}
		marked := 0
		for _, m := range got.Metadata {
			if m.IgnoreCache {
				marked++
			}
		}
		if want := map[bool]int{true: len(def.Def)}[anew]; marked != want {
			t.Errorf("%d steps are run anew, want %d", marked, want)
		}
	}
	for _, bad := range []string{"", "{}", "\x0a\xff\xff\xff\xff\x0f", strings.Repeat("x", maxDefinition+1)} {
		if _, err := ReadDefinition(strings.NewReader(bad), true); err == nil {
			t.Errorf("%d bytes are a definition", len(bad))
		}
	}
}
