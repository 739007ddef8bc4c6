package frontend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"syscall"

	gateway "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/patternmatcher"
	fstypes "github.com/tonistiigi/fsutil/types"

	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/tree"
)

// MaxRead bounds what is read of one file at a time. The front end reads Dockerfiles and
// ignore files, of which it refuses more than 16 MiB; so do messages of the API.
const MaxRead = 16 << 20

// pathError is an error about a path as the system words it, and so BuildKit.
func pathError(op, name string, err error) error {
	var have *fs.PathError
	if errors.As(err, &have) {
		err = have.Err
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = syscall.ENOENT
	}
	return &fs.PathError{Op: op, Path: name, Err: err}
}

// lookup finds a path in a root file system, following all links inside of it.
func lookup(t tree.Tree, op, name string) (string, tree.Node, error) {
	p, err := rootfs.Resolve(t, tree.Clean(name), true)
	if err != nil {
		return "", tree.Node{}, pathError(op, name, err)
	}
	n, err := t.Lstat(p)
	if err != nil {
		return "", tree.Node{}, pathError(op, name, err)
	}
	return p, n, nil
}

// ReadFile reads a regular file of a root file system, or a part of it.
func ReadFile(t tree.Tree, req gateway.ReadRequest) ([]byte, error) {
	p, n, err := lookup(t, "open", req.Filename)
	if err != nil {
		return nil, err
	}
	if !n.IsRegular() {
		return nil, fmt.Errorf("open %s: not a regular file", req.Filename)
	}
	f, err := t.Open(p)
	if err != nil {
		return nil, pathError("open", req.Filename, err)
	}
	defer f.Close()
	off, length := int64(0), int64(MaxRead+1)
	if rg := req.Range; rg != nil {
		if rg.Offset < 0 || rg.Length < 0 {
			return nil, fmt.Errorf("invalid range for %s", req.Filename)
		}
		off, length = int64(rg.Offset), min(int64(rg.Length), MaxRead+1)
	}
	if _, err := io.CopyN(io.Discard, f, off); err != nil && err != io.EOF {
		return nil, fmt.Errorf("read %s: %w", req.Filename, err)
	}
	b, err := io.ReadAll(io.LimitReader(f, length))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", req.Filename, err)
	}
	if len(b) > MaxRead && (req.Range == nil || req.Range.Length > MaxRead+1) {
		return nil, fmt.Errorf("%s exceeds maximum allowed size of %d bytes", req.Filename, MaxRead)
	}
	return b, nil
}

// StatFile describes a path of a root file system.
func StatFile(t tree.Tree, req gateway.StatRequest) (*fstypes.Stat, error) {
	p, n, err := lookup(t, "lstat", req.Path)
	if err != nil {
		return nil, err
	}
	return Stat(t, p, path.Base(p), n)
}

// ReadDir describes the entries of a directory of a root file system.
func ReadDir(ctx context.Context, t tree.Tree, req gateway.ReadDirRequest) ([]*fstypes.Stat, error) {
	p, n, err := lookup(t, "open", req.Path)
	if err != nil {
		return nil, err
	}
	if !n.IsDir() {
		return nil, pathError("readdirent", req.Path, syscall.ENOTDIR)
	}
	es, err := t.ReadDir(p)
	if err != nil {
		return nil, pathError("open", req.Path, err)
	}
	var out []*fstypes.Stat
	for _, e := range es {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if ok, err := included(req.IncludePattern, e.Name); err != nil || !ok {
			if err != nil {
				return nil, err
			}
			continue
		}
		st, err := Stat(t, path.Join(p, e.Name), e.Name, e.Node)
		if err != nil {
			return nil, err
		}
		out = append(out, st)
	}
	return out, nil
}

func included(pattern, name string) (bool, error) {
	if pattern == "" {
		return true, nil
	}
	m, err := patternmatcher.New([]string{pattern})
	if err != nil {
		return false, fmt.Errorf("pattern %q: %w", pattern, err)
	}
	return m.MatchesOrParentMatches(name)
}

// Stat is a node of t as BuildKit's clients have it, to be known as name.
func Stat(t tree.Tree, p, name string, n tree.Node) (*fstypes.Stat, error) {
	st := &fstypes.Stat{
		Path: name, Mode: uint32(Mode(n)), Uid: n.UID, Gid: n.GID, Size: n.Size, ModTime: n.MTime.UnixNano(),
		Devmajor: int64(n.Major), Devminor: int64(n.Minor),
	}
	if n.IsSymlink() {
		target, err := t.Readlink(p)
		if err != nil {
			return nil, pathError("readlink", name, err)
		}
		st.Linkname, st.Size = target, int64(len(target))
	}
	for k, v := range n.Xattr {
		if st.Xattrs == nil {
			st.Xattrs = map[string][]byte{}
		}
		st.Xattrs[k] = []byte(v)
	}
	return st, nil
}

// Mode is a node's mode in Go's terms.
func Mode(n tree.Node) fs.FileMode {
	m := fs.FileMode(n.Mode & 0o777)
	for bit, mode := range map[uint32]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if n.Mode&bit != 0 {
			m |= mode
		}
	}
	switch n.Mode & tree.ModeType {
	case tree.ModeDir:
		m |= fs.ModeDir
	case tree.ModeSymlink:
		m |= fs.ModeSymlink
	case tree.ModeChar:
		m |= fs.ModeDevice | fs.ModeCharDevice
	case tree.ModeBlock:
		m |= fs.ModeDevice
	case tree.ModeFIFO:
		m |= fs.ModeNamedPipe
	case tree.ModeSocket:
		m |= fs.ModeSocket
	}
	return m
}
