package registry

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/kiln-build/kiln/internal/registry/wire"
)

// sources are where something can be pulled from: the mirrors of its registry in
// their order, but for those that could not be reached before, then the registry itself.
func (c *Client) sources(t target) []target {
	var all []target
	for _, m := range c.net.Options().Mirrors[t.repo.Name] {
		host, prefix, _ := strings.Cut(m, "/")
		if _, down := c.down.Load(host); down {
			continue
		}
		s := t
		s.repo = wire.Repository{Host: host, Name: host, Path: t.repo.Path}
		if prefix != "" {
			s.repo.Path = prefix + "/" + t.repo.Path
		}
		all = append(all, s)
	}
	return append(all, t)
}

// fromAny calls pull for one source after the other until one has what is wanted. What a
// mirror has to complain of matters only if the registry itself fails too.
func (c *Client) fromAny(ctx context.Context, t target, pull func(target) error) error {
	var mirrors []string
	for _, s := range c.sources(t) {
		err := pull(s)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return err
		case s.repo == t.repo && len(mirrors) > 0:
			return fmt.Errorf("%w (and its mirrors: %s)", err, strings.Join(mirrors, "; "))
		case s.repo == t.repo:
			return err
		}
		c.net.Options().Logger.Warn("mirror", "host", s.repo.Host, "error", err)
		mirrors = append(mirrors, err.Error())
		if status := (*wire.Status)(nil); !errors.As(err, &status) {
			c.down.Store(s.repo.Host, true) // once is enough to wait for it
		}
	}
	return nil
}
