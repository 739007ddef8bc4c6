package export

import (
	"reflect"
	"testing"

	"github.com/kiln-build/kiln/internal/diag"
)

func TestParseSpec(t *testing.T) {
	for in, want := range map[string]Spec{
		"out":                          {Type: Local, Dest: "out"},
		"/a b/c":                       {Type: Local, Dest: "/a b/c"},
		"-":                            {Type: Tar, Dest: "-"},
		"type=local,dest=out":          {Type: Local, Dest: "out"},
		"type=tar,dest=-":              {Type: Tar, Dest: "-"},
		"Type=image":                   {Type: Image},
		"type=image,push=true":         {Type: Image, Push: true},
		"type=image,push=1":            {Type: Image, Push: true},
		"type=image,push=false":        {Type: Image},
		"type=image,name=a,name=b":     {Type: Image, Names: []string{"a", "b"}},
		`type=registry,"name=a:1,b:2"`: {Type: Registry, Names: []string{"a:1", "b:2"}},
		"type=oci,dest=x.tar":          {Type: OCI, Dest: "x.tar"},
		"type=oci,dest=x,tar=false":    {Type: OCI, Dest: "x", Dir: true},
		"type=oci,dest=x,tar=true":     {Type: OCI, Dest: "x"},
		`type=oci,"dest=a,b.tar"`:      {Type: OCI, Dest: "a,b.tar"},
		"type=oci,dest=-":              {Type: OCI, Dest: "-"},
		"type=docker":                  {Type: Docker},
		"type=docker,dest=x":           {Type: Docker, Dest: "x"},
		"dest=a=b,type=tar":            {Type: Tar, Dest: "a=b"},
		`"type=tar","dest=say ""hi"""`: {Type: Tar, Dest: `say "hi"`},
		"type=registry, name=localhost:5000/a:1 ": {Type: Registry, Names: []string{"localhost:5000/a:1"}},
	} {
		got, err := ParseSpec(in)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v (%v), want %+v", in, got, err, want)
			continue
		}
		if again, err := ParseSpec(got.String()); err != nil || !reflect.DeepEqual(again, got) {
			t.Errorf("%q is printed as %q, which is %+v (%v)", in, got, again, err)
		}
	}
	for _, in := range []string{
		"", "\n", "type=tar,dest=a\ntype=tar,dest=b", "a,b", "type=", "type=zip,dest=x", "dest=x", "type=image,dest=x", "type=tar", "type=local",
		"type=oci", "type=local,dest=-", "type=oci,dest=-,tar=false", "type=tar,dest=x,push=true", "type=image,push=maybe", "type=oci,dest=x,tar=no",
		"type=image,compression=zstd", "type=image,type=oci", "type=tar,dest=a,dest=b", "type=docker,dest=x,tar=false", `type="tar`, "=x", "type=image,push=",
	} {
		if got, err := ParseSpec(in); err == nil || diag.ExitCode(err) != diag.ExitUsage {
			t.Errorf("%q: %+v, %v", in, got, err)
		}
	}
}

func TestSpecGoesTo(t *testing.T) {
	for in, want := range map[string][3]bool{ // registry, store, needs an image
		"type=image": {false, true, true}, "type=image,push=true": {true, true, true}, "type=registry": {true, false, true},
		"type=docker": {false, true, true}, "type=docker,dest=x": {false, false, true}, "type=oci,dest=x": {false, false, true},
		"type=tar,dest=x": {false, false, false}, "out": {false, false, false},
	} {
		s, err := ParseSpec(in)
		if got := [3]bool{s.ToRegistry(), s.ToStore(), s.NeedsImage()}; err != nil || got != want {
			t.Errorf("%q: %v (%v), want %v", in, got, err, want)
		}
	}
}

func FuzzParseSpec(f *testing.F) {
	for _, s := range []string{"out", "-", "type=image,name=a,push=true", `type=oci,"dest=a,b"`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		s, err := ParseSpec(in)
		if err != nil {
			return
		}
		if again, err := ParseSpec(s.String()); err != nil || !reflect.DeepEqual(again, s) {
			t.Errorf("%q is printed as %q, which is %+v (%v)", in, s, again, err)
		}
	})
}
