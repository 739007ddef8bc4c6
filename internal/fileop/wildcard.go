package fileop

import (
	"context"
	"errors"
	"io/fs"
	"path"
	"strings"
	"syscall"

	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/tree"
)

// resolveWildcards returns the paths in t that p matches, in sorted order; p
// itself, cleaned, if it has no wildcard.
func resolveWildcards(t tree.Tree, p string, follow bool) ([]string, error) {
	dir, pattern := splitWildcards(p)
	if pattern == "" {
		return []string{dir}, nil
	}
	base, err := rootfs.ResolveNew(t, dir, follow)
	if err != nil {
		return nil, err
	}
	n, err := t.Lstat(base)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = pathError("lstat", base, syscall.ENOENT)
		}
		return nil, err
	}
	m := matcher{t: t, base: base, pattern: pattern}
	// A "*" does not match "/", but a "[...]" may.
	m.depth = strings.Count(pattern, "/") + strings.Count(pattern, "[") + 1
	if n.IsDir() {
		err = m.walk("", m.depth)
	}
	return m.found, err
}

type matcher struct {
	t       tree.Tree
	base    string
	pattern string
	depth   int
	found   []string
}

func (m *matcher) walk(rel string, depth int) error {
	es, err := m.t.ReadDir(path.Join(m.base, rel))
	if err != nil {
		return err
	}
	for _, e := range es {
		r := path.Join(rel, e.Name)
		if ok, _ := path.Match(m.pattern, r); ok {
			m.found = append(m.found, path.Join(m.base, r))
			continue
		}
		if e.Node.IsDir() && depth > 1 {
			if err := m.walk(r, depth-1); err != nil {
				return err
			}
		}
	}
	return nil
}

// splitWildcards splits a path at its first component with a wildcard.
func splitWildcards(p string) (dir, pattern string) {
	p = path.Clean(p)
	for at := 0; at < len(p); {
		name, _, _ := strings.Cut(p[at:], "/")
		if containsWildcards(name) {
			if at == 0 {
				return "", p
			}
			return path.Clean(p[:at]), p[at:]
		}
		at += len(name) + 1
	}
	return p, ""
}

func containsWildcards(name string) bool {
	for i := 0; i < len(name); i++ {
		switch name[i] {
		case '*', '?', '[':
			return true
		case '\\':
			i++
		}
	}
	return false
}

// Remove removes a path and all below it.
func (c *Changes) Remove(_ context.Context, a RemoveAction) error {
	paths := []string{a.Path}
	if a.AllowWildcard {
		var err error
		if paths, err = resolveWildcards(c, cleanPath(a.Path), false); err != nil {
			return err
		}
	}
	for _, p := range paths {
		if err := c.removePath(p, a.AllowNotFound); err != nil {
			return err
		}
	}
	return nil
}

func (c *Changes) removePath(p string, allowNotFound bool) error {
	dir, name := path.Split(path.Join("/", p))
	if name == "" {
		return errors.New("rmPath: invalid empty path")
	}
	dir, err := rootfs.ResolveNew(c, dir, true)
	if err != nil {
		return err
	}
	p = path.Join(dir, name)
	if !allowNotFound {
		if _, err := rootfs.Resolve(c, p, true); errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return c.remove(p)
}
