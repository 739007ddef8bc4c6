package layer

import (
	"context"
	"fmt"
	"io"

	"github.com/kiln-build/kiln/internal/tree"
)

// WriteTar writes the layer's canonical tar to w: the very bytes that the layer
// file was made from, if those were canonical (TarWriter's).
func (r *Reader) WriteTar(ctx context.Context, w io.Writer) error {
	tw := NewTarWriter(w)
	left := r.ft.entries + 1
	err := tree.Walk(r, ".", func(p string, n tree.Node) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if left--; left < 0 {
			return damaged("there are more entries than the footer says")
		}
		if n.Xattr[XattrImplied] == "y" {
			return tw.opaque(p, n)
		}
		var target string
		if n.IsSymlink() {
			var err error
			if target, err = r.Readlink(p); err != nil {
				return err
			}
		}
		return tw.Add(p, n, target, func() (io.ReadCloser, error) {
			f, err := r.Open(p)
			if err != nil {
				return nil, err
			}
			return struct {
				io.Reader
				io.Closer
			}{cancellable(ctx, f), f}, nil
		})
	})
	if err != nil {
		return fmt.Errorf("write layer's tar: %w", err)
	}
	return tw.Close()
}
