package remote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/image"
)

// kind is what a name stands for.
type kind int

const (
	kindNothing  kind = iota
	kindCache         // a cache of Kiln's
	kindBuildKit      // a cache of BuildKit's
	kindImage         // an image, maybe with records in its config
	kindOther
)

// mediaTypeBuildKit is the config's of BuildKit's caches.
const mediaTypeBuildKit = "application/vnd.buildkit.cacheconfig.v0"

// maxPlatforms is how many images of an index are looked into.
const maxPlatforms = 16

// unusableError says why a cache that could be fetched has no records for us.
type unusableError struct {
	kind kind
	err  error
}

func (e *unusableError) Error() string { return e.err.Error() }
func (e *unusableError) Unwrap() error { return e.err }

func unusable(k kind, format string, a ...any) error {
	return &unusableError{k, fmt.Errorf(format, a...)}
}

var errBuildKit = unusable(kindBuildKit,
	"it was written by BuildKit, whose keys are computed in another way: its records say nothing about Kiln's steps. Give Kiln a cache of its own")

// load reads what a cache has. fs.ErrNotExist: there is none.
func load(ctx context.Context, s Storage) (*contents, error) {
	raw, desc, err := s.Resolve(ctx)
	if err != nil {
		return nil, err
	}
	if len(raw) > image.MaxManifest {
		return nil, unusable(kindOther, "its manifest has %d bytes, more than %d", len(raw), image.MaxManifest)
	}
	c, err := loadFrom(ctx, s, raw)
	if err != nil {
		return nil, err
	}
	c.manifest = desc.Digest
	return c, nil
}

func loadFrom(ctx context.Context, s Storage, raw []byte) (*contents, error) {
	var idx ocispec.Index
	if err := json.Unmarshal(raw, &idx); err != nil {
		return nil, unusable(kindOther, "its manifest is not valid JSON: %w", err)
	}
	if m := ofIndex(&idx); m != nil {
		return loadCache(ctx, s, m)
	}
	if idx.Manifests != nil {
		return loadIndex(ctx, s, &idx)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, unusable(kindOther, "its manifest is not valid: %w", err)
	}
	switch m.Config.MediaType {
	case mediaTypeBuildKit:
		return nil, errBuildKit
	case ocispec.MediaTypeImageConfig, image.MediaTypeDockerConfig:
		return loadImage(ctx, s, raw, &m)
	case MediaType:
		return loadCache(ctx, s, &m)
	}
	return nil, unusable(kindOther, "it is neither a cache nor an image, but has content of type %q", clip(m.Config.MediaType))
}

// loadCache reads the records of a cache.
func loadCache(ctx context.Context, s Storage, m *ocispec.Manifest) (*contents, error) {
	config, err := s.Read(ctx, m.Config)
	if err != nil {
		return nil, fmt.Errorf("read its records: %w", err)
	}
	c, err := parse(m, config)
	if err != nil {
		return nil, &unusableError{kindCache, err}
	}
	return c, nil
}

// loadIndex reads the records of several platforms' images.
func loadIndex(ctx context.Context, s Storage, idx *ocispec.Index) (*contents, error) {
	var all contents
	var why error
	n := 0
	for _, d := range idx.Manifests {
		switch {
		case d.MediaType == mediaTypeBuildKit:
			return nil, errBuildKit
		case !image.IsManifest(d.MediaType), d.Platform != nil && d.Platform.OS == "unknown":
			continue
		}
		if n++; n > maxPlatforms {
			break
		}
		raw, err := s.Read(ctx, d)
		if err != nil {
			return nil, fmt.Errorf("read its manifest: %w", err)
		}
		one, err := loadFrom(ctx, s, raw)
		var none *unusableError
		if errors.As(err, &none) {
			why = err
			continue
		}
		if err != nil {
			return nil, err
		}
		all.join(one)
	}
	if len(all.entries) == 0 {
		if why == nil {
			why = unusable(kindOther, "it is neither a cache nor an image")
		}
		return nil, why
	}
	all.kind = kindImage
	return &all, nil
}

// join adds the entries of another cache.
func (c *contents) join(o *contents) {
	first := uint32(len(c.layers))
	c.layers = append(c.layers, o.layers...)
	for _, e := range o.entries {
		n := make([]uint32, len(e.layers))
		for i, l := range e.layers {
			n[i] = first + l
		}
		e.layers = n
		c.add(e)
	}
}

// clip bounds what of a hostile string gets into a message.
func clip(s string) string {
	if len(s) > 100 {
		return s[:100] + "…"
	}
	return s
}
