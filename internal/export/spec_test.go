package export

import (
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/layer"
)

func TestParseSpec(t *testing.T) {
	yes, no, epoch := true, false, time.Unix(7, 0).UTC()
	for in, want := range map[string]Spec{
		"out":                 {Type: Local, Dest: "out"},
		"/a b/c":              {Type: Local, Dest: "/a b/c"},
		"-":                   {Type: Tar, Dest: "-"},
		"type=local,dest=out": {Type: Local, Dest: "out"},
		"type=local,dest=out,mode=copy,platform-split=1,attestation-prefix=x": {Type: Local, Dest: "out", Split: &yes},
		"type=tar,dest=-":                          {Type: Tar, Dest: "-"},
		"type=tar,dest=x,platform-split=false":     {Type: Tar, Dest: "x", Split: &no},
		"type=tar,dest=x,source-date-epoch=7":      {Type: Tar, Dest: "x", Epoch: Epoch{Own: true, Time: &epoch}},
		"type=tar,dest=x,source-date-epoch=":       {Type: Tar, Dest: "x", Epoch: Epoch{Own: true}},
		"type=cacheonly":                           {Type: CacheOnly},
		"Type=image":                               {Type: Image},
		"type=image,push=true":                     {Type: Image, Push: true},
		"type=image,push=1":                        {Type: Image, Push: true},
		"type=image,push=false":                    {Type: Image},
		"type=image,name=a,name=b":                 {Type: Image, Names: []string{"a", "b"}},
		"type=image,unpack=true,oci-artifact=true": {Type: Image},
		"type=image,store=false,push=1,push-by-digest=1,name-canonical=1,registry.insecure=1": {
			Type: Image, Push: true, NoStore: true, ByDigest: true, NameCanonical: true, Insecure: true,
		},
		"type=image,dangling-name-prefix=d,danging-name-empty-only=1": {Type: Image, Dangling: "d", DanglingEmptyOnly: true},
		"type=image,compression=zstd,compression-level=22,force-compression=true": {
			Type: Image, ImageOptions: ImageOptions{Compression: layer.Zstd, Level: 22, Force: true},
		},
		"type=image,compression=zstd,oci-mediatypes=false": {Type: Image, ImageOptions: ImageOptions{Compression: layer.Zstd, DockerTypes: true}},
		"type=image,compression-level=0":                   {Type: Image, ImageOptions: ImageOptions{Level: layer.LeastLevel}},
		"type=oci,dest=x,oci-mediatypes=false,rewrite-timestamp=false,compression=uncompressed": {
			Type: OCI, Dest: "x", ImageOptions: ImageOptions{Compression: layer.Uncompressed, DockerTypes: true, KeepTimes: true},
		},
		"type=image,annotation.A.b=c=d,annotation-index.i=1,annotation-manifest[linux/arm64].m=2": {Type: Image, ImageOptions: ImageOptions{
			Annotations: Annotations{{ToIndex, "", "i", "1"}, {ToManifest, "linux/arm64", "m", "2"}, {ToManifest, "", "A.b", "c=d"}},
		}},
		`type=registry,"name=a:1,b:2"`:            {Type: Registry, Names: []string{"a:1", "b:2"}},
		"type=registry,push=true":                 {Type: Registry},
		"type=oci,dest=x.tar":                     {Type: OCI, Dest: "x.tar"},
		"type=oci,dest=x,tar=false":               {Type: OCI, Dest: "x", Dir: true},
		"type=docker,dest=x,tar=false":            {Type: Docker, Dest: "x", Dir: true},
		"type=oci,dest=x,tar=true":                {Type: OCI, Dest: "x"},
		`type=oci,"dest=a,b.tar"`:                 {Type: OCI, Dest: "a,b.tar"},
		"type=oci,dest=-":                         {Type: OCI, Dest: "-"},
		"type=docker":                             {Type: Docker},
		"type=docker,dest=x":                      {Type: Docker, Dest: "x"},
		"dest=a=b,type=tar":                       {Type: Tar, Dest: "a=b"},
		`"type=tar","dest=say ""hi"""`:            {Type: Tar, Dest: `say "hi"`},
		"type=registry, name=localhost:5000/a:1 ": {Type: Registry, Names: []string{"localhost:5000/a:1"}},
	} {
		got, err := ParseSpec(in)
		if err != nil || !reflect.DeepEqual(sorted(got), sorted(want)) {
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
		"type=image,type=oci", "type=tar,dest=a,dest=b", "type=docker,tar=false", "type=docker,dest=-,tar=false", `type="tar`, "=x", "type=image,push=",
		"type=registry,push=false", "type=cacheonly,dest=x", "type=local,dest=x,mode=delete", "type=docker,context=other", "type=image,Push=1,push=0",
		"type=image,compression=estargz", "type=image,compression-level=10", "type=image,compression-level=-1",
		"type=image,compression=uncompressed,compression-level=1", "type=image,prefer-nondist-layers=false", "type=image,push-by-digest=true",
		"type=image,annotation-other.a=b", "type=image,annotation.=b", "type=image,annotation-index[x/y/z/w].a=b", "type=image,annotation=b",
		"type=image,oci-mediatypes=false,annotation.a=b", "type=image,source-date-epoch=now", "type=tar,dest=x,mode=copy", "type=tar,dest=x,compression=gzip",
	} {
		if got, err := ParseSpec(in); err == nil || diag.ExitCode(err) != diag.ExitUsage {
			t.Errorf("%q: %+v, %v", in, got, err)
		}
	}
}

// sorted is a spec whose annotations have an order.
func sorted(s Spec) Spec {
	s.Annotations = slices.Clone(s.Annotations)
	slices.SortFunc(s.Annotations, func(a, b Annotation) int { return strings.Compare(a.Key, b.Key) })
	return s
}

func TestParseAnnotation(t *testing.T) {
	for in, want := range map[string]Annotations{
		"a=b":                          {{ToManifest, "", "a", "b"}},
		"a=b=c:d":                      {{ToManifest, "", "a", "b=c:d"}},
		"manifest:a.b/c=":              {{ToManifest, "", "a.b/c", ""}},
		"index:a=b":                    {{ToIndex, "", "a", "b"}},
		"manifest-descriptor:a=b":      {{ToManifestDescriptor, "", "a", "b"}},
		"index,manifest:a=b":           {{ToIndex, "", "a", "b"}, {ToManifest, "", "a", "b"}},
		"manifest[linux/arm64/v8]:a=b": {{ToManifest, "linux/arm64", "a", "b"}},
		"index-descriptor,index:k:l=m": {{ToIndexDescriptor, "", "k:l", "m"}, {ToIndex, "", "k:l", "m"}},
	} {
		if got, err := ParseAnnotation(in); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "a", "=b", "other:a=b", "manifest[]:a=b", "manifest[a/b/c/d/e]:a=b", "manifest:=b", "a b=c"} {
		if got, err := ParseAnnotation(in); err == nil || diag.ExitCode(err) != diag.ExitUsage {
			t.Errorf("%q: %+v, %v", in, got, err)
		}
	}
}

func TestSpecGoesTo(t *testing.T) {
	for in, want := range map[string][3]bool{ // registry, store, needs an image
		"type=image": {false, true, true}, "type=image,push=true": {true, true, true}, "type=registry": {true, false, true},
		"type=docker": {false, true, true}, "type=docker,dest=x": {false, false, true}, "type=oci,dest=x": {false, false, true},
		"type=tar,dest=x": {false, false, false}, "out": {false, false, false},
		"type=image,store=false": {false, false, true}, "type=image,store=0,push=1": {true, false, true}, "type=cacheonly": {false, false, false},
	} {
		s, err := ParseSpec(in)
		if got := [3]bool{s.ToRegistry(), s.ToStore(), s.NeedsImage()}; err != nil || got != want {
			t.Errorf("%q: %v (%v), want %v", in, got, err, want)
		}
	}
}

func FuzzParseSpec(f *testing.F) {
	for _, s := range []string{"out", "-", "type=image,name=a,push=true", `type=oci,"dest=a,b"`, "type=image,annotation-index.a=b,compression=zstd,source-date-epoch=1", "type=tar,dest=x,source-date-epoch="} {
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
