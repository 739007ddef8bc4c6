// Package image knows what an image is made of: layers, config, manifest,
// index; and moves layers between their two forms, the compressed blob that
// registries hold and the layer file that Kiln works on.
package image

import (
	"context"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Layer identifies one layer of an image and says where its forms can be had.
type Layer struct {
	// DiffID is the digest of the uncompressed tar: the layer's identity.
	DiffID digest.Digest `json:"diffID"`
	// Blob describes the compressed blob. Zero: none was made or seen yet.
	Blob ocispec.Descriptor `json:"blob,omitzero"`
	// Origin is the repository, "registry.example/name", from which Blob
	// can be fetched. Empty: only the local store can have it.
	Origin string `json:"origin,omitempty"`
	// Created is when a build made the layer. Zero: it came with an image,
	// whose history knows. It is kept with the layer so that a build which
	// finds everything in the cache gives the same image, byte by byte.
	Created time.Time `json:"created,omitzero"`
	// Newest is the latest time of a file in a layer that a build made. Zero: not known.
	Newest time.Time `json:"newest,omitzero"`
}

// Built reports whether a build made the layer, and it did not come with an image.
func (l Layer) Built() bool { return !l.Created.IsZero() }

// LostError says that a layer cannot be had: it is not where it should be, or
// what is there is something else. What a build made, a build can make again.
type LostError struct {
	Layer Layer
	Err   error
}

func (e *LostError) Error() string { return e.Err.Error() }

func (e *LostError) Unwrap() error { return e.Err }

// Image is one platform's image as a registry, archive or the local store has it.
type Image struct {
	// Ref is what it was asked for as, normalised: "docker.io/library/debian:bookworm".
	Ref string
	// Digest of what Ref named: an index's if it names one, else the manifest's.
	Digest digest.Digest
	// Manifest describes this platform's manifest (media type, digest, size, platform).
	Manifest ocispec.Descriptor
	// RawManifest and RawConfig are the bytes, whose digests were verified.
	RawManifest []byte
	RawConfig   []byte
	// Layers, the bottom first; DiffIDs come from the config, and there are
	// as many as the manifest has layers.
	Layers []Layer
}

// Fetcher opens the compressed blob of a layer: at its origin, or in an archive.
// The stream is verified against l.Blob's digest and size before its io.EOF.
type Fetcher interface {
	Fetch(ctx context.Context, l Layer) (io.ReadCloser, error)
}

// FetcherFunc is a Fetcher.
type FetcherFunc func(ctx context.Context, l Layer) (io.ReadCloser, error)

// Fetch implements Fetcher.
func (f FetcherFunc) Fetch(ctx context.Context, l Layer) (io.ReadCloser, error) { return f(ctx, l) }

// Tracking is f with errors that are *LostError, those of reading too: whoever passes
// a layer on to somewhere else can tell which side has failed.
func Tracking(f Fetcher) Fetcher {
	return FetcherFunc(func(ctx context.Context, l Layer) (io.ReadCloser, error) {
		r, err := f.Fetch(ctx, l)
		if err != nil {
			return nil, &LostError{l, err}
		}
		return &trackingReader{r, l}, nil
	})
}

type trackingReader struct {
	io.ReadCloser
	layer Layer
}

func (r *trackingReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	if err != nil && err != io.EOF { //nolint:errorlint // as io.Reader has it
		err = &LostError{r.layer, err}
	}
	return n, err
}
