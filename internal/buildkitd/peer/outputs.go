package peer

import (
	"context"
	"io"
	"io/fs"
	"path"

	"github.com/moby/buildkit/session/filesync"
	"github.com/tonistiigi/fsutil"

	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/tree"
)

// Output is where the client takes the files of one output.
type Output struct {
	peer *Peer
	id   int
}

// Output returns where the output with that number, in the order of the request, goes.
func (p *Peer) Output(id int) *Output { return &Output{peer: p, id: id} }

// File opens the file that the client writes the output to.
func (o *Output) File(ctx context.Context, meta map[string]string) (io.WriteCloser, error) {
	c, err := o.peer.caller(ctx, "")
	if err != nil {
		return nil, err
	}
	return filesync.CopyFileWriter(ctx, meta, o.id, c)
}

// Tree has the client write a root file system into its directory.
func (o *Output) Tree(ctx context.Context, t tree.Tree) error {
	c, err := o.peer.caller(ctx, "")
	if err != nil {
		return err
	}
	return filesync.CopyToCaller(ctx, sent{t}, o.id, c, nil)
}

// sent is a tree as fsutil sends one.
type sent struct{ t tree.Tree }

// Walk implements fsutil.FS.
func (s sent) Walk(ctx context.Context, target string, fn fs.WalkDirFunc) error {
	links := map[uint64]string{}
	return tree.Walk(s.t, tree.Clean(target), func(p string, n tree.Node) error {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if p == "." {
			return nil
		}
		st, err := frontend.Stat(s.t, p, p, n)
		if err != nil {
			return err
		}
		if n.IsRegular() && n.Nlink > 1 && n.Inode != 0 {
			if first, ok := links[n.Inode]; ok {
				st.Linkname = first
			} else {
				links[n.Inode] = p
			}
		}
		return fn(p, &fsutil.DirEntryInfo{Stat: st}, nil)
	})
}

// Open implements fsutil.FS.
func (s sent) Open(p string) (io.ReadCloser, error) { return s.t.Open(path.Clean(p)) }
