package git

import (
	"errors"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	const sum = "0123456789abcdef0123456789abcdef01234567"
	yes := func(f func(*Ref)) Ref { var r Ref; f(&r); return r }
	for in, want := range map[string]Ref{
		"https://example.com/":                          {},
		"https://example.com/foo":                       {},
		"https://example.com/foo.tar.gz#x.git":          {},
		"https://example.com/foo.git":                   {Remote: "https://example.com/foo.git"},
		"HTTPS://example.com/foo.git":                   {Remote: "https://example.com/foo.git"},
		"http://example.com/foo.git#deadbeef":           {Remote: "http://example.com/foo.git", Rev: "deadbeef"},
		"https://example.com/foo.git#release/1.2":       {Remote: "https://example.com/foo.git", Rev: "release/1.2"},
		"https://example.com/foo.git/":                  {},
		"https://example.com/foo.git?":                  {Remote: "https://example.com/foo.git"},
		"https://u:p@example.com/foo.git#main:a/b":      {Remote: "https://u:p@example.com/foo.git", Rev: "main", Subdir: "a/b"},
		"https://example.com/foo.git#:a":                {Remote: "https://example.com/foo.git", Subdir: "a"},
		"https://example.com/foo.git#:/a/../../b/./":    {Remote: "https://example.com/foo.git", Subdir: "b"},
		"https://example.com/foo.git#main:a:b":          {Remote: "https://example.com/foo.git", Rev: "main", Subdir: "a:b"},
		"https://example.com/foo.git#":                  {Remote: "https://example.com/foo.git"},
		"git://example.com/foo":                         {Remote: "git://example.com/foo"},
		"git://example.com/foo#v1:x":                    {Remote: "git://example.com/foo", Rev: "v1", Subdir: "x"},
		"ssh://git@example.com:2222/foo":                {Remote: "ssh://git@example.com:2222/foo"},
		"git@example.com:foo/bar":                       {Remote: "git@example.com:foo/bar"},
		"git@example.com:foo/bar.git#v1:x":              {Remote: "git@example.com:foo/bar.git", Rev: "v1", Subdir: "x"},
		"me_2@example.com:~/foo?ref=v1":                 {Remote: "me_2@example.com:~/foo", Rev: "v1"},
		"git@example.com/foo/bar.git":                   {},
		"example.com:foo/bar.git":                       {},
		"github.com/moby/buildkit":                      {Remote: "https://github.com/moby/buildkit"},
		"github.com/moby/buildkit#main":                 {Remote: "https://github.com/moby/buildkit", Rev: "main"},
		"gitlab.com/moby/buildkit":                      {},
		"./github.com/moby/buildkit":                    {},
		"../git@example.com:foo":                        {},
		"file:///etc/repo.git":                          {},
		"ext::sh -c x":                                  {},
		"ftp://example.com/foo.git":                     {},
		"":                                              {},
		".":                                             {},
		"https://example.com/foo.git?ref=v1&subdir=/a/": {Remote: "https://example.com/foo.git", Rev: "v1", Subdir: "a"},
		"https://example.com/foo.git?tag=v1":            {Remote: "https://example.com/foo.git", Rev: "refs/tags/v1"},
		"https://example.com/foo.git?branch=v1":         {Remote: "https://example.com/foo.git", Rev: "refs/heads/v1"},
		"https://example.com/foo.git?branch=refs/heads/v1&checksum=ABC": {
			Remote: "https://example.com/foo.git", Rev: "refs/heads/v1", Checksum: "abc",
		},
		"https://example.com/foo.git?keep-git-dir&submodules=false&mtime=checkout": {
			Remote: "https://example.com/foo.git", KeepGitDir: true, SkipSubmodules: true, MTime: "checkout",
		},
		"https://example.com/foo.git?keep-git-dir=0&submodules": {Remote: "https://example.com/foo.git"},
		"https://example.com/foo.git?fetch-by-commit&commit=" + sum + "#main": {
			Remote: "https://example.com/foo.git", Rev: "main", Checksum: sum, FetchByCommit: true,
		},
		"https://example.com/foo.git?ref=v1#v1": {Remote: "https://example.com/foo.git", Rev: "v1"},
	} {
		got, err := Parse(in)
		if want == yes(func(*Ref) {}) {
			if !errors.Is(err, ErrNotGit) {
				t.Errorf("%s: %+v, %v; want ErrNotGit", in, got, err)
			}
			continue
		}
		if err != nil || *got != want {
			t.Errorf("%s:\n%+v, %v; want\n%+v", in, got, err, want)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for in, want := range map[string]string{
		"https://example.com/foo.git#-x":                      "invalid ref",
		"https://example.com/foo.git#--upload-pack=touch%20x": "invalid ref",
		"git@example.com:foo#-x":                              "invalid ref",
		"https://example.com/foo.git?ref=-x":                  "invalid ref",
		"https://example.com/foo.git#a..b":                    "invalid ref",
		"https://example.com/foo.git#a%20b":                   "invalid ref",
		"https://example.com/foo.git#*":                       "invalid ref",
		"https://example.com/foo.git?ref=a:b":                 "invalid ref",
		"https://example.com/foo.git?ref=a%0ab":               "invalid ref",
		"https://example.com/foo.git#x@%7b1}":                 "invalid ref",
		"https://example.com/foo.git?what=1":                  "unknown query",
		"https://example.com/foo.git?ref":                     "no value",
		"https://example.com/foo.git?ref=a&ref=b":             "several values",
		"https://example.com/foo.git?ref=a#b":                 "conflict",
		"https://example.com/foo.git?subdir=a#x:b":            "conflict",
		"https://example.com/foo.git?tag=a&branch=a":          "conflicts",
		"https://example.com/foo.git?checksum=xyz":            "invalid checksum",
		"https://example.com/foo.git?submodules=maybe":        "neither true nor false",
		"https://example.com/foo.git?mtime=now":               "mtime",
		"https://example.com/foo.git?fetch-by-commit#main":    "full hash",
		"https://example.com/foo.git#x:a%00b":                 "subdirectory",
		"git@example.com:foo%0a\nx":                           "address",
	} {
		r, err := Parse(in)
		if err == nil || errors.Is(err, ErrNotGit) && !strings.Contains(in, "\n") || !errors.Is(err, ErrNotGit) && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %+v, %v; want an error with %q", in, r, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("https://u:p@example.com/foo.git?ref=x&subdir=y#z:w")
	f.Add("git@example.com:foo?tag=v1#a:b")
	f.Add("github.com/a/b#x")
	f.Fuzz(func(t *testing.T, s string) {
		r, err := Parse(s)
		if err != nil {
			return
		}
		if strings.HasPrefix(r.Rev, "-") || strings.HasPrefix(r.Remote, "-") || strings.HasPrefix(r.Subdir, "/") || strings.HasPrefix(r.Subdir, "../") || r.Subdir == ".." {
			t.Errorf("%q gives %+v", s, r)
		}
		for _, c := range []string{"http://", "https://", "git://", "ssh://"} {
			if strings.HasPrefix(r.Remote, c) {
				return
			}
		}
		if !scpStyle.MatchString(r.Remote) {
			t.Errorf("%q gives the remote %q", s, r.Remote)
		}
	})
}

func TestRedact(t *testing.T) {
	for in, want := range map[string]string{
		"https://u:p@example.com/foo.git":   "https://example.com/foo.git",
		"https://token@example.com/foo.git": "https://example.com/foo.git",
		"ssh://git:p@example.com/foo":       "ssh://git@example.com/foo",
		"git@example.com:foo":               "git@example.com:foo",
		"https://example.com/foo.git":       "https://example.com/foo.git",
	} {
		if got := Redact(in); got != want {
			t.Errorf("Redact(%s) = %s, want %s", in, got, want)
		}
	}
}
