package registry

import (
	"net/http"
	"net/url"
	"strings"
	"testing"
	"unicode/utf8"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func FuzzManifest(f *testing.F) {
	sum := "sha256:" + strings.Repeat("a", 64)
	for _, s := range []string{
		`{"schemaVersion":2,"config":{"digest":"` + sum + `","size":2},"layers":[{"digest":"` + sum + `","size":3}]}`,
		`{"schemaVersion":2,"manifests":[{"digest":"` + sum + `","size":3,"platform":{"os":"linux","architecture":"arm","variant":"v7"}}]}`,
		`{"schemaVersion":1,"fsLayers":[]}`, `{}`, `null`,
	} {
		for _, mt := range []string{"", ocispec.MediaTypeImageIndex, dockerManifest, "text/html; charset=x"} {
			f.Add([]byte(s), mt, []byte(`{"os":"linux","rootfs":{"diff_ids":["`+sum+`"]}}`))
		}
	}
	f.Fuzz(func(t *testing.T, raw []byte, contentType string, config []byte) {
		d, mt, err := parseDocument(raw, contentType)
		if err != nil {
			return
		}
		if isIndex(mt) == isManifest(mt) {
			t.Errorf("type %q", mt)
		}
		for _, p := range []ocispec.Platform{{OS: "linux", Architecture: "amd64"}, {OS: "linux", Architecture: "arm", Variant: "v7"}, {}} {
			if got := choose(d.Manifests, p); len(got) > len(d.Manifests) {
				t.Errorf("chose %d of %d", len(got), len(d.Manifests))
			}
		}
		if s := offered(d.Manifests); !utf8.ValidString(s) || strings.ContainsAny(s, "\n\x1b") {
			t.Errorf("offers %q", s)
		}
		if isManifest(mt) {
			if c, err := parseConfig(config, d); err == nil && len(c.RootFS.DiffIDs) != len(d.Layers) {
				t.Error("layers and diff ids differ")
			}
		}
	})
}

func FuzzStatus(f *testing.F) {
	f.Add(403, `{"errors":[{"code":"DENIED","message":"no","detail":"x"}]}`)
	f.Add(401, `{"details":"incorrect username or password"}`)
	f.Add(500, "<html>\x1b]0;x\a")
	f.Fuzz(func(t *testing.T, code int, body string) {
		e := readStatus(&http.Response{StatusCode: code, Body: http.NoBody})
		_ = e.Error()
		e = readStatus(&http.Response{StatusCode: code, Body: readCloser{strings.NewReader(body)}})
		s := e.Error()
		if !utf8.ValidString(s) || strings.ContainsAny(s, "\n\r\x1b\a") || len(s) > 2*maxErrorMessage {
			t.Errorf("%q", s)
		}
	})
}

type readCloser struct{ *strings.Reader }

func (readCloser) Close() error { return nil }

func FuzzHop(f *testing.F) {
	f.Add("https://r.example", "https://169.254.169.254/x")
	f.Add("https://r.example", "http://[::ffff:127.0.0.1]:80/")
	f.Add("http://127.0.0.1:5000", "http://127.0.0.1:9000/")
	f.Fuzz(func(t *testing.T, a, b string) {
		from, err1 := url.Parse(a)
		to, err2 := url.Parse(b)
		if err1 != nil || err2 != nil {
			return
		}
		if checkHop(from, to) == nil && isPrivate(to.Hostname()) && !isPrivate(from.Hostname()) && from.Hostname() != to.Hostname() {
			t.Errorf("%s may lead to %s", a, b)
		}
	})
}

func TestPrivateAddresses(t *testing.T) {
	for host, want := range map[string]bool{
		"127.0.0.1": true, "10.1.2.3": true, "169.254.169.254": true, "::1": true, "fd00:ec2::254": true, "::ffff:127.0.0.1": true,
		"0.0.0.0": true, "fe80::1%eth0": true, "localhost": true, "a.localhost": true,
		"8.8.8.8": false, "2001:db8::1": false, "r.example": false, "": false,
	} {
		if got := isPrivate(host); got != want {
			t.Errorf("%q: %v", host, got)
		}
	}
	public, inside := &url.URL{Scheme: "https", Host: "r.example"}, &url.URL{Scheme: "https", Host: "169.254.169.254"}
	if err := checkHop(public, inside); err == nil || transient(err) {
		t.Errorf("a hop inside: %v", err)
	}
	if err := checkHop(inside, &url.URL{Scheme: "https", Host: "10.0.0.1:9000"}); err != nil {
		t.Errorf("a hop between private addresses: %v", err)
	}
}
