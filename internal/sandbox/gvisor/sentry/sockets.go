package sentry

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/context"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/tmpfs"
	"gvisor.dev/gvisor/pkg/sentry/socket/unix/transport"
	"gvisor.dev/gvisor/pkg/sentry/vfs"
	"gvisor.dev/gvisor/pkg/syserr"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/kiln-build/kiln/internal/sandbox/gvisor/wire"
)

// listener is a Unix socket on which the sentry itself accepts connections, to relay
// them to the builder.
type listener struct {
	ep    transport.Endpoint
	mount int // its number
}

// newSocket makes a listener, and a mount of its file.
func (g *guest) newSocket(number int, m *wire.Mount) (*vfs.Mount, *listener, error) {
	ep := transport.NewConnectioned(g.ctx, linux.SOCK_STREAM, g.kernel)
	bound, ok := ep.(transport.BoundEndpoint)
	if !ok {
		return nil, nil, fmt.Errorf("a socket of type %T cannot be bound", ep)
	}
	dir, err := g.mount(tmpfs.Name, withData("mode=0700"))
	if err != nil {
		return nil, nil, err
	}
	defer dir.DecRef(g.ctx)
	file := at(rootOf(dir), "socket")
	if err := g.vfs.MknodAt(g.ctx, g.root, file, &vfs.MknodOptions{Mode: linux.S_IFSOCK, Endpoint: bound}); err != nil {
		return nil, nil, err
	}
	if err := g.setOwner(file, m); err != nil {
		return nil, nil, err
	}
	if err := ep.Bind(transport.Address{Addr: string(m.Dest)}); err != nil {
		return nil, nil, err.ToError()
	}
	if err := ep.Listen(g.ctx, wire.MaxConns); err != nil {
		return nil, nil, err.ToError()
	}
	shown, err := g.show(file, &vfs.MountOptions{})
	return shown, &listener{ep, number}, err
}

// relays accepts and relays connections while a process runs.
type relays struct {
	listeners []*listener
	relay     *wire.Relay
	next      atomic.Uint32 // number of a connection
	ended     chan struct{}
	accepting sync.WaitGroup
}

// startRelays begins to accept on the step's sockets.
func (g *guest) startRelays(ls []*listener, conn *wire.Conn) *relays {
	r := &relays{listeners: ls, relay: wire.NewRelay(conn), ended: make(chan struct{})}
	g.relay.Store(r.relay)
	for _, l := range ls {
		r.accepting.Add(1)
		go func() {
			defer r.accepting.Done()
			r.accept(g.ctx, l, conn)
		}()
	}
	return r
}

// stop closes everything and returns when nothing more is sent.
func (r *relays) stop(g *guest) {
	close(r.ended)
	for _, l := range r.listeners {
		l.ep.Close(g.ctx)
	}
	r.accepting.Wait()
	r.relay.Close()
	g.relay.Store(nil)
}

func (r *relays) accept(ctx context.Context, l *listener, conn *wire.Conn) {
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents)
	if err := l.ep.EventRegister(&entry); err != nil {
		return
	}
	defer l.ep.EventUnregister(&entry)
	for {
		ep, err := l.ep.Accept(ctx, nil)
		switch {
		case err == nil:
			r.add(ctx, ep, l, conn)
			continue
		case err != syserr.ErrWouldBlock:
			return // closed
		}
		select {
		case <-ready:
		case <-r.ended:
			return
		}
	}
}

// add announces a connection to the builder and relays it. Too many are closed at once.
func (r *relays) add(ctx context.Context, ep transport.Endpoint, l *listener, conn *wire.Conn) {
	n := r.next.Add(1)
	s := newEndpointStream(ctx, ep)
	announced := make(chan error, 1)
	err := r.relay.Add(n, func() (wire.Stream, error) {
		if err := <-announced; err != nil {
			s.Close()
			return nil, err
		}
		return s, nil
	})
	if err != nil {
		s.Close()
		return
	}
	// After Add, which may refuse; before the first byte, which waits for it.
	announced <- conn.WriteConn(wire.TypeOpen, n, binary.BigEndian.AppendUint32(nil, uint32(l.mount)))
}

// endpointStream makes of a Unix socket's end, which never blocks, a stream that does.
type endpointStream struct {
	ctx    context.Context
	ep     transport.Endpoint
	entry  waiter.Entry
	change sync.Cond // the end may have become readable or writable
	mu     sync.Mutex
	events int
	closed bool
}

func newEndpointStream(ctx context.Context, ep transport.Endpoint) *endpointStream {
	s := &endpointStream{ctx: ctx, ep: ep}
	s.change.L = &s.mu
	s.entry.Init(s, waiter.ReadableEvents|waiter.WritableEvents|waiter.EventHUp|waiter.EventErr)
	_ = ep.EventRegister(&s.entry) // of these ends it never fails
	return s
}

// NotifyEvent implements waiter.EventListener.
func (s *endpointStream) NotifyEvent(waiter.EventMask) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events++
	s.change.Broadcast()
}

// seen is a number that changes with every event; ok is false once the stream is closed.
func (s *endpointStream) seen() (n int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.events, !s.closed
}

// wait waits for an event after those that were seen.
func (s *endpointStream) wait(seen int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.events == seen && !s.closed {
		s.change.Wait()
	}
}

// Read implements io.Reader.
func (s *endpointStream) Read(b []byte) (int, error) {
	for {
		seen, ok := s.seen()
		if !ok {
			return 0, io.EOF
		}
		out, notify, err := s.ep.RecvMsg(s.ctx, [][]byte{b}, transport.RecvArgs{})
		if notify != nil {
			notify()
		}
		// Descriptors that the guest sent along are nobody's.
		out.Control.Release(s.ctx)
		for _, r := range out.UnusedRights {
			r.Release(s.ctx)
		}
		switch {
		case err == syserr.ErrWouldBlock:
			s.wait(seen)
		case err != nil || out.RecvLen == 0:
			return 0, io.EOF
		default:
			return int(out.RecvLen), nil
		}
	}
}

// Write implements io.Writer.
func (s *endpointStream) Write(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		seen, ok := s.seen()
		if !ok {
			return done, io.ErrClosedPipe
		}
		n, notify, err := s.ep.SendMsg(s.ctx, [][]byte{b[done:]}, transport.ControlMessages{}, nil)
		if notify != nil {
			notify()
		}
		done += int(n)
		switch {
		case err == nil:
		case err == syserr.ErrWouldBlock:
			s.wait(seen)
		default:
			return done, err.ToError()
		}
	}
	return done, nil
}

// CloseWrite lets the guest read to the end, and send more.
func (s *endpointStream) CloseWrite() error {
	if err := s.ep.Shutdown(tcpip.ShutdownWrite); err != nil {
		return err.ToError()
	}
	return nil
}

// Close implements io.Closer.
func (s *endpointStream) Close() error {
	s.mu.Lock()
	was := s.closed
	s.closed = true
	s.change.Broadcast()
	s.mu.Unlock()
	if !was {
		s.ep.EventUnregister(&s.entry)
		s.ep.Close(s.ctx)
	}
	return nil
}
