package wire

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// side is one side of a connection that carries others: what it reads it hands to its relay.
type side struct {
	conn   *Conn
	relay  *Relay
	opened chan uint32
}

func sides(t *testing.T) (a, b *side) {
	t.Helper()
	ca, cb := net.Pipe()
	a, b = newSide(t, ca), newSide(t, cb)
	t.Cleanup(func() {
		ca.Close()
		cb.Close()
	})
	return a, b
}

func newSide(t *testing.T, c net.Conn) *side {
	s := &side{conn: NewConn(c), opened: make(chan uint32, 100)}
	s.relay = NewRelay(s.conn)
	go func() {
		for {
			ty, p, err := s.conn.Read()
			if err != nil {
				return
			}
			if ty == TypeOpen {
				n, _, err := ParseOpen(p)
				if err != nil {
					t.Error(err)
				}
				s.opened <- n
				continue
			}
			if err := s.relay.Frame(ty, p); err != nil {
				t.Error(err)
			}
		}
	}()
	return s
}

// pair are the two ends of a local stream that can be closed half.
func pair(t *testing.T) (ours net.Conn, theirs Stream) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if ours, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close() })
	return ours, c
}

// connect relays n between two local streams.
func connect(t *testing.T, a, b *side, n uint32) (guest, agent net.Conn) {
	t.Helper()
	guest, g := pair(t)
	agent, x := pair(t)
	if err := a.relay.Add(n, func() (Stream, error) { return g, nil }); err != nil {
		t.Fatal(err)
	}
	if err := b.relay.Add(n, func() (Stream, error) { return x, nil }); err != nil {
		t.Fatal(err)
	}
	return guest, agent
}

// TestRelay: bytes go both ways, an end of one direction leaves the other open, and
// connections do not mix.
func TestRelay(t *testing.T) {
	a, b := sides(t)
	var wg sync.WaitGroup
	for n := range uint32(10) {
		guest, agent := connect(t, a, b, n)
		question, answer := bytes.Repeat([]byte{byte(n)}, 200_000), bytes.Repeat([]byte{byte(n + 100)}, 300_000)
		wg.Add(2)
		go func() {
			defer wg.Done()
			got, err := io.ReadAll(agent) // to the end, which is before the answer
			if err != nil || !bytes.Equal(got, question) {
				t.Errorf("%d: the agent got %d bytes, %v", n, len(got), err)
			}
			agent.Write(answer)
			agent.Close()
		}()
		go func() {
			defer wg.Done()
			guest.Write(question)
			guest.(*net.TCPConn).CloseWrite()
			got, err := io.ReadAll(guest)
			if err != nil || !bytes.Equal(got, answer) {
				t.Errorf("%d: the guest got %d bytes, %v", n, len(got), err)
			}
			guest.Close()
		}()
	}
	wg.Wait()
	a.relay.Close()
	b.relay.Close()
	if len(a.relay.conns)+len(b.relay.conns) > 0 {
		t.Error("connections are left")
	}
}

// TestRelayBounds: too many connections are refused, and one that gets more than its agent
// takes is closed, while others go on.
func TestRelayBounds(t *testing.T) {
	a, b := sides(t)
	stuck, mine := net.Pipe() // nobody reads
	defer stuck.Close()
	if err := b.relay.Add(1, func() (Stream, error) { return mine, nil }); err != nil {
		t.Fatal(err)
	}
	if err := b.relay.Add(1, nil); err == nil {
		t.Error("two connections have one number")
	}
	for range 3 * maxQueued / MaxPiece {
		if err := a.conn.WriteConn(TypeData, 1, make([]byte, MaxPiece)); err != nil {
			t.Fatal(err)
		}
	}
	stuck.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := io.Copy(io.Discard, stuck); err != nil || n > 2*maxQueued+MaxPiece {
		t.Errorf("%d bytes, then %v, want the connection closed", n, err)
	}
	guest, agent := connect(t, a, b, 2)
	guest.Write([]byte("hello\n"))
	if got, err := io.ReadAll(io.LimitReader(agent, 6)); string(got) != "hello\n" {
		t.Error(got, err)
	}
	block := make(chan struct{})
	for n := range uint32(MaxConns + 1) {
		if err := b.relay.Add(n+10, func() (Stream, error) { <-block; return nil, errors.New("no agent") }); err != nil {
			if n < MaxConns-3 || !strings.Contains(err.Error(), "are open") {
				t.Errorf("%d: %v", n, err)
			}
			break
		} else if n == MaxConns {
			t.Error("any number of connections can be open")
		}
	}
	close(block)
	a.relay.Close()
	b.relay.Close()
	if err := b.relay.Add(500, nil); err == nil {
		t.Error("a closed relay takes connections")
	}
	for _, p := range []string{"", "abc"} {
		if err := b.relay.Frame(TypeData, []byte(p)); err == nil {
			t.Errorf("frame %q has no number and is taken", p)
		}
		if _, _, err := ParseOpen([]byte(p)); err == nil {
			t.Errorf("frame %q opens a connection", p)
		}
	}
	if _, _, err := ParseOpen(make([]byte, 9)); err == nil {
		t.Error("an open frame of 9 bytes is taken")
	}
}
