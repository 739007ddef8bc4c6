package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"

	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/tree"
)

// pipe is one end of a stream of packets in memory.
type pipe struct {
	ctx      context.Context
	in, out  chan *types.Packet
	requests func(*types.Packet) // sees what is sent
}

func (s *pipe) Context() context.Context { return s.ctx }

func (s *pipe) Send(p *types.Packet) error {
	if s.requests != nil {
		s.requests(p)
	}
	select {
	case s.out <- p.CloneVT():
		return nil
	case <-s.ctx.Done():
		return context.Cause(s.ctx)
	}
}

func (s *pipe) Recv() (*types.Packet, error) {
	select {
	case p, ok := <-s.in:
		if !ok {
			return nil, io.EOF
		}
		return p, nil
	case <-s.ctx.Done():
		return nil, context.Cause(s.ctx)
	}
}

func (s *pipe) SendMsg(m any) error { return s.Send(m.(*types.Packet)) }

func (s *pipe) RecvMsg(m any) error {
	p, err := s.Recv()
	if err != nil {
		return err
	}
	*m.(*types.Packet) = types.Packet{Type: p.Type, Stat: p.Stat, ID: p.ID, Data: p.Data}
	return nil
}

// fromClient receives a directory from BuildKit's own client side of the protocol. end closes it.
func fromClient(t *testing.T, dir string, known *seen, requests func(*types.Packet)) (f *files, end func()) {
	t.Helper()
	ctx, cancel := context.WithCancelCause(t.Context())
	a, b := make(chan *types.Packet), make(chan *types.Packet)
	root, err := fsutil.NewFS(dir)
	if err != nil {
		t.Fatal(err)
	}
	sent := make(chan error, 1)
	go func() { sent <- fsutil.Send(ctx, &pipe{ctx: ctx, in: a, out: b}, root, nil) }()
	f, err = receive(&pipe{ctx: ctx, in: b, out: a, requests: requests}, t.TempDir(), layer.DefaultLimits(), known, cancel)
	if err != nil {
		t.Fatal(err)
	}
	return f, func() {
		t.Helper()
		if err := f.close(); err != nil {
			t.Error(err)
		}
		<-sent
	}
}

// TestReceive takes a directory from BuildKit's client.
func TestReceive(t *testing.T) {
	dir := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	big := strings.Repeat("0123456789abcdef", 1<<16)
	must(os.MkdirAll(filepath.Join(dir, "d/e"), 0o755))
	must(os.WriteFile(filepath.Join(dir, "d/big"), []byte(big), 0o640))
	must(os.WriteFile(filepath.Join(dir, "d/empty"), nil, 0o644))
	must(os.Link(filepath.Join(dir, "d/big"), filepath.Join(dir, "d/same")))
	must(os.Symlink("../../etc/passwd", filepath.Join(dir, "d/out")))
	must(os.Chtimes(filepath.Join(dir, "d/big"), time.Unix(5, 7), time.Unix(5, 7)))
	f, end := fromClient(t, dir, nil, nil)
	defer end()

	kids, err := f.ReadDir("d")
	must(err)
	var names []string
	for _, k := range kids {
		names = append(names, k.Name)
	}
	if got := strings.Join(names, " "); got != "big e empty out same" {
		t.Errorf("d has %s", got)
	}
	n, err := f.Lstat("d/big")
	must(err)
	if n.Mode != tree.ModeRegular|0o640 || n.Size != int64(len(big)) || n.Nlink != 2 || !n.MTime.Equal(time.Unix(5, 7)) {
		t.Errorf("d/big is %+v", n)
	}
	if same, err := f.Lstat("d/same"); err != nil || same.Inode != n.Inode || same.Nlink != 2 {
		t.Errorf("d/same is %+v, %v: not the file that d/big is", same, err)
	}
	if to, err := f.Readlink("d/out"); err != nil || to != "../../etc/passwd" {
		t.Errorf("d/out leads to %q, %v", to, err)
	}
	for p, want := range map[string]string{"d/big": big, "d/same": big, "d/empty": ""} {
		r, err := f.Open(p)
		must(err)
		if got, err := io.ReadAll(r); err != nil || string(got) != want {
			t.Errorf("%s: %d bytes, %v", p, len(got), err)
		}
	}
	for _, p := range []string{"d/out", "d/e"} {
		if _, err := f.Open(p); err == nil {
			t.Errorf("%s can be read", p)
		}
	}
	if _, err := f.Open("nothing"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nothing: %v", err)
	}
}

// TestReadAhead reads files in their order: the client is asked for each once, before it is wanted, but
// for no large one that nobody wants.
func TestReadAhead(t *testing.T) {
	dir := t.TempDir()
	for i := range 200 {
		size := 10
		if i == 150 {
			size = aheadSize + 1
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("f%03d", i)), make([]byte, size), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	asked := map[uint32]int{}
	f, end := fromClient(t, dir, nil, func(p *types.Packet) {
		if p.Type == types.PACKET_REQ {
			asked[p.ID]++
		}
	})
	defer end()
	for i := range 120 {
		r, err := f.Open(fmt.Sprintf("f%03d", i))
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		if i == 1 && len(asked) != 2+aheadFiles {
			t.Errorf("%d files were asked for after two had been read", len(asked))
		}
	}
	if len(asked) != 150 || asked[150] != 0 {
		t.Errorf("%d files were asked for, f150 %d times", len(asked), asked[150])
	}
	for id, n := range asked {
		if n != 1 {
			t.Errorf("file %d was asked for %d times", id, n)
		}
	}
}

// script plays a client that sends packets whatever it is asked for.
func script(t *testing.T, limits layer.Limits, packets ...*types.Packet) (*files, error) {
	t.Helper()
	ctx, cancel := context.WithCancelCause(t.Context())
	in := make(chan *types.Packet, len(packets))
	for _, p := range packets {
		in <- p
	}
	close(in)
	f, err := receive(&pipe{ctx: ctx, in: in, out: make(chan *types.Packet, 1000)}, t.TempDir(), limits, nil, cancel)
	t.Cleanup(func() { _ = f.close() })
	return f, err
}

func stat(p string, mode fs.FileMode, size int64) *types.Packet {
	return &types.Packet{Type: types.PACKET_STAT, Stat: &types.Stat{Path: p, Mode: uint32(mode), Size: size}}
}

func link(p, to string, mode fs.FileMode) *types.Packet {
	s := stat(p, mode, 0)
	s.Stat.Linkname = to
	return s
}

// TestHostileList refuses lists of files that lead out of the tree, contradict themselves, or are too large.
func TestHostileList(t *testing.T) {
	limits := layer.Limits{MaxBytes: 1000, MaxFileSize: 600, MaxEntries: 5, MaxNameBytes: 5000, MaxXattrBytes: 100}
	xattr := stat("f", 0o644, 0)
	xattr.Stat.Xattrs = map[string][]byte{"user.x": make([]byte, 101)}
	device := stat("dev", fs.ModeDevice|fs.ModeCharDevice|0o600, 0)
	device.Stat.Devmajor = -1
	for name, c := range map[string]struct {
		want    string
		packets []*types.Packet
	}{
		"dots":                {"not valid", []*types.Packet{stat("../f", 0o644, 0)}},
		"dots inside":         {"not valid", []*types.Packet{stat("d", fs.ModeDir, 0), stat("d/../../f", 0o644, 0)}},
		"absolute":            {"not valid", []*types.Packet{stat("/etc/passwd", 0o644, 0)}},
		"root":                {"not valid", []*types.Packet{stat(".", fs.ModeDir, 0)}},
		"empty":               {"not valid", []*types.Packet{stat("", 0o644, 0)}},
		"NUL":                 {"not valid", []*types.Packet{stat("a\x00b", 0o644, 0)}},
		"long name":           {"not valid", []*types.Packet{stat(strings.Repeat("x", 256), 0o644, 0)}},
		"twice":               {"listed twice", []*types.Packet{stat("f", 0o644, 0), stat("f", 0o644, 0)}},
		"through a link":      {"not in a directory", []*types.Packet{link("l", "/etc", fs.ModeSymlink), stat("l/f", 0o644, 0)}},
		"no parent":           {"not in a directory", []*types.Packet{stat("d/f", 0o644, 0)}},
		"link to nothing":     {"not a file before it", []*types.Packet{link("h", "f", 0o644)}},
		"link to a directory": {"not a file before it", []*types.Packet{stat("d", fs.ModeDir, 0), link("h", "d", 0o644)}},
		"link to itself":      {"not a file before it", []*types.Packet{link("h", "h", 0o644)}},
		"empty symbolic link": {"target", []*types.Packet{stat("l", fs.ModeSymlink, 0)}},
		"negative size":       {"-1 bytes", []*types.Packet{stat("f", 0o644, -1)}},
		"large file":          {"601 bytes", []*types.Packet{stat("f", 0o644, 601)}},
		"large in all":        {"are large", []*types.Packet{stat("a", 0o644, 600), stat("b", 0o644, 401)}},
		"many": {"more than 5 files", []*types.Packet{
			stat("a", 0o644, 0), stat("b", 0o644, 0), stat("c", 0o644, 0), stat("d", 0o644, 0), stat("e", 0o644, 0),
		}},
		"attributes":    {"attributes are too large", []*types.Packet{xattr}},
		"device number": {"device number", []*types.Packet{device}},
		"door":          {"not known", []*types.Packet{stat("f", fs.ModeIrregular, 0)}},
		"data at once":  {"packet of type", []*types.Packet{{Type: types.PACKET_DATA}}},
		"an error":      {"from the client: no", []*types.Packet{{Type: types.PACKET_ERR, Data: []byte("no")}}},
		"an early end":  {"unexpected EOF", nil},
	} {
		if _, err := script(t, limits, c.packets...); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, not %q", name, err, c.want)
		}
	}
}

// TestHostileContent does not take less, more or other content for a file's.
func TestHostileContent(t *testing.T) {
	list := []*types.Packet{stat("f", 0o644, 4), {Type: types.PACKET_STAT}}
	data := func(id uint32, s string) *types.Packet {
		return &types.Packet{Type: types.PACKET_DATA, ID: id, Data: []byte(s)}
	}
	for name, c := range map[string]struct {
		want   string
		answer []*types.Packet
	}{
		"right":     {"", []*types.Packet{data(0, "ab"), data(0, "cd"), data(0, "")}},
		"short":     {"not the 4 bytes", []*types.Packet{data(0, "ab"), data(0, "")}},
		"long":      {"not the 4 bytes", []*types.Packet{data(0, "abcd"), data(0, "e"), data(0, "")}},
		"another":   {"file 1, which nobody asked for", []*types.Packet{data(1, "ab")}},
		"cut off":   {"unexpected EOF", []*types.Packet{data(0, "ab")}},
		"a refusal": {"from the client: no", []*types.Packet{{Type: types.PACKET_ERR, Data: []byte("no")}}},
		"the end":   {"ended the transfer", []*types.Packet{{Type: types.PACKET_FIN}}},
	} {
		ctx, cancel := context.WithCancelCause(t.Context())
		in := make(chan *types.Packet, 10)
		for _, p := range list {
			in <- p
		}
		s := &pipe{ctx: ctx, in: in, out: make(chan *types.Packet, 10)}
		s.requests = func(p *types.Packet) { // it answers when it is asked
			if p.Type == types.PACKET_REQ {
				for _, a := range c.answer {
					in <- a
				}
				close(in)
			}
		}
		f, err := receive(s, t.TempDir(), layer.DefaultLimits(), nil, cancel)
		if err != nil {
			t.Fatal(err)
		}
		r, err := f.Open("f")
		switch {
		case c.want != "":
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %v, not %q", name, err, c.want)
			}
		case err != nil:
			t.Errorf("%s: %v", name, err)
		default:
			if b, err := io.ReadAll(r); err != nil || string(b) != "abcd" {
				t.Errorf("%s: %q, %v", name, b, err)
			}
		}
		if err := f.close(); err != nil {
			t.Error(err)
		}
	}
}

// TestUnasked ends a transfer in which content comes that nobody has asked for.
func TestUnasked(t *testing.T) {
	f, err := script(t, layer.DefaultLimits(), stat("f", 0o644, 4), &types.Packet{Type: types.PACKET_STAT},
		&types.Packet{Type: types.PACKET_DATA, ID: 0, Data: []byte("abcd")})
	if err != nil {
		t.Fatal(err)
	}
	<-f.done
	if _, err := f.Open("f"); err == nil || !strings.Contains(err.Error(), "which nobody asked for") {
		t.Error(err)
	}
}

// FuzzFiles reads what a client sends: a number of bytes, and a packet of so many, and so on. Whatever it is, what is there
// afterwards is a tree.
func FuzzFiles(f *testing.F) {
	stream := func(packets ...*types.Packet) (out []byte) {
		for _, p := range packets {
			b, err := p.MarshalVT()
			if err != nil {
				f.Fatal(err)
			}
			out = append(append(out, byte(len(b))), b...)
		}
		return out
	}
	end := &types.Packet{Type: types.PACKET_STAT}
	f.Add(stream(stat("d", fs.ModeDir, 0), stat("d/f", 0o644, 2), link("d/g", "d/f", 0o644), link("l", "../x", fs.ModeSymlink), end,
		&types.Packet{Type: types.PACKET_DATA, ID: 1, Data: []byte("ab")}, &types.Packet{Type: types.PACKET_DATA, ID: 1}))
	f.Add(stream(stat("../f", 0o644, 2), end))
	f.Add(stream(stat("a", fs.ModeDevice, 0), stat("b", fs.ModeNamedPipe, 0), stat("c", fs.ModeSocket, 0), stat("e", 0o644, 0), end, &types.Packet{Type: types.PACKET_FIN}))
	limits := layer.Limits{MaxBytes: 1 << 20, MaxFileSize: 1 << 19, MaxEntries: 100, MaxNameBytes: 1 << 12, MaxXattrBytes: 1 << 10}
	f.Fuzz(func(t *testing.T, data []byte) {
		var packets []*types.Packet
		for len(data) > 0 {
			n := min(int(data[0]), len(data)-1)
			p := &types.Packet{}
			if p.UnmarshalVT(data[1:1+n]) != nil {
				return
			}
			packets, data = append(packets, p), data[1+n:]
		}
		tr, err := script(t, limits, packets...)
		if err != nil {
			return
		}
		if n := walk(t, tr, "."); n > limits.MaxEntries {
			t.Errorf("there are %d files", n)
		}
	})
}

// walk counts the entries of a tree, and looks at each.
func walk(t *testing.T, f *files, dir string) (n int) {
	t.Helper()
	kids, err := f.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range kids {
		p := path.Join(dir, k.Name)
		if !fs.ValidPath(p) || path.Dir(p) != dir {
			t.Fatalf("%q is in %q", k.Name, dir)
		}
		n++
		switch {
		case k.Node.IsDir():
			n += walk(t, f, p)
		case k.Node.IsSymlink():
			if to, err := f.Readlink(p); err != nil || to == "" {
				t.Errorf("%s leads to %q, %v", p, to, err)
			}
		case k.Node.IsRegular():
			r, err := f.Open(p) // or the client has not sent it
			if err != nil {
				continue
			}
			if b, err := io.ReadAll(r); err != nil || int64(len(b)) != k.Node.Size {
				t.Errorf("%s has %d bytes, %v, and not %d", p, len(b), err, k.Node.Size)
			}
		}
	}
	return n
}
