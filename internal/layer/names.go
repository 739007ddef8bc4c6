package layer

import (
	"errors"
	"fmt"
	"path"
	"strings"
)

// entryKind is what a name in a layer's tar stands for.
type entryKind int

const (
	kindNode     entryKind = iota // a file, directory, …
	kindWhiteout                  // hides base in lower layers
	kindOpaque                    // hides all that lower layers have in dir
	kindIgnored                   // AUFS's own files, and the root
)

// parseName splits the name of an entry into the directory, cleaned and without
// a slash at its start (empty: the root), and the name in it, a whiteout's
// without its prefix. A name never leads out of the root: "/a", "../a" and
// "a" are one, as in containerd.
func parseName(name string) (dir, base string, kind entryKind, err error) {
	if strings.IndexByte(name, 0) >= 0 {
		return "", "", 0, errors.New("name has a NUL byte")
	}
	// path.Clean's cost is linear; still, do not let a megabyte of PAX name get far.
	if len(name) > 4*maxPath {
		return "", "", 0, fmt.Errorf("name is longer than %d bytes", maxPath)
	}
	p := strings.TrimPrefix(path.Clean("/"+name), "/")
	if len(p) > maxPath {
		return "", "", 0, fmt.Errorf("name is longer than %d bytes", maxPath)
	}
	if p == "" {
		return "", "", kindIgnored, nil
	}
	dir, base = path.Split(p)
	dir = strings.TrimSuffix(dir, "/")
	// AUFS kept its own state in the root of old layers: .wh..wh.plnk/, .wh..wh.aufs, …
	if first, _, _ := strings.Cut(p, "/"); first != whiteoutOpaque && strings.HasPrefix(first, whiteoutPrefix+whiteoutPrefix) {
		return "", "", kindIgnored, nil
	}
	if base == whiteoutOpaque {
		return dir, "", kindOpaque, nil
	}
	if hidden, ok := strings.CutPrefix(base, whiteoutPrefix); ok {
		if err := checkComponent(hidden); err != nil {
			return "", "", 0, fmt.Errorf("invalid whiteout: %w", err)
		}
		return dir, hidden, kindWhiteout, nil
	}
	return dir, base, kindNode, checkComponent(base)
}

// checkComponent refuses what cannot be one name in a directory of a layer.
func checkComponent(c string) error {
	if strings.HasPrefix(c, whiteoutPrefix) {
		return fmt.Errorf("file name %q begins with %q, which image layers reserve for deletions", c, whiteoutPrefix)
	}
	return checkName(c)
}

// checkName refuses what cannot be one name in any directory.
func checkName(c string) error {
	switch {
	case c == "" || c == "." || c == "..":
		return fmt.Errorf("%q is no file name", c)
	case len(c) > maxName:
		return fmt.Errorf("file name %.32q… is longer than %d bytes", c, maxName)
	case strings.ContainsAny(c, "/\x00"):
		return fmt.Errorf("%q is no file name", c)
	}
	return nil
}
