package wire

import (
	"errors"
	"fmt"
	"io"
	"sync"
)

// Bounds of relayed connections. They are for agents, which exchange short messages: who
// sends more than the other side takes loses the connection.
const (
	MaxConns  = 64
	maxQueued = 1 << 20
)

// Stream is a connection on one side. If it has CloseWrite, that is called when the
// other side has no more to send; else Close.
type Stream interface{ io.ReadWriteCloser }

// Relay carries connections over a Conn. Each side has one, and whoever reads from the
// Conn hands it the frames. Safe for concurrent use.
type Relay struct {
	conn *Conn
	wg   sync.WaitGroup

	mu     sync.Mutex
	conns  map[uint32]*relayed
	closed bool
}

// relayed is one connection.
type relayed struct {
	n    uint32
	conn *Conn

	mu     sync.Mutex
	change sync.Cond // of what follows
	queue  []byte    // from the other side, for stream
	ended  bool      // the other side sends no more
	closed bool
	stream Stream // nil until it is open
}

// NewRelay returns a Relay that sends over c.
func NewRelay(c *Conn) *Relay { return &Relay{conn: c, conns: map[uint32]*relayed{}} }

// Add begins to relay connection n, whose stream open makes. It does not wait for that.
func (r *Relay) Add(n uint32, open func() (Stream, error)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.closed:
		return errors.New("relay connection: the step is over")
	case len(r.conns) >= MaxConns:
		return fmt.Errorf("relay connection: %d are open", len(r.conns))
	case r.conns[n] != nil:
		return fmt.Errorf("relay connection: there is a number %d already", n)
	}
	c := &relayed{n: n, conn: r.conn}
	c.change.L = &c.mu
	r.conns[n] = c
	r.wg.Add(1)
	go func() {
		defer r.wg.Done()
		c.run(open)
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.conns, n)
	}()
	return nil
}

// Frame takes in what the other side sent of its connections: a TypeData or
// TypeClose. It does not wait for the stream.
func (r *Relay) Frame(t Type, payload []byte) error {
	n, b, err := ParseConn(payload)
	if err != nil {
		return err
	}
	r.mu.Lock()
	c := r.conns[n]
	r.mu.Unlock()
	if c == nil {
		return nil // gone already on this side
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = c.ended || t == TypeClose
	if c.queue = append(c.queue, b...); len(c.queue) > maxQueued {
		c.close()
	}
	c.change.Broadcast()
	return nil
}

// Close closes all connections and returns when nothing more is sent for them.
func (r *Relay) Close() {
	r.mu.Lock()
	r.closed = true
	for _, c := range r.conns {
		c.mu.Lock()
		c.close()
		c.mu.Unlock()
	}
	r.mu.Unlock()
	r.wg.Wait()
}

// close closes the stream. The caller holds c.mu.
func (c *relayed) close() {
	if !c.closed && c.stream != nil {
		c.stream.Close()
	}
	c.closed = true
	c.queue = nil
	c.change.Broadcast()
}

// run relays in both directions until both have ended.
func (c *relayed) run(open func() (Stream, error)) {
	s, err := open()
	if err != nil {
		_ = c.conn.WriteConn(TypeClose, c.n, nil)
		return
	}
	c.mu.Lock()
	c.stream = s
	if c.closed {
		s.Close()
	}
	c.mu.Unlock()
	var sending sync.WaitGroup
	sending.Add(1)
	go func() {
		defer sending.Done()
		c.send(s)
	}()
	c.receive(s)
	sending.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.close()
}

// send reads from the stream.
func (c *relayed) send(s Stream) {
	buf := make([]byte, 32<<10)
	for {
		n, err := s.Read(buf)
		if n > 0 && c.conn.WriteConn(TypeData, c.n, buf[:n]) != nil {
			return
		}
		if err != nil {
			_ = c.conn.WriteConn(TypeClose, c.n, nil)
			return
		}
	}
}

// receive writes to the stream what the other side sends.
func (c *relayed) receive(s Stream) {
	for {
		b, ok := c.next()
		if !ok {
			break
		}
		if _, err := s.Write(b); err != nil {
			break
		}
	}
	if w, ok := s.(interface{ CloseWrite() error }); ok {
		_ = w.CloseWrite()
		return
	}
	s.Close()
}

// next waits for more of the queue.
func (c *relayed) next() ([]byte, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.queue) == 0 && !c.ended && !c.closed {
		c.change.Wait()
	}
	b := c.queue
	c.queue = nil
	return b, len(b) > 0
}
