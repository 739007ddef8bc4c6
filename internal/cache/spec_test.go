package cache_test

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/layer"
)

func TestParseFrom(t *testing.T) {
	reg := func(ref string) cache.Spec { return cache.Spec{Type: cache.Registry, Ref: ref} }
	d := "sha256:" + strings.Repeat("a", 64)
	for in, want := range map[string][]cache.Spec{
		"user/app:cache":                              {reg("user/app:cache")},
		"a,b:1":                                       {reg("a"), reg("b:1")},
		"type=registry,ref=r.example/a:b":             {reg("r.example/a:b")},
		"Type=registry, ref=r.example/a":              {reg("r.example/a")},
		"ref=a,type=registry":                         {reg("a")},
		"type=registry,ref=a,registry.insecure=true":  {{Type: cache.Registry, Ref: "a", Insecure: true}},
		"type=registry,ref=a,registry.insecure=false": {reg("a")},
		"type=local,src=/some/dir":                    {{Type: cache.Directory, Dir: "/some/dir", Tag: "latest"}},
		`type=local,"src=a,b",tag=x`:                  {{Type: cache.Directory, Dir: "a,b", Tag: "x"}},
		"type=local,src=d,digest=" + d:                {{Type: cache.Directory, Dir: "d", Tag: "latest", Digest: "sha256:" + "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}},
	} {
		if got, err := cache.ParseFrom(in); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v (%v), want %+v", in, got, err, want)
		}
	}
	for in, says := range map[string]string{
		"": "one line", "a\nb": "one line", "type=registry": "needs ref", "type=local": "needs src", "type=local,dest=x": "needs src",
		"type=gha": "caches of type=gha are not supported", "type=s3,region=x,bucket=y": "type=s3 are not supported", "type=azblob": "type=azblob",
		"type=inline": "type=registry,ref=IMAGE", "type=zip": "not known", "ref=a": "not known", "type=registry,ref=a,dest=x": `no option "dest"`,
		"type=registry,ref=a,registry.insecure=maybe": "registry.insecure is true or false", "type=local,src=x,digest=y": "is a digest",
		"type=registry,ref=a,ref=b": "twice", "type=registry,ref": "not KEY=VALUE", `type="x`: "cache to read",
	} {
		if got, err := cache.ParseFrom(in); err == nil || diag.ExitCode(err) != diag.ExitUsage || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %+v, %v; want %q", in, got, err, says)
		}
	}
}

func TestParseTo(t *testing.T) {
	spec := func(change func(*cache.Spec)) cache.Spec {
		s := cache.Spec{Type: cache.Registry, Ref: "a", Mode: cache.Min, Bounds: cache.DefaultBounds()}
		change(&s)
		return s
	}
	for in, want := range map[string]cache.Spec{
		"a":                            spec(func(*cache.Spec) {}),
		"type=registry,ref=a,mode=max": spec(func(s *cache.Spec) { s.Mode = cache.Max }),
		"type=registry,ref=a,mode=min": spec(func(*cache.Spec) {}),
		"type=registry,ref=a,image-manifest=true,oci-mediatypes=true,ignore-error=true": spec(func(s *cache.Spec) { s.IgnoreError = true }),
		"type=registry,ref=a,compression=zstd,compression-level=19,force-compression=true": spec(func(s *cache.Spec) {
			s.Compression, s.Level, s.Force = layer.Zstd, 19, true
		}),
		"type=registry,ref=a,compression=uncompressed": spec(func(s *cache.Spec) { s.Compression = layer.Uncompressed }),
		"type=registry,ref=a,compression-level=0":      spec(func(s *cache.Spec) { s.Level = layer.LeastLevel }),
		"type=registry,ref=a,image-manifest=false":     spec(func(s *cache.Spec) { s.Index = true }),
		"type=registry,ref=a,oci-mediatypes=0":         spec(func(s *cache.Spec) { s.Index, s.DockerTypes = true, true }),
		"type=registry,ref=a,max-records=7,max-size=3GB,ttl=48h": spec(func(s *cache.Spec) {
			s.Bounds = cache.Bounds{MaxRecords: 7, MaxSize: 3e9, TTL: 48 * time.Hour}
		}),
		"type=local,dest=d": spec(func(s *cache.Spec) { s.Type, s.Ref, s.Dir, s.Tag = cache.Directory, "", "d", "latest" }),
		"type=inline":       spec(func(s *cache.Spec) { s.Type, s.Ref = cache.Inline, "" }),
	} {
		if got, err := cache.ParseTo(in); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v (%v), want %+v", in, got, err, want)
		}
	}
	for in, says := range map[string]string{
		"": "one line", "a,b": "it is one cache", "type=registry": "needs ref", "type=local,src=x": "needs dest", "type=inline,mode=max": "mode=min alone",
		"type=inline,ref=x": "no option", "type=gha,scope=x": "type=gha", "type=registry,ref=a,mode=all": "min or max",
		"type=registry,ref=a,compression=estargz": "estargz is not supported", "type=registry,ref=a,compression=uncompressed,compression-level=1": "up to 0",
		"type=registry,ref=a,compression=lz4": "gzip, zstd or", "type=registry,ref=a,compression-level=12": "up to 9",
		"type=registry,ref=a,image-manifest=true,oci-mediatypes=0": "contradict", "type=registry,ref=a,image-manifest=no": "true or false",
		"type=registry,ref=a,ignore-error=maybe": "true or false", "type=registry,ref=a,max-records=0": "from 1 to", "type=registry,ref=a,max-records=99999": "from 1 to",
		"type=registry,ref=a,max-size=big": "such as 20GB", "type=registry,ref=a,ttl=never": "such as 720h", "type=registry,ref=a,touch=1": "no option",
	} {
		if got, err := cache.ParseTo(in); err == nil || diag.ExitCode(err) != diag.ExitUsage || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %+v, %v; want %q", in, got, err, says)
		}
	}
}

// TestNoPasswords: what is refused is named, and its values are not repeated.
func TestNoPasswords(t *testing.T) {
	for _, in := range []string{
		"type=s3,region=x,secret_access_key=hunter2", "type=registry,ref=a,password=hunter2", `type=s3,secret_access_key="hunter2`,
		"type=s3,secret_access_key=hunter2,secret_access_key=hunter2", "type=azblob,hunter2",
	} {
		_, from := cache.ParseFrom(in)
		_, to := cache.ParseTo(in)
		for _, err := range []error{from, to} {
			if err == nil || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%q: %v", in, err)
			}
		}
	}
}
