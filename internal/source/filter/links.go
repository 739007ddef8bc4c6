package filter

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"syscall"

	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"

	"github.com/kiln-build/kiln/internal/tree"
)

// linkFS shows a tree to fsutil.FollowLinks, which walks single files and one
// level of directories, and wants to know no more than type and link target.
type linkFS struct{ t tree.Tree }

func (l linkFS) Open(p string) (io.ReadCloser, error) { return l.t.Open(p) }

// Walk calls fn for target and for the entries of it, if it is a directory.
// The root is not an entry.
func (l linkFS) Walk(_ context.Context, target string, fn fs.WalkDirFunc) error {
	target = tree.Clean(target)
	if target != "." {
		n, err := l.t.Lstat(target)
		if err != nil {
			return err
		}
		e, err := l.entry(target, n)
		if err == nil {
			err = fn(target, e, nil)
		}
		// A target that is not what fn expected is told apart by what fn saw.
		if errors.Is(err, fs.SkipDir) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
			return nil
		}
		if err != nil || !n.IsDir() {
			return err
		}
	}
	es, err := l.t.ReadDir(target)
	if err != nil {
		return err
	}
	for _, c := range es {
		p := path.Join(target, c.Name)
		e, err := l.entry(p, c.Node)
		if err == nil {
			err = fn(p, e, nil)
		}
		if err != nil && !errors.Is(err, fs.SkipDir) {
			return err
		}
	}
	return nil
}

func (l linkFS) entry(p string, n tree.Node) (fs.DirEntry, error) {
	st := &types.Stat{Path: p, Mode: n.Mode & uint32(fs.ModePerm)}
	switch {
	case n.IsDir():
		st.Mode |= uint32(os.ModeDir)
	case n.IsSymlink():
		st.Mode |= uint32(os.ModeSymlink)
		target, err := l.t.Readlink(p)
		if err != nil {
			return nil, err
		}
		st.Linkname = target
	case !n.IsRegular():
		st.Mode |= uint32(os.ModeIrregular)
	}
	return &fsutil.DirEntryInfo{Stat: st}, nil
}
