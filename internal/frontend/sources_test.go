package frontend

import (
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/source/git"
	"github.com/kiln-build/kiln/internal/source/remote"
)

// remotes is a catalogue with one remote source, whatever it is called.
type remotes struct {
	catalogue
	md  remote.Metadata
	id  string
	ask remote.Ask
}

func (r *remotes) Describe(_ context.Context, id string, _ map[string]string, ask remote.Ask) (remote.Metadata, error) {
	r.id, r.ask = id, ask
	return r.md, nil
}

// TestEpochOfSources: SOURCE_DATE_EPOCH is that of a context, or of a stage that has nothing but one.
func TestEpochOfSources(t *testing.T) {
	when := time.Unix(1_500_000_000, 0)
	commit := remote.Metadata{Git: &remote.GitMetadata{
		Found:  git.Found{Hash: strings.Repeat("a", 40)},
		Commit: []byte("tree 4b825dc642cb6eb9a060e54bf8d69288fbee4904\nauthor a <a@b> 1400000000 +0000\ncommitter a <a@b> 1500000000 +0000\n\nm\n"),
	}}
	file := remote.Metadata{HTTP: &remote.HTTPMetadata{Digest: digest.FromString("x"), Filename: "f", LastModified: when}}
	for _, c := range []struct {
		name, dockerfile, context string
		md                        remote.Metadata
		objects                   bool
		id                        string
	}{
		{"a repository", "ARG SOURCE_DATE_EPOCH=src\nFROM scratch\nCOPY a /\n", "https://h.example/r.git#v1", commit, true, "git://h.example/r.git#v1"},
		{"a file", "ARG SOURCE_DATE_EPOCH=src\nFROM scratch\nCOPY a /\n", "https://h.example/f.txt", file, false, "https://h.example/f.txt"},
		{"a stage", "ARG SOURCE_DATE_EPOCH=stage\nFROM scratch AS stage\nADD https://h.example/f.txt /\nFROM scratch\nCOPY a /\n", "", file, false, "https://h.example/f.txt"},
	} {
		in := input(c.dockerfile)
		if c.context != "" {
			in.NamedContexts = map[string]string{"src": c.context}
		}
		r := &remotes{md: c.md}
		p, err := Load(t.Context(), in, r, nil)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if got := p.Platforms[0].Epoch; got == nil || !got.Equal(when) || r.id != c.id || r.ask.Objects != c.objects {
			t.Errorf("%s: %v of %q, asked for %+v", c.name, got, r.id, r.ask)
		}
	}
}

func TestResolveRemote(t *testing.T) {
	hash, peeled := strings.Repeat("a", 40), strings.Repeat("b", 40)
	r := &remotes{md: remote.Metadata{Git: &remote.GitMetadata{
		Found: git.Found{Ref: "refs/tags/v1", Hash: hash, Peeled: peeled}, Commit: []byte("c"), Tag: []byte("t"),
	}}}
	resolve := func(id string, opt sourceresolver.Opt) (*sourceresolver.MetaResponse, error) {
		return ResolveSource(t.Context(), r, nil, &pb.SourceOp{Identifier: id}, opt)
	}
	res, err := resolve("git://h.example/r.git#v1", sourceresolver.Opt{GitOpt: &sourceresolver.ResolveGitOpt{ReturnObject: true}})
	if err != nil || !r.ask.Objects || res.Git.Ref != "refs/tags/v1" || res.Git.Checksum != hash || res.Git.CommitChecksum != peeled ||
		string(res.Git.CommitObject) != "c" || string(res.Git.TagObject) != "t" || res.Op.Identifier != "git://h.example/r.git#v1" {
		t.Errorf("%+v, %v", res, err)
	}
	r.md.Git.Found = git.Found{Hash: hash}
	if res, err = resolve("git://h.example/r.git#"+hash, sourceresolver.Opt{}); err != nil || res.Git.Ref != hash {
		t.Errorf("%+v, %v", res, err)
	}
	sum := func(algo sourceresolver.ResolveHTTPChecksumAlgo, suffix int) (*sourceresolver.MetaResponse, error) {
		return resolve("https://h.example/f", sourceresolver.Opt{HTTPOpt: &sourceresolver.ResolveHTTPOpt{
			ChecksumReq: &sourceresolver.ResolveHTTPChecksumRequest{Algo: algo, Suffix: make([]byte, suffix)},
		}})
	}
	r.md = remote.Metadata{HTTP: &remote.HTTPMetadata{Digest: digest.FromString("x"), Filename: "f", Checksum: digest.SHA384.FromString("x")}}
	res, err = sum(sourceresolver.ResolveHTTPChecksumAlgoSHA384, 3)
	if err != nil || r.ask.Algorithm != digest.SHA384 || res.HTTP.Digest != digest.FromString("x") || res.HTTP.LastModified != nil ||
		res.HTTP.ChecksumResponse.Digest != digest.SHA384.FromString("x").String() || len(res.HTTP.ChecksumResponse.Suffix) != 3 {
		t.Errorf("%+v, %v", res, err)
	}
	if _, err := sum(sourceresolver.ResolveHTTPChecksumAlgoSHA384, maxSuffix+1); err == nil {
		t.Error("a suffix of any length is taken")
	}
	if _, err := sum(99, 0); err == nil || !strings.Contains(err.Error(), "99") {
		t.Errorf("an unknown algorithm: %v", err)
	}
	if res, err := resolve("local://context", sourceresolver.Opt{}); err != nil || res.Op.Identifier != "local://context" {
		t.Errorf("%+v, %v", res, err)
	}
	if _, err := resolve("odd://x", sourceresolver.Opt{}); err == nil || !strings.Contains(err.Error(), `kind "odd"`) {
		t.Error(err)
	}
}

// TestVerbatim: an error says the line once; who wants BuildKit's words has them.
func TestVerbatim(t *testing.T) {
	_, err := Load(t.Context(), input("FROM scratch\nBADCMD\n"), catalogue{}, nil)
	if err == nil || err.Error() != "Dockerfile:2: unknown instruction: BADCMD" {
		t.Fatal(err)
	}
	if got := Verbatim(err, "failed: unknown instruction: BADCMD"); got != "failed: dockerfile parse error on line 2: unknown instruction: BADCMD" {
		t.Errorf("%q", got)
	}
	if got := Verbatim(io.EOF, "x"); got != "x" {
		t.Errorf("%q", got)
	}
}
