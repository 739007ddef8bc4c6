package sentry

import (
	"io"

	"gvisor.dev/gvisor/pkg/context"
	"gvisor.dev/gvisor/pkg/errors/linuxerr"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/pipefs"
	"gvisor.dev/gvisor/pkg/sentry/kernel"
	"gvisor.dev/gvisor/pkg/sentry/vfs"
	"gvisor.dev/gvisor/pkg/usermem"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/kiln-build/kiln/internal/sandbox/gvisor/wire"
)

// pump carries a step's output: a pipe of the guest's own, stdout and stderr
// in one, whose other end is read here. So no host descriptor is ever the
// guest's, opening /dev/stdout works as on Linux, and a session may have any
// number of steps (importing a host descriptor uses it up, and there is no
// dup(2) behind the seccomp filter).
type pump struct {
	read    *vfs.FileDescription
	ended   chan struct{} // closed when nobody is left who could write
	drained chan error
}

// newPump makes the pipe. The caller gets its writing end, and drops it when the process has it.
func (g *guest) newPump(ctx context.Context, out io.Writer) (*pump, *vfs.FileDescription, error) {
	r, w, err := pipefs.NewConnectedPipeFDs(ctx, g.kernel.PipeMount(), 0)
	if err != nil {
		return nil, nil, err
	}
	p := &pump{read: r, ended: make(chan struct{}), drained: make(chan error, 1)}
	go func() { p.drained <- p.run(g.ctx, out) }()
	return p, w, nil
}

// finish waits for the rest of the output. It must be called when all
// processes are gone: a writing end that still lives (in a message that
// nobody received, say) does not hold it up.
func (p *pump) finish(ctx context.Context) error {
	close(p.ended)
	err := <-p.drained
	p.read.DecRef(ctx)
	return err
}

func (p *pump) run(ctx context.Context, out io.Writer) error {
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents | waiter.EventHUp)
	if err := p.read.EventRegister(&entry); err != nil {
		return err
	}
	defer p.read.EventUnregister(&entry)
	buf := make([]byte, wire.MaxPiece)
	last := false
	for {
		n, err := p.read.Read(ctx, usermem.BytesIOSequence(buf), vfs.ReadOptions{})
		if n > 0 {
			if _, err := out.Write(buf[:n]); err != nil {
				return err
			}
			continue
		}
		switch {
		case err == nil || err == io.EOF:
			return nil
		case !linuxerr.Equals(linuxerr.ErrWouldBlock, err):
			return err
		case last:
			return nil
		}
		select {
		case <-ready:
		case <-p.ended:
			last = true
		}
	}
}

// newStdio makes the descriptors 0 (the guest's /dev/null), 1 and 2 (the pipe).
func (g *guest) newStdio(args *kernel.CreateProcessArgs, out io.Writer) (*kernel.FDTable, *pump, error) {
	ctx := args.NewContext(g.kernel)
	root := args.MountNamespace.Root(ctx)
	defer root.DecRef(ctx)
	null, err := g.openNull(root)
	if err != nil {
		return nil, nil, err
	}
	defer null.DecRef(ctx)
	p, w, err := g.newPump(ctx, out)
	if err != nil {
		return nil, nil, err
	}
	defer w.DecRef(ctx)
	t := g.kernel.NewFDTable()
	for fd, file := range []*vfs.FileDescription{null, w, w} {
		if _, err := t.NewFDAt(ctx, int32(fd), file, kernel.FDFlags{}); err != nil {
			t.DecRef(ctx)
			return nil, nil, err
		}
	}
	return t, p, nil
}
