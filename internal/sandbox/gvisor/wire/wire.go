// Package wire is the protocol between the builder and a sentry: frames over
// one stream socket, in both directions.
//
// A frame is a type, a length (big endian) and that many bytes. The builder
// sends a Config, then one Process for every step. The sentry answers the
// Config with one Booted, and every Process with any number of Output frames,
// then, if it succeeded, any number of Changes frames, then one Result. After
// that the builder may ask for the changes of volumes, with a Volume each, which the
// sentry answers with Changes frames and a Result.
// As nothing but a Result ends an order, a stream that was torn is never taken
// for a whole one.
//
// While a process runs, its connections to sockets of the session are relayed in
// frames of both sides: the sentry opens a connection, both send Data, both Close.
//
// A guest that has broken out of its kernel could write frames: reading them
// allocates no more than MaxPayload and never panics.
package wire

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"sync"
)

// Type says what a frame carries.
type Type byte

// The types of frames.
const (
	TypeConfig  Type = 'C' // builder: Config, JSON
	TypeProcess Type = 'P' // builder: Process, JSON
	TypeVolume  Type = 'V' // builder: Volume, JSON: its changes are wanted
	TypeBooted  Type = 'B' // sentry: Booted, JSON
	TypeOutput  Type = 'o' // sentry: bytes of stdout and stderr
	TypeChanges Type = 'c' // sentry: bytes of the layer tar
	TypeResult  Type = 'R' // sentry: Result, JSON
	TypeOpen    Type = 'O' // sentry: a connection's number, and that of the mount it is to
	TypeData    Type = 'd' // both: a connection's number, and bytes
	TypeClose   Type = 'x' // both: a connection's number; nothing comes after it
)

// MaxPayload bounds a frame. Config, with the supplied files in it, is what
// may become large; the content of output and changes comes in pieces.
const MaxPayload = 16 << 20

// MaxPiece is how much output or tar goes into one frame.
const MaxPiece = 128 << 10

const headerSize = 5

// Descriptors that a sentry inherits beside 0, 1 and 2.
const (
	FDControl = 3 // the socket that this protocol runs over
	FDUpper   = 4 // the file behind the upper layer
	FDLayers  = 5 // the first of the layer files: the root's, the bottom first, then others of mounts
)

// Text is a string that need not be UTF-8, as file names and environments.
type Text []byte

// Texts converts strings.
func Texts(ss []string) []Text {
	r := make([]Text, len(ss))
	for i, s := range ss {
		r[i] = Text(s)
	}
	return r
}

// Strings converts back.
func Strings(ts []Text) []string {
	r := make([]string, len(ts))
	for i, t := range ts {
		r[i] = string(t)
	}
	return r
}

// File is a file shown over the image's.
type File struct {
	Path    Text
	Content []byte
}

// Config describes a session. Descriptors are those that the process inherited.
type Config struct {
	Platform string // "systrap" or "ptrace"
	Layers   int    // number of the root's layer files, from FDLayers on
	Others   int    // number of layer files after those, which only mounts have
	Network  bool
	Hostname string
	// ReadOnlyRoot: processes cannot write to the root file system.
	ReadOnlyRoot bool
	Files        []File
	Volumes      [][]int // for each volume numbers of layer files, counted from FDLayers
	Mounts       []Mount
	SelfTest     bool // run a trivial program before saying Booted
	Debug        bool // log as much as gVisor can
}

// Kind says what a Mount shows.
type Kind string

// The kinds of mounts.
const (
	KindVolume Kind = "volume" // Volume, Source, Writable
	KindTmpfs  Kind = "tmpfs"  // Size, Writable
	KindFile   Kind = "file"   // Content, Mode, UID, GID
	KindSocket Kind = "socket" // Mode, UID, GID
)

// Mount is a sandbox.Mount.
type Mount struct {
	Kind     Kind
	Dest     Text
	Volume   int // number of the volume
	Source   Text
	Writable bool
	Size     int64
	Content  []byte
	Mode     uint32
	UID      uint32
	GID      uint32
}

// Process is one step.
type Process struct {
	Args    []Text
	Env     []Text
	Cwd     Text
	UID     uint32
	GID     uint32
	Groups  []uint32
	Success []int // empty: 0 alone
	Limits  []Limit
}

// Limit is a sandbox.Limit.
type Limit struct {
	Resource   int
	Soft, Hard uint64
}

// Volume asks for what the last process changed in a volume.
type Volume struct{ Number int }

// Booted is a sentry's first word.
type Booted struct {
	Error string // why it could not boot; empty: it did
	// Platform: the error has to do with this machine, and not with the Config.
	Platform bool
}

// Result ends an order.
type Result struct {
	Code     int    // exit status, 128+Signal if killed
	Signal   int    // 0 unless killed by a signal
	Failed   bool   // the process did not succeed; else its changes were sent
	NotFound bool   // there was nothing to execute
	DiskFull bool   // the upper layer has no space left
	Detail   string // one more sentence for the user
	// Error: the sandbox itself failed, nothing else here but Dest is valid.
	Error string
	// Dest is the place of the mount that could not be made, if Error is about one.
	Dest Text
}

// Conn frames a stream. One goroutine may read while others write.
type Conn struct {
	rw     io.ReadWriter
	header [headerSize]byte
	buf    []byte

	writing sync.Mutex
}

// NewConn frames rw.
func NewConn(rw io.ReadWriter) *Conn { return &Conn{rw: rw} }

// Write writes a frame.
func (c *Conn) Write(t Type, payload []byte) error {
	if len(payload) > MaxPayload {
		return fmt.Errorf("write frame %q: %d bytes are more than the %d allowed", t, len(payload), MaxPayload)
	}
	b := make([]byte, headerSize, headerSize+len(payload))
	b[0] = byte(t)
	binary.BigEndian.PutUint32(b[1:], uint32(len(payload)))
	c.writing.Lock()
	defer c.writing.Unlock()
	if _, err := c.rw.Write(append(b, payload...)); err != nil {
		return fmt.Errorf("write frame %q: %w", t, err)
	}
	return nil
}

// WriteJSON writes a frame that carries v.
func (c *Conn) WriteJSON(t Type, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write frame %q: %w", t, err)
	}
	return c.Write(t, b)
}

// Read reads a frame. The payload is valid until the next call. The error is
// io.EOF if the stream ended between two frames.
func (c *Conn) Read() (Type, []byte, error) {
	if _, err := io.ReadFull(c.rw, c.header[:]); err != nil {
		if err == io.EOF {
			return 0, nil, err
		}
		return 0, nil, fmt.Errorf("read frame: %w", err)
	}
	t, n := Type(c.header[0]), binary.BigEndian.Uint32(c.header[1:])
	if n > MaxPayload {
		return 0, nil, fmt.Errorf("read frame %q: %d bytes are more than the %d allowed", t, n, MaxPayload)
	}
	if uint32(cap(c.buf)) < n {
		c.buf = make([]byte, n)
	}
	b := c.buf[:n]
	if _, err := io.ReadFull(c.rw, b); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, fmt.Errorf("read frame %q: %w", t, err)
	}
	return t, b, nil
}

// ReadJSON reads a frame that must be of type t into v.
func (c *Conn) ReadJSON(t Type, v any) error {
	got, b, err := c.Read()
	if err != nil {
		return err
	}
	if got != t {
		return fmt.Errorf("read frame %q: got %q", t, got)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("read frame %q: %w", t, err)
	}
	return nil
}

// WriteConn writes a frame about connection n, with whatever follows its number.
func (c *Conn) WriteConn(t Type, n uint32, b []byte) error {
	return c.Write(t, append(binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(b)), n), b...))
}

// ParseConn splits the payload of a frame about a connection.
func ParseConn(b []byte) (n uint32, rest []byte, err error) {
	if len(b) < 4 {
		return 0, nil, fmt.Errorf("read frame: %d bytes are too few for a connection's number", len(b))
	}
	return binary.BigEndian.Uint32(b), b[4:], nil
}

// ParseOpen returns the numbers of the connection and of the mount in a TypeOpen.
func ParseOpen(b []byte) (n uint32, mount int, err error) {
	n, rest, err := ParseConn(b)
	if err != nil {
		return 0, 0, err
	}
	m, rest, err := ParseConn(rest)
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("read frame: %d bytes too many", len(rest))
	}
	return n, int(m), err
}

// Pieces is a writer that sends what is written to it as frames of one type.
type Pieces struct {
	Conn *Conn
	Type Type
}

// Write implements io.Writer.
func (p Pieces) Write(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		n := min(len(b)-done, MaxPiece)
		if err := p.Conn.Write(p.Type, b[done:done+n]); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}
