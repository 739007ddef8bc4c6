package source

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"strings"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/source/http"
	"github.com/kiln-build/kiln/internal/source/inline"
	"github.com/kiln-build/kiln/internal/source/local"
	"github.com/kiln-build/kiln/internal/tree"
)

const (
	defaultName  = "Dockerfile"
	ignoreSuffix = ".dockerignore"
	maxLinks     = 40
)

// dockerfileTree has a Dockerfile and perhaps its ignore file, nil if not.
func dockerfileTree(name string, content, ignore []byte) tree.Tree {
	t := inline.Tree{name: {Content: content, Mode: 0o644}}
	if ignore != nil {
		t[name+ignoreSuffix] = inline.File{Content: ignore, Mode: 0o644}
	}
	return t
}

// openDockerfile finds the Dockerfile of an opened context.
func openDockerfile(ctx context.Context, c *Context, o Options) (tree.Tree, string, error) {
	switch {
	case o.Dockerfile == "-":
		b, err := readBounded(stdin(o))
		if err != nil {
			return nil, "", fmt.Errorf("read Dockerfile from standard input: %w", err)
		}
		return dockerfileTree(defaultName, b, nil), defaultName, nil
	case httpURL.MatchString(o.Dockerfile):
		resp, err := http.Get(ctx, o.Dockerfile, http.Options{Env: o.Env})
		if err != nil {
			return nil, "", fmt.Errorf("read Dockerfile: %w", err)
		}
		defer resp.Body.Close()
		b, err := readBounded(resp.Body)
		if err != nil {
			return nil, "", fmt.Errorf("read Dockerfile %s: %w", http.Redact(o.Dockerfile), err)
		}
		return dockerfileTree(defaultName, b, nil), defaultName, nil
	case c.Kind == Local:
		return localDockerfile(c, o)
	}
	name := tree.Clean(o.Dockerfile)
	if o.Dockerfile == "" {
		name = defaultName
	}
	return readDockerfile(c.Tree, name, name, c.Description)
}

// localDockerfile finds the Dockerfile of a directory. One that -f names is
// relative to where the user is, and may lie anywhere. Its links are followed
// within the context if it lies there, within its own directory if not: a
// Dockerfile is no way to read what is elsewhere.
func localDockerfile(c *Context, o Options) (tree.Tree, string, error) {
	if o.Dockerfile == "" {
		return readDockerfile(c.Tree, defaultName, defaultName, fmt.Sprintf("%q", o.Arg))
	}
	dir, base := filepath.Split(o.Dockerfile)
	if dir == "" {
		dir = "."
	}
	if rel, ok := below(o.Arg, dir); ok {
		return readDockerfile(c.Tree, path.Join(rel, base), base, fmt.Sprintf("%q", dir))
	}
	l, err := local.Open(dir)
	if err != nil {
		return nil, "", diag.New(diag.ExitDockerfile, "read Dockerfile %q: %w", o.Dockerfile, err).WithHint("%s", hintWhere)
	}
	defer l.Close()
	return readDockerfile(l, tree.Clean(base), base, fmt.Sprintf("%q", dir))
}

const hintWhere = "Say with -f where the Dockerfile is. A relative path is relative to the current directory, not to the context."

// below returns the path of dir in root, if it is there, links resolved.
func below(root, dir string) (string, bool) {
	var abs [2]string
	for i, p := range []string{root, dir} {
		p, err := filepath.EvalSymlinks(p)
		if err == nil {
			p, err = filepath.Abs(p)
		}
		if err != nil {
			return "", false
		}
		abs[i] = p
	}
	rel, err := filepath.Rel(abs[0], abs[1])
	if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		return "", false
	}
	return filepath.ToSlash(rel), true
}

// readDockerfile reads the Dockerfile at p of t, and what belongs to it, to be
// known as name. where says to the user what t is.
func readDockerfile(t tree.Tree, p, name, where string) (tree.Tree, string, error) {
	looked := fmt.Sprintf("%q", name)
	b, err := readFollowed(t, p)
	if errors.Is(err, fs.ErrNotExist) && path.Base(p) == defaultName {
		// Docker takes this one too.
		looked += fmt.Sprintf(" (or %q)", strings.ToLower(defaultName))
		if lb, lerr := readFollowed(t, lower(p)); !errors.Is(lerr, fs.ErrNotExist) {
			b, err, p, name = lb, lerr, lower(p), lower(name)
		}
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e := diag.New(diag.ExitDockerfile, "read Dockerfile: there is no file %s in %s", looked, where)
		if n, lerr := t.Lstat(p); lerr == nil && n.IsSymlink() {
			return nil, "", e.WithHint("It is a symbolic link, and what it leads to is not in there. Name that with -f.")
		}
		return nil, "", e.WithHint("%s", hintWhere)
	case err != nil:
		return nil, "", diag.New(diag.ExitDockerfile, "read Dockerfile in %s: %w", where, err)
	}
	ignore, err := readFollowed(t, p+ignoreSuffix)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, "", diag.New(diag.ExitDockerfile, "read ignore file of the Dockerfile in %s: %w", where, err)
	}
	return dockerfileTree(name, b, ignore), name, nil
}

func lower(p string) string {
	return path.Join(path.Dir(p), strings.ToLower(defaultName))
}

// readFollowed reads a small file, following links as if the tree were all there is.
func readFollowed(t tree.Tree, p string) ([]byte, error) {
	real, err := follow(t, p)
	if err != nil {
		return nil, err
	}
	r, err := t.Open(real)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b, err := readBounded(r)
	if err != nil {
		return nil, fmt.Errorf("%q: %w", p, err)
	}
	if b == nil {
		b = []byte{}
	}
	return b, nil
}

// follow resolves the symbolic links in a path; none leads out of the tree.
func follow(t tree.Tree, p string) (string, error) {
	done, links := ".", 0
	for rest := tree.Clean(p); rest != ""; {
		var c string
		c, rest, _ = strings.Cut(rest, "/")
		switch c {
		case "", ".":
			continue
		case "..":
			done = path.Dir(done)
			continue
		}
		next := path.Join(done, c)
		n, err := t.Lstat(next)
		if err != nil {
			return "", err
		}
		if !n.IsSymlink() {
			done = next
			continue
		}
		if links++; links > maxLinks {
			return "", fmt.Errorf("%q: too many symbolic links", p)
		}
		target, err := t.Readlink(next)
		if err != nil {
			return "", err
		}
		if strings.HasPrefix(target, "/") {
			done = "."
		}
		if rest = target + "/" + rest; len(rest) > 1<<16 {
			return "", fmt.Errorf("%q: its symbolic links are too long", p)
		}
	}
	return done, nil
}
