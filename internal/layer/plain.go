package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
)

// ConvertPlain is Convert for a tar that is no layer but just files, a build
// context for one: names that begin with ".wh." are names like any other. What
// Open then reads must not be written as a layer before those are dealt with.
// A character device 0:0 is one all the same.
func ConvertPlain(ctx context.Context, r io.Reader, f *os.File, lim Limits) (Info, error) {
	return convertTar(ctx, r, f, lim, true)
}

// parseName is the function parseName, unless names are plain.
func (b *builder) parseName(name string) (dir, base string, kind entryKind, err error) {
	if !b.plain {
		return parseName(name)
	}
	if strings.IndexByte(name, 0) >= 0 {
		return "", "", 0, errors.New("name has a NUL byte")
	}
	p := "" // as in parseName: a megabyte of PAX name is not even cleaned
	if len(name) <= 4*maxPath {
		p = strings.TrimPrefix(path.Clean("/"+name), "/")
	}
	if len(name) > 4*maxPath || len(p) > maxPath {
		return "", "", 0, fmt.Errorf("name is longer than %d bytes", maxPath)
	}
	if p == "" {
		return "", "", kindIgnored, nil
	}
	dir, base = path.Split(p)
	return strings.TrimSuffix(dir, "/"), base, kindNode, b.checkComponent(base)
}

// checkComponent is the function checkComponent, unless names are plain.
func (b *builder) checkComponent(c string) error {
	if b.plain {
		return checkName(c)
	}
	return checkComponent(c)
}
