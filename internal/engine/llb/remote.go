package llb

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/engine"
	"github.com/kiln-build/kiln/internal/source/git"
	"github.com/kiln-build/kiln/internal/source/http"
	"github.com/kiln-build/kiln/internal/source/remote"
	"github.com/kiln-build/kiln/internal/tree"
)

// RemoteSource decodes a source that has to be fetched, by its name and attributes. Every attribute
// counts: one that is not known might be a check of what is fetched.
func RemoteSource(id string, attrs map[string]string) (remote.Source, error) {
	kind, rest, _ := strings.Cut(id, "://")
	switch kind {
	case "http", "https":
		return httpSource(id, attrs)
	case "git":
		return gitSource(rest, attrs)
	}
	return nil, fmt.Errorf("source of kind %q is not supported", kind)
}

// httpSource decodes a source that is a file of an http server.
func httpSource(id string, attrs map[string]string) (*remote.HTTP, error) {
	h := &remote.HTTP{URL: id}
	for k, v := range attrs {
		if err := httpAttr(h, k, v); err != nil {
			return nil, fmt.Errorf("source %s: %w", http.Redact(id), err)
		}
	}
	return h, nil
}

// stepName is the name of a Dockerfile's step.
var stepName = regexp.MustCompile(`^\[[^\]]*\d+/\d+\] `)

// remoteOp gives the operation a name of its own: the front end gives it the ADD's.
func remoteOp(op *engine.Op, s remote.Source) *engine.Remote {
	if op.Name == "" || stepName.MatchString(op.Name) {
		op.Name = "fetch " + s.String()
	}
	return &engine.Remote{Source: s}
}

func httpAttr(h *remote.HTTP, k, v string) error {
	number := func(to *uint32) error {
		n, err := strconv.ParseUint(v, 0, 32)
		if err != nil {
			return fmt.Errorf("%s=%q is no number", k, v)
		}
		*to = uint32(n)
		return nil
	}
	switch k {
	case pb.AttrHTTPChecksum:
		h.Checksum = digest.Digest(v)
		if err := h.Checksum.Validate(); err != nil {
			return fmt.Errorf("checksum %q: %w", v, err)
		}
		if h.Checksum.Algorithm() != digest.SHA256 {
			return fmt.Errorf("checksum %q: only sha256 is supported", v)
		}
	case pb.AttrHTTPFilename:
		h.Filename = v
	case pb.AttrHTTPPerm:
		if err := number(&h.Perm); err != nil {
			return err
		}
		h.Perm &= tree.ModePerm
	case pb.AttrHTTPUID:
		return number(&h.UID)
	case pb.AttrHTTPGID:
		return number(&h.GID)
	case pb.AttrHTTPAuthHeaderSecret:
		h.AuthSecret = v
	case pb.AttrHTTPSignatureVerify, pb.AttrHTTPSignatureVerifyPubKey:
		return fmt.Errorf("verifying signatures (%s) is not supported", k)
	default:
		switch name, ok := strings.CutPrefix(k, pb.AttrHTTPHeaderPrefix); {
		case ok && strings.EqualFold(name, "accept"):
			h.Accept = v
		case ok && strings.EqualFold(name, "user-agent"):
			h.UserAgent = v
		case !ok: // other headers are ignored, as BuildKit does
			return fmt.Errorf("the attribute %q is not supported", k)
		}
	}
	return nil
}

// gitSource decodes a source that is a commit: id is HOST/PATH#REF:SUBDIR.
func gitSource(id string, attrs map[string]string) (*remote.Git, error) {
	url, fragment, _ := strings.Cut(id, "#")
	url = "https://" + url
	if v := attrs[pb.AttrFullRemoteURL]; v != "" {
		url = v
	}
	if fragment != "" {
		url += "#" + fragment
	}
	ref, err := git.ParseRemote(url)
	if err != nil {
		return nil, fmt.Errorf("source git://%s: %w", id, err)
	}
	g := &remote.Git{Ref: *ref}
	for k, v := range attrs {
		if err := gitAttr(g, k, v); err != nil {
			return nil, fmt.Errorf("source %s: %w", ref, err)
		}
	}
	if err := g.Ref.Validate(); err != nil {
		return nil, fmt.Errorf("source %s: %w", ref, err)
	}
	return g, nil
}

func gitAttr(g *remote.Git, k, v string) error {
	switch k {
	case pb.AttrFullRemoteURL, pb.AttrGitAdvice: // advice is git's on standard error
	case pb.AttrKeepGitDir:
		g.Ref.KeepGitDir = v == "true"
	case pb.AttrGitSkipSubmodules:
		g.Ref.SkipSubmodules = v == "true"
	case pb.AttrGitFetchByCommit:
		g.Ref.FetchByCommit = v == "true"
	case pb.AttrGitChecksum:
		g.Ref.Checksum = v
	case pb.AttrGitMTime:
		g.Ref.MTime = v
	case pb.AttrAuthTokenSecret:
		g.TokenSecret = v
	case pb.AttrAuthHeaderSecret:
		g.HeaderSecret = v
	case pb.AttrKnownSSHHosts:
		g.KnownHosts = v
	case pb.AttrMountSSHSock:
		g.Agent = v
	default:
		return fmt.Errorf("the attribute %q is not supported", k)
	}
	return nil
}
