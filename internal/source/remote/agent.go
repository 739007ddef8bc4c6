package remote

import (
	"context"
	"io"
	"net"
	"path/filepath"
	"sync"
)

// agentSocket is a socket on which an ssh client finds an agent.
type agentSocket struct {
	path string
	l    net.Listener
	stop context.CancelFunc
	wg   sync.WaitGroup
}

// listenAgent makes a socket in dir, which is the user's alone, for the agent with the ID.
func listenAgent(ctx context.Context, agents SSH, id, dir string) (*agentSocket, error) {
	// Now, and not when ssh asks, it can be said that there is none.
	c, err := agents.DialAgent(ctx, id)
	if err != nil {
		return nil, err
	}
	if err := c.Close(); err != nil {
		return nil, err
	}
	s := &agentSocket{path: filepath.Join(dir, "agent.sock")}
	if s.l, err = (&net.ListenConfig{}).Listen(ctx, "unix", s.path); err != nil {
		return nil, err
	}
	ctx, s.stop = context.WithCancel(context.WithoutCancel(ctx))
	s.wg.Go(func() { s.serve(ctx, agents, id) })
	return s, nil
}

func (s *agentSocket) serve(ctx context.Context, agents SSH, id string) {
	for {
		c, err := s.l.Accept()
		if err != nil {
			return // closed
		}
		s.wg.Go(func() {
			defer c.Close()
			if a, err := agents.DialAgent(ctx, id); err == nil {
				relay(ctx, c, a)
			}
		})
	}
}

// relay copies both ways until either side ends, or ctx does.
func relay(ctx context.Context, a, b net.Conn) {
	both := func() { a.Close(); b.Close() }
	defer both()
	defer context.AfterFunc(ctx, both)()
	done := make(chan struct{}, 2)
	for _, c := range [][2]net.Conn{{a, b}, {b, a}} {
		go func() {
			_, _ = io.Copy(c[0], c[1])
			done <- struct{}{}
		}()
	}
	<-done
	both()
	<-done
}

func (s *agentSocket) close() {
	s.stop()
	s.l.Close()
	s.wg.Wait()
}
