package wire

import (
	"net/http"
	"net/url"
	"strings"
	"testing"
	"unicode/utf8"
)

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

func newNet(tb testing.TB, insecure ...string) *Net {
	tb.Helper()
	n, err := New(Options{Insecure: insecure, CertDirs: []string{tb.TempDir()}})
	if err != nil {
		tb.Fatal(err)
	}
	return n
}

func FuzzHop(f *testing.F) {
	n := newNet(f)
	f.Add("https://r.example", "https://169.254.169.254/x")
	f.Add("https://r.example", "http://[::ffff:127.0.0.1]:80/")
	f.Add("http://127.0.0.1:5000", "http://127.0.0.1:9000/")
	f.Fuzz(func(t *testing.T, a, b string) {
		from, err1 := url.Parse(a)
		to, err2 := url.Parse(b)
		if err1 != nil || err2 != nil {
			return
		}
		if n.checkHop(from, to) == nil && isPrivate(to.Hostname()) && !isPrivate(from.Hostname()) && from.Hostname() != to.Hostname() {
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
	if err := newNet(t).checkHop(public, inside); err == nil || Transient(err) {
		t.Errorf("a hop inside: %v", err)
	}
	if err := newNet(t).checkHop(inside, &url.URL{Scheme: "https", Host: "10.0.0.1:9000"}); err != nil {
		t.Errorf("a hop between private addresses: %v", err)
	}
	listed := newNet(t, "10.0.0.1:9000")
	for to, want := range map[string]bool{"10.0.0.1:9000": true, "10.0.0.1:9001": false, "10.0.0.2:9000": false, "s3.example": true} {
		if err := listed.checkHop(public, &url.URL{Scheme: "http", Host: to}); (err == nil) != want {
			t.Errorf("a hop to %s: %v", to, err)
		}
	}
}
