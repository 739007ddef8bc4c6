package peer

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"
	"unicode"

	"github.com/moby/buildkit/session/filesync"
	"github.com/tonistiigi/fsutil/types"
	"google.golang.org/grpc/metadata"

	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/source"
	"github.com/kiln-build/kiln/internal/tree"
)

// OpenContext implements source.Contexts: the client lists the files that are selected, and
// sends the content of those that are read.
func (p *Peer) OpenContext(ctx context.Context, s source.Selection) (tree.Tree, error) {
	f, err := p.openContext(ctx, s)
	if err != nil {
		return nil, fmt.Errorf("build context %q from the client: %w", s.Name, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx.Err() != nil {
		return nil, errors.Join(context.Canceled, f.close())
	}
	p.contexts = append(p.contexts, f)
	return f, nil
}

func (p *Peer) openContext(ctx context.Context, s source.Selection) (*files, error) {
	c, err := p.caller(ctx, s.Session)
	if err != nil {
		return nil, err
	}
	if !supports(c, filesync.FileSync_ServiceDesc.ServiceName, "DiffCopy") {
		return nil, errors.New("the client offers no files")
	}
	// The stream lasts as long as the build; ctx ends sooner.
	sctx, cancel := context.WithCancelCause(c.Context(p.ctx))
	stop := context.AfterFunc(ctx, func() { cancel(context.Cause(ctx)) })
	stream, err := filesync.NewFileSyncClient(c.Conn()).DiffCopy(metadata.NewOutgoingContext(sctx, selection(s)))
	if err != nil {
		cancel(nil)
		return nil, err
	}
	f, err := receive(counting(stream, s.Progress), p.Scratch, layer.DefaultLimits(), p.known(c.SharedKey(), s), cancel)
	if !stop() && err == nil { // ctx has ended the stream
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, f.close())
	}
	return f, nil
}

// known is what is known from earlier builds of a context in a directory that the client calls key. Without a key
// nothing tells its directories apart.
func (p *Peer) known(key string, s source.Selection) *seen {
	if key == "" || s.Reread {
		return nil
	}
	stats := p.statCache()
	if stats == nil {
		return nil
	}
	return &seen{cache: stats, space: space(p.Owner, key, s.Name, s.SharedKey), began: time.Now()}
}

// counted is a stream of packets that tells how many bytes have come.
type counted struct {
	packets
	n        int64
	progress func(int64)
}

// counting is stream, whose packets one at a time receives, told to progress (may be nil).
func counting(stream packets, progress func(int64)) packets {
	if progress == nil {
		return stream
	}
	return &counted{packets: stream, progress: progress}
}

// Recv implements packets.
func (c *counted) Recv() (*types.Packet, error) {
	p, err := c.packets.Recv()
	if err == nil {
		c.n += int64(p.SizeVT())
		c.progress(c.n)
	}
	return p, err
}

// selection says in headers what is wanted, as the client reads them.
func selection(s source.Selection) metadata.MD {
	md := metadata.MD{}
	for k, vs := range map[string][]string{
		"dir-name": {s.Name}, "include-patterns": s.Include, "exclude-patterns": s.Exclude, "followpaths": s.Follow,
	} {
		if vs == nil {
			continue
		}
		if strings.ContainsFunc(strings.Join(vs, ""), func(r rune) bool { return r < ' ' || r >= unicode.MaxASCII }) {
			md[k+"-encoded"] = []string{"1"}
			for _, v := range vs {
				md[k] = append(md[k], url.QueryEscape(v))
			}
			continue
		}
		md[k] = vs
	}
	return md
}

var _ source.Contexts = (*Peer)(nil)
