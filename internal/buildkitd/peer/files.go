package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/tonistiigi/fsutil/types"

	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/tree"
)

// packets is a stream of fsutil's protocol: the client lists all files (STAT, an empty one at the
// end), and answers a REQ for the number of a file with DATA, an empty one at its end.
type packets interface {
	Send(*types.Packet) error
	Recv() (*types.Packet, error)
}

// files is a tree of files that a client has listed, and whose content it sends when it is asked for.
// Content is kept in one file without a name, a part of it for each file.
type files struct {
	stream  packets
	cancel  context.CancelCauseFunc // ends the stream
	entries map[string]*entry
	regular []*entry // in the order in which they were listed
	spool   *os.File
	seen    *seen // nil: nothing is known of earlier builds

	sendMu sync.Mutex // around stream.Send

	mu     sync.Mutex
	end    int64 // of what is taken of spool
	failed error // why the stream has ended
	done   chan struct{}
}

// entry is one path.
type entry struct {
	node   tree.Node
	target string // of a symbolic link
	kids   []string
	body   *body // of a regular file; hard links share it
}

// body is the content of a regular file.
type body struct {
	id      uint32 // as the client numbers files
	index   int    // in files.regular
	size    int64
	offset  int64         // in the spool, once it was asked for
	arrived chan struct{} // nil until it was asked for; closed when all is there
	got     int64         // bytes that have come; of the receiver alone
	err     error         // once arrived

	given    digest.Digest // of the content, empty: nobody has asked; files.mu is around it
	verified bool          // the content has that digest, which otherwise an earlier build says
}

// maxPath bounds a path, as Linux does.
const maxPath = 4096

// receive reads the list of files. What it returns must be closed, after an error too. known may be nil.
func receive(stream packets, scratch string, limits layer.Limits, known *seen, cancel context.CancelCauseFunc) (*files, error) {
	f := &files{
		stream: stream, seen: known, cancel: cancel, done: make(chan struct{}),
		entries: map[string]*entry{".": {node: tree.Node{Mode: tree.ModeDir | 0o755, MTime: time.Unix(0, 0)}}},
	}
	spool, err := os.CreateTemp(scratch, "context-*")
	if err != nil {
		close(f.done)
		return f, err
	}
	f.spool = spool
	_ = os.Remove(spool.Name()) // it is used by its descriptor alone
	if err := f.list(limits); err != nil {
		close(f.done)
		return f, err
	}
	for _, e := range f.entries {
		slices.Sort(e.kids)
	}
	go f.receiveContent()
	return f, nil
}

// list reads all STAT packets.
func (f *files) list(limits layer.Limits) error {
	l := lister{f: f, limits: limits}
	for id := uint32(0); ; id++ {
		p, err := f.stream.Recv()
		switch {
		case err != nil:
			return ended(err)
		case p.Type == types.PACKET_ERR:
			return fmt.Errorf("error from the client: %s", p.Data)
		case p.Type != types.PACKET_STAT:
			return fmt.Errorf("the client sent a packet of type %s where it lists files", p.Type)
		case p.Stat == nil:
			return nil
		}
		if err := l.add(id, p.Stat); err != nil {
			return err
		}
	}
}

func ended(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// lister adds files to the tree, within limits.
type lister struct {
	f      *files
	limits layer.Limits
	names  int64
	xattrs int64
	bytes  int64
}

func (l *lister) add(id uint32, st *types.Stat) error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("file %.200q: %w", st.Path, fmt.Errorf(format, a...))
	}
	if !fs.ValidPath(st.Path) || st.Path == "." || strings.ContainsRune(st.Path, 0) || len(st.Path) >= maxPath || len(path.Base(st.Path)) > 255 {
		return bad("its path is not valid")
	}
	if l.f.entries[st.Path] != nil {
		return bad("it is listed twice")
	}
	parent := l.f.entries[path.Dir(st.Path)]
	if parent == nil || !parent.node.IsDir() {
		return bad("it is not in a directory")
	}
	l.names += int64(len(st.Path) + len(st.Linkname))
	if len(l.f.entries) >= l.limits.MaxEntries || l.names > l.limits.MaxNameBytes {
		return bad("there are more than %d files, or %d bytes of names", l.limits.MaxEntries, l.limits.MaxNameBytes)
	}
	e, err := l.entry(st)
	if err != nil {
		return bad("%w", err)
	}
	if e == nil {
		return nil
	}
	if e.node.IsRegular() && e.body == nil {
		e.body = &body{id: id, index: len(l.f.regular), size: st.Size}
		e.node.Inode = uint64(id) + 1
		l.f.regular = append(l.f.regular, e)
	}
	l.f.entries[st.Path] = e
	parent.kids = append(parent.kids, path.Base(st.Path))
	return nil
}

// entry is what a STAT packet describes; nil if it is something that no image has.
func (l *lister) entry(st *types.Stat) (*entry, error) {
	mode := fs.FileMode(st.Mode)
	e := &entry{node: tree.Node{Mode: uint32(mode & fs.ModePerm), UID: st.Uid, GID: st.Gid, MTime: time.Unix(0, st.ModTime)}}
	for bit, m := range map[fs.FileMode]uint32{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if mode&bit != 0 {
			e.node.Mode |= m
		}
	}
	if err := l.attributes(e, st); err != nil {
		return nil, err
	}
	switch mode.Type() {
	case 0:
		if st.Linkname != "" {
			return l.link(st)
		}
		e.node.Mode |= tree.ModeRegular
		e.node.Size = st.Size
		if l.bytes += st.Size; st.Size < 0 || st.Size > l.limits.MaxFileSize || l.bytes < 0 || l.bytes > l.limits.MaxBytes {
			return nil, fmt.Errorf("it has %d bytes, and the files before it are large", st.Size)
		}
	case fs.ModeDir:
		e.node.Mode |= tree.ModeDir
	case fs.ModeSymlink:
		if st.Linkname == "" || len(st.Linkname) >= maxPath || strings.ContainsRune(st.Linkname, 0) {
			return nil, errors.New("the target of the symbolic link is not valid")
		}
		e.node.Mode, e.target = tree.ModeSymlink|0o777, st.Linkname
	case fs.ModeDevice, fs.ModeDevice | fs.ModeCharDevice:
		e.node.Mode |= tree.ModeBlock
		if mode&fs.ModeCharDevice != 0 {
			e.node.Mode = e.node.Mode&^tree.ModeType | tree.ModeChar
		}
		if st.Devmajor < 0 || st.Devminor < 0 || st.Devmajor > math.MaxUint32 || st.Devminor > math.MaxUint32 {
			return nil, errors.New("its device number is not valid")
		}
		e.node.Major, e.node.Minor = uint32(st.Devmajor), uint32(st.Devminor)
	case fs.ModeNamedPipe:
		e.node.Mode |= tree.ModeFIFO
	case fs.ModeSocket:
		return nil, nil
	default:
		return nil, fmt.Errorf("files of mode %s are not known", mode)
	}
	return e, nil
}

// attributes takes extended attributes over.
func (l *lister) attributes(e *entry, st *types.Stat) error {
	for k, v := range st.Xattrs {
		if l.xattrs += int64(len(k) + len(v)); k == "" || len(k) > 255 || len(v) > 64<<10 || l.xattrs > l.limits.MaxXattrBytes {
			return errors.New("its extended attributes are too large")
		}
		if e.node.Xattr == nil {
			e.node.Xattr = map[string]string{}
		}
		e.node.Xattr[k] = string(v)
	}
	return nil
}

// link is another name of a file that was listed.
func (l *lister) link(st *types.Stat) (*entry, error) {
	first := l.f.entries[st.Linkname]
	if first == nil || first.body == nil {
		return nil, fmt.Errorf("it is a hard link to %.200q, which is not a file before it", st.Linkname)
	}
	// The number of names is kept with the first one: see described.
	n := &l.f.regular[first.body.index].node
	n.Nlink = max(n.Nlink, 1) + 1
	e := *first
	return &e, nil
}

// receiveContent takes what the client sends from now on to where it belongs.
func (f *files) receiveContent() {
	err := f.receivePackets()
	f.mu.Lock()
	f.failed = err
	f.mu.Unlock()
	close(f.done)
	f.cancel(err)
}

func (f *files) receivePackets() error {
	for {
		p, err := f.stream.Recv()
		switch {
		case err != nil:
			return ended(err)
		case p.Type == types.PACKET_ERR:
			return fmt.Errorf("error from the client: %s", p.Data)
		case p.Type == types.PACKET_FIN:
			return errors.New("the client ended the transfer of files")
		case p.Type != types.PACKET_DATA:
			return fmt.Errorf("the client sent a packet of type %s where it sends files", p.Type)
		}
		if err := f.data(p); err != nil {
			return err
		}
	}
}

// data takes one packet of content.
func (f *files) data(p *types.Packet) error {
	b, offset := f.awaited(p.ID)
	if b == nil {
		return fmt.Errorf("the client sent file %d, which nobody asked for", p.ID)
	}
	if len(p.Data) == 0 {
		if b.got != b.size {
			b.err = fmt.Errorf("its size is not the %d bytes that were announced: it was changed, or cannot be read", b.size)
		}
		close(b.arrived)
		return nil
	}
	if b.got += int64(len(p.Data)); b.got > b.size {
		return nil // said at its end
	}
	_, err := f.spool.WriteAt(p.Data, offset+b.got-int64(len(p.Data)))
	return err
}

// awaited is the file with a number, if it was asked for and has not come yet.
func (f *files) awaited(id uint32) (*body, int64) {
	i, ok := slices.BinarySearchFunc(f.regular, id, func(e *entry, id uint32) int { return int(e.body.id) - int(id) })
	if !ok {
		return nil, 0
	}
	b := f.regular[i].body
	f.mu.Lock()
	defer f.mu.Unlock()
	if b.arrived == nil {
		return nil, 0
	}
	select {
	case <-b.arrived:
		return nil, 0
	default:
		return b, b.offset
	}
}

// Read-ahead: who reads two files that were listed one after the other gets the next ones without
// waiting for each. Of a large file nobody knows whether it is wanted.
const (
	aheadFiles = 64
	aheadSize  = 256 << 10
)

// ask asks the client for a file, and waits until all of it is there.
func (f *files) ask(b *body) error {
	for _, id := range f.take(b) {
		f.sendMu.Lock()
		err := f.stream.Send(&types.Packet{Type: types.PACKET_REQ, ID: id})
		f.sendMu.Unlock()
		if err != nil {
			break // the receiver knows why
		}
	}
	select {
	case <-b.arrived:
		return b.err
	case <-f.done:
	}
	select {
	case <-b.arrived: // just before the end
		return b.err
	default:
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return fmt.Errorf("the client has not sent it: %w", f.failed)
}

// take gives b, and perhaps files after it, their place, and returns the numbers of those that the
// client is to be asked for.
func (f *files) take(b *body) (ids []uint32) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if b.arrived == nil {
		ids = append(ids, f.place(b))
	}
	if b.index == 0 || f.regular[b.index-1].body.arrived == nil {
		return ids
	}
	for _, e := range f.regular[b.index+1 : min(b.index+1+aheadFiles, len(f.regular))] {
		if e.body.size > aheadSize {
			break
		}
		if e.body.arrived == nil {
			ids = append(ids, f.place(e.body))
		}
	}
	return ids
}

// place gives a file its part of the spool. f.mu is held.
func (f *files) place(b *body) uint32 {
	b.offset, b.arrived = f.end, make(chan struct{})
	f.end += b.size
	return b.id
}

func (f *files) lookup(op, p string) (*entry, error) {
	e := f.entries[p]
	if e == nil {
		return nil, &fs.PathError{Op: op, Path: p, Err: fs.ErrNotExist}
	}
	return e, nil
}

// described is the entry's node, with the number of names that the file has in all.
func (f *files) described(e *entry) tree.Node {
	n := e.node
	if e.body != nil {
		n.Nlink = f.regular[e.body.index].node.Nlink
	}
	return n
}

// Lstat implements tree.Tree.
func (f *files) Lstat(p string) (tree.Node, error) {
	e, err := f.lookup("lstat", p)
	if err != nil {
		return tree.Node{}, err
	}
	return f.described(e), nil
}

// ReadDir implements tree.Tree.
func (f *files) ReadDir(p string) ([]tree.Entry, error) {
	e, err := f.lookup("readdir", p)
	if err != nil {
		return nil, err
	}
	if !e.node.IsDir() {
		return nil, &fs.PathError{Op: "readdir", Path: p, Err: syscall.ENOTDIR}
	}
	out := make([]tree.Entry, len(e.kids))
	for i, name := range e.kids {
		out[i] = tree.Entry{Name: name, Node: f.described(f.entries[path.Join(p, name)])}
	}
	return out, nil
}

// Readlink implements tree.Tree.
func (f *files) Readlink(p string) (string, error) {
	e, err := f.lookup("readlink", p)
	if err != nil {
		return "", err
	}
	if !e.node.IsSymlink() {
		return "", &fs.PathError{Op: "readlink", Path: p, Err: syscall.EINVAL}
	}
	return e.target, nil
}

// Open implements tree.Tree. It waits until the client has sent the file.
func (f *files) Open(p string) (io.ReadCloser, error) {
	e, err := f.lookup("open", p)
	if err != nil {
		return nil, err
	}
	if e.body == nil {
		return nil, &fs.PathError{Op: "open", Path: p, Err: errors.New("not a regular file")}
	}
	if e.body.size > 0 {
		err := f.ask(e.body)
		if err == nil {
			err = f.verify(p, e)
		}
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: p, Err: err}
		}
	}
	return io.NopCloser(io.NewSectionReader(f.spool, e.body.offset, e.body.size)), nil
}

// close tells the client that nothing more is wanted, and forgets what it has sent.
func (f *files) close() error {
	select {
	case <-f.done: // the stream has ended
	default:
		f.sendMu.Lock()
		_ = f.stream.Send(&types.Packet{Type: types.PACKET_FIN}) // or it ends by the next line
		f.sendMu.Unlock()
	}
	f.cancel(context.Canceled)
	<-f.done
	if f.spool == nil {
		return nil
	}
	return f.spool.Close()
}

var _ tree.Tree = (*files)(nil)
