package registry

import (
	"encoding/json"
	"mime"

	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/registry/wire"
	"github.com/opencontainers/go-digest"
)

// Media types of docker's schema 1. They are asked for so that such an image can
// be refused by name rather than not be found.
const (
	dockerSchema1 = "application/vnd.docker.distribution.manifest.v1+json"
	dockerSigned1 = "application/vnd.docker.distribution.manifest.v1+prettyjws"
)

// mediaType is a Content-Type without its parameters; empty if it is none.
func mediaType(contentType string) string {
	mt, _, err := mime.ParseMediaType(contentType)
	if err != nil {
		return ""
	}
	return mt
}

// checkDocument checks the manifest or index that a registry answered with, and
// returns its media type. What is wrong with it now is wrong with it the next time too.
func checkDocument(raw []byte, contentType string) (string, error) {
	mt, err := image.DocumentType(raw, mediaType(contentType))
	switch {
	case err != nil:
	case image.IsIndex(mt):
		_, err = image.ParseIndex(raw, mt)
	default:
		_, err = image.ParseManifest(raw, mt)
	}
	if err == nil {
		return mt, nil
	}
	if wire.IsHTML(raw) && !json.Valid(raw) {
		return "", wire.Permanent("the answer is a web page, not a manifest")
	}
	return "", wire.Permanent("%w", err)
}

// verify checks bytes against a digest, which may be of any known algorithm.
func verify(raw []byte, want digest.Digest) error {
	if err := want.Validate(); err != nil {
		return wire.Permanent("digest %q: %w", wire.Clean(string(want)), err)
	}
	if got := want.Algorithm().FromBytes(raw); got != want {
		return wire.Permanent("the content has digest %s, not %s", got, want)
	}
	return nil
}
