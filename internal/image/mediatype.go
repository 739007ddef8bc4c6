package image

import (
	"fmt"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Docker's media types; OCI's specification has constants for its own.
const (
	MediaTypeDockerManifest  = "application/vnd.docker.distribution.manifest.v2+json"
	MediaTypeDockerList      = "application/vnd.docker.distribution.manifest.list.v2+json"
	MediaTypeDockerConfig    = "application/vnd.docker.container.image.v1+json"
	MediaTypeDockerLayer     = "application/vnd.docker.image.rootfs.diff.tar"
	MediaTypeDockerLayerGzip = "application/vnd.docker.image.rootfs.diff.tar.gzip"
	MediaTypeDockerLayerZstd = "application/vnd.docker.image.rootfs.diff.tar.zstd"

	mediaTypeDockerForeign     = "application/vnd.docker.image.rootfs.foreign.diff.tar"
	mediaTypeDockerForeignGzip = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
	mediaTypeDockerSchema1     = "application/vnd.docker.distribution.manifest.v1+json"
	mediaTypeDockerSigned1     = "application/vnd.docker.distribution.manifest.v1+prettyjws"
)

// IsIndex reports whether a media type is that of an index or manifest list.
func IsIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == MediaTypeDockerList
}

// IsManifest reports whether a media type is that of one image's manifest.
func IsManifest(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageManifest || mediaType == MediaTypeDockerManifest
}

// layerType is a layer's media type taken apart.
type layerType struct {
	compression string // "", "gzip" or "zstd"
	foreign     bool
}

func knownLayerTypes() map[string]layerType {
	return map[string]layerType{
		ocispec.MediaTypeImageLayer:                                    {},
		ocispec.MediaTypeImageLayerGzip:                                {compression: "gzip"},
		ocispec.MediaTypeImageLayerZstd:                                {compression: "zstd"},
		MediaTypeDockerLayer:                                           {},
		MediaTypeDockerLayerGzip:                                       {compression: "gzip"},
		MediaTypeDockerLayerZstd:                                       {compression: "zstd"},
		mediaTypeDockerForeign:                                         {foreign: true},
		mediaTypeDockerForeignGzip:                                     {compression: "gzip", foreign: true},
		"application/vnd.oci.image.layer.nondistributable.v1.tar":      {foreign: true},
		"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": {compression: "gzip", foreign: true},
		"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": {compression: "zstd", foreign: true},
	}
}

// IsForeign reports whether a layer of this media type is one whose licence
// keeps it out of other registries (Windows base layers).
func IsForeign(mediaType string) bool { return knownLayerTypes()[mediaType].foreign }

// CheckLayerType returns an error for what is not the media type of a layer that
// any registry has.
func CheckLayerType(mediaType string) error {
	if t, ok := knownLayerTypes()[mediaType]; !ok || t.foreign {
		return fmt.Errorf("a layer cannot be of type %q", clip(mediaType))
	}
	return nil
}

// layerMediaType is the media type for a compression: "" is none.
func layerMediaType(compression string, docker bool) string {
	switch {
	case docker && compression != "":
		return MediaTypeDockerLayer + "." + compression
	case docker:
		return MediaTypeDockerLayer
	case compression != "":
		return ocispec.MediaTypeImageLayer + "+" + compression
	}
	return ocispec.MediaTypeImageLayer
}

// ConvertLayerType says the same in docker's or in OCI's words. Foreign
// layers have no counterpart that all tools know, and stay.
func ConvertLayerType(mediaType string, docker bool) string {
	t, ok := knownLayerTypes()[mediaType]
	if !ok || t.foreign {
		return mediaType
	}
	return layerMediaType(t.compression, docker)
}

// clip bounds what of a hostile string gets into a message.
func clip(s string) string {
	if len(s) > 200 {
		return strings.ToValidUTF8(s[:200], "") + "…"
	}
	return s
}
