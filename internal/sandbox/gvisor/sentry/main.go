package sentry

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/log"

	"github.com/kiln-build/kiln/internal/sandbox/gvisor/wire"
)

// Exit statuses of Main.
const (
	exitClosed = 0 // the builder closed the session, or is gone
	exitFailed = 1 // said over the control socket, if that was possible
)

// Main is the whole life of a sentry process: it reads its orders from the
// control socket until that is closed. It returns the exit status; the caller
// must exit with it, for there is no orderly teardown: the stub processes die
// with this one, and the memory is the host kernel's to free.
func Main() int {
	debug.SetTraceback("single")
	conn := wire.NewConn(blockingFD(wire.FDControl))
	var c wire.Config
	if err := conn.ReadJSON(wire.TypeConfig, &c); err != nil {
		return exitFailed
	}
	setLog(c.Debug)
	g, err := boot(&c)
	var b wire.Booted
	if err != nil {
		var p *platformError
		b.Error, b.Platform = err.Error(), errors.As(err, &p)
	}
	if err := conn.WriteJSON(wire.TypeBooted, b); err != nil || b.Error != "" {
		return exitFailed
	}
	// Not before: the boot's garbage is short-lived, and little.
	debug.SetGCPercent(gcPercent)
	return serve(g, conn)
}

// order is what the builder asks for, one thing at a time.
type order struct {
	process *wire.Process
	volume  *wire.Volume
}

// serve does what the builder asks for. Its frames are read in a goroutine of their
// own, so that the end of the stream ends this process even while a guest runs.
func serve(g *guest, conn *wire.Conn) int {
	orders := make(chan order)
	go func() {
		for {
			o, err := g.readOrder(conn)
			if err != nil {
				// Nobody is left to hear of it.
				os.Exit(exitClosed)
			}
			orders <- o
		}
	}()
	for o := range orders {
		var r wire.Result
		var err error
		changes := wire.Pieces{Conn: conn, Type: wire.TypeChanges}
		if o.process != nil {
			r, err = g.run(*o.process, conn, changes)
		} else {
			err = g.writeVolume(o.volume.Number, changes)
		}
		if err != nil {
			r = failed(err)
		}
		if err := conn.WriteJSON(wire.TypeResult, r); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return exitFailed
		}
	}
	return exitClosed
}

// failed tells of the sandbox's own failure.
func failed(err error) wire.Result {
	var m *mountError
	if errors.As(err, &m) {
		return wire.Result{Error: m.reason, Dest: wire.Text(m.dest)}
	}
	return wire.Result{Error: err.Error()}
}

// readOrder reads the next order. What comes for relayed connections in between goes
// to them.
func (g *guest) readOrder(conn *wire.Conn) (o order, err error) {
	for {
		t, b, err := conn.Read()
		if err != nil {
			return o, err
		}
		switch t {
		case wire.TypeProcess:
			o.process = &wire.Process{}
			return o, json.Unmarshal(b, o.process)
		case wire.TypeVolume:
			o.volume = &wire.Volume{}
			return o, json.Unmarshal(b, o.volume)
		case wire.TypeData, wire.TypeClose:
			if r := g.relay.Load(); r != nil {
				err = r.Frame(t, b)
			}
		default:
			err = fmt.Errorf("unexpected frame %q", t)
		}
		if err != nil {
			return o, err
		}
	}
}

// setLog sends gVisor's log to stderr, which the builder keeps the end of.
func setLog(verbose bool) {
	// Now, and not with the first line of the log: Go opens /etc/localtime when
	// it is first asked for a local time, and the seccomp filter kills for that.
	_, _ = time.Now().Zone()
	log.SetTarget(log.GoogleEmitter{Writer: &log.Writer{Next: blockingFD(2)}})
	log.SetLevel(log.Warning)
	if verbose {
		log.SetLevel(log.Debug)
	}
}

// blockingFD reads and writes a descriptor with just read(2) and write(2),
// which is what the seccomp filter allows, and outside of Go's poller.
type blockingFD int

// Read implements io.Reader.
func (f blockingFD) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	for {
		n, err := unix.Read(int(f), b)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}

// Write implements io.Writer.
func (f blockingFD) Write(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		n, err := unix.Write(int(f), b[done:])
		if err != nil && err != unix.EINTR {
			return done, err
		}
		done += max(n, 0)
	}
	return done, nil
}
