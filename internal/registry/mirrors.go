package registry

import (
	"context"
	"path"
	"strings"

	"github.com/distribution/reference"
	"github.com/kiln-build/kiln/internal/registry/wire"
)

// places are where what t names may be had: the mirrors of its registry, and the registry itself.
func (c *Client) places(t target) []target {
	var all []target
	for _, m := range c.net.Options().Mirrors[reference.Domain(t.named)] {
		m = strings.TrimPrefix(strings.TrimPrefix(m, "https://"), "http://")
		host, prefix, _ := strings.Cut(strings.TrimSuffix(m, "/"), "/")
		p := t
		p.repo = wire.Repository{Host: host, Name: host, Path: path.Join(prefix, t.repo.Path)}
		all = append(all, p)
	}
	return append(all, t)
}

// first is what the first of the places gives that can give it; the error is the registry's own.
func first[T any](ctx context.Context, c *Client, t target, ask func(target) (T, error)) (T, error) {
	places := c.places(t)
	for _, mirror := range places[:len(places)-1] {
		v, err := ask(mirror)
		if err == nil || ctx.Err() != nil {
			return v, err
		}
		c.net.Options().Logger.Warn("mirror failed", "mirror", mirror.repo.Host, "image", t.named.String(), "error", err.Error())
	}
	return ask(t)
}
