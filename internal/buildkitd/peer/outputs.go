package peer

import (
	"context"
	"io"
	"io/fs"
	"path"

	"github.com/moby/buildkit/session/filesync"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/tonistiigi/fsutil"
	"google.golang.org/grpc/codes"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/tree"
)

// output is where the client takes the files of one output.
type output struct {
	peer *Peer
	id   int
}

// Output returns where the output with that number, in the order of the request, goes.
func (p *Peer) Output(id int, s export.Spec) (build.Destination, error) {
	if s.Dir {
		return p.storeOutput(id, s)
	}
	o := &output{peer: p, id: id}
	c, err := p.caller(p.ctx, "")
	if err != nil {
		return nil, err
	}
	if !supports(c, filesync.FileSend_ServiceDesc.ServiceName, "DiffCopy") {
		return nil, diag.New(diag.ExitUsage, "exporter %s: the client takes no files", s.Type)
	}
	return o, nil
}

// File opens the file that the client writes the output to.
func (o *output) File(ctx context.Context, meta map[string]string) (io.WriteCloser, error) {
	c, err := o.peer.caller(ctx, "")
	if err != nil {
		return nil, err
	}
	w, err := filesync.CopyFileWriter(ctx, meta, o.id, c)
	if err != nil {
		return nil, err
	}
	return &fileOfClient{WriteCloser: w}, nil
}

// fileOfClient is a file that the client may not want: it says that it exists already.
type fileOfClient struct {
	io.WriteCloser
	unwanted bool
}

// Write implements io.Writer.
func (f *fileOfClient) Write(p []byte) (int, error) {
	if f.unwanted {
		return len(p), nil
	}
	n, err := f.WriteCloser.Write(p)
	if f.unwanted = grpcerrors.Code(err) == codes.AlreadyExists; f.unwanted {
		return len(p), nil
	}
	return n, err
}

// Close implements io.Closer.
func (f *fileOfClient) Close() error {
	err := f.WriteCloser.Close()
	if f.unwanted || grpcerrors.Code(err) == codes.AlreadyExists {
		return nil
	}
	return err
}

// Tree has the client write a root file system into its directory. All platforms' files come in one
// transfer, as clients want it that delete what else is there.
func (o *output) Tree(ctx context.Context, t tree.Tree) error {
	c, err := o.peer.caller(ctx, "")
	if err != nil {
		return err
	}
	return filesync.CopyToCaller(ctx, sent{t}, o.id, c, nil, filesync.WithExporterMultiPlatformTransfer())
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
