package registry

import (
	"strings"

	"github.com/distribution/reference"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/registry/wire"
	"github.com/opencontainers/go-digest"
)

// hubHost is where Docker Hub's API is, which names call "docker.io".
const hubHost = "registry-1.docker.io"

// NormalizeRef returns the full form of an image's name as docker would read it:
// "debian" is "docker.io/library/debian:latest". A digest stays, and a tag
// beside it too.
func NormalizeRef(s string) (string, error) {
	n, err := parseRef(s)
	if err != nil {
		return "", err
	}
	return n.String(), nil
}

// Repository returns what comes before tag and digest, in full:
// "registry/name" of NormalizeRef(ref).
func Repository(ref string) (string, error) {
	n, err := parseRef(ref)
	if err != nil {
		return "", err
	}
	return n.Name(), nil
}

func parseRef(s string) (reference.Named, error) {
	bad := func(why string) error {
		return diag.New(diag.ExitUsage, "image name %q: %s", s, why).
			WithHint("A name is [REGISTRY[:PORT]/]PATH[:TAG][@DIGEST], its path in lower case.")
	}
	if len(s) > 4096 {
		return nil, diag.New(diag.ExitUsage, "image name of %d bytes is too long", len(s))
	}
	for _, scheme := range []string{"http://", "https://", "docker://"} {
		if strings.HasPrefix(s, scheme) {
			return nil, bad("must not begin with " + scheme)
		}
	}
	n, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		if lower := strings.ToLower(s); lower != s {
			if _, e := reference.ParseNormalizedNamed(lower); e == nil {
				return nil, bad("a repository must be in lower case")
			}
		}
		return nil, bad(err.Error())
	}
	return reference.TagNameOnly(n), nil
}

// target is where in which registry something is: a reference, taken apart.
type target struct {
	named reference.Named
	repo  wire.Repository
	// tag or digest, of which the digest counts.
	tag    string
	digest digest.Digest
}

func parseTarget(ref string) (target, error) {
	n, err := parseRef(ref)
	if err != nil {
		return target{}, err
	}
	domain := reference.Domain(n)
	t := target{named: n, repo: wire.Repository{Host: domain, Name: domain, Path: reference.Path(n)}}
	if domain == "docker.io" {
		t.repo.Host = hubHost
	}
	if tagged, ok := n.(reference.Tagged); ok {
		t.tag = tagged.Tag()
	}
	if digested, ok := n.(reference.Digested); ok {
		t.digest = digested.Digest()
	}
	return t, nil
}

// id is what a manifest's URL ends with.
func (t target) id() string {
	if t.digest != "" {
		return t.digest.String()
	}
	return t.tag
}
