package compare

import (
	"fmt"
	"os"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Open reads an image from oci:DIR (a layout's first or only image),
// docker-archive:FILE, or a registry reference; a loopback registry is asked
// by plain HTTP. Of an index, the linux image of this machine's architecture.
func Open(ref string) (v1.Image, error) {
	if dir, ok := strings.CutPrefix(ref, "oci:"); ok {
		return openLayout(dir)
	}
	if file, ok := strings.CutPrefix(ref, "docker-archive:"); ok {
		return tarball.ImageFromPath(file, nil)
	}
	r, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		return nil, fmt.Errorf("open image: %w", err)
	}
	img, err := remote.Image(r, remote.WithPlatform(platform()))
	if err != nil {
		return nil, fmt.Errorf("open image %q: %w", ref, err)
	}
	return img, nil
}

func openLayout(dir string) (v1.Image, error) {
	if _, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("open layout: %w", err)
	}
	ix, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, fmt.Errorf("open layout: %w", err)
	}
	return firstImage(ix, dir)
}

func firstImage(ix v1.ImageIndex, dir string) (v1.Image, error) {
	m, err := ix.IndexManifest()
	if err != nil {
		return nil, fmt.Errorf("open layout: %w", err)
	}
	for _, d := range m.Manifests {
		if d.Annotations["vnd.docker.reference.type"] == "attestation-manifest" {
			continue
		}
		if d.Platform != nil && !platform().Satisfies(v1.Platform{OS: d.Platform.OS, Architecture: d.Platform.Architecture}) {
			continue
		}
		if d.MediaType.IsIndex() {
			sub, err := ix.ImageIndex(d.Digest)
			if err != nil {
				return nil, fmt.Errorf("open layout: %w", err)
			}
			return firstImage(sub, dir)
		}
		return ix.Image(d.Digest)
	}
	return nil, fmt.Errorf("open layout: no image in %q", dir)
}
