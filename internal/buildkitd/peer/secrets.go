package peer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"

	"github.com/moby/buildkit/session/secrets"
	"github.com/moby/buildkit/session/sshforward"
	"github.com/moby/buildkit/util/grpcerrors"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/kiln-build/kiln/internal/source/remote"
	"github.com/kiln-build/kiln/internal/sshagent"
)

// Secret implements remote.Secrets.
func (p *Peer) Secret(ctx context.Context, id string) ([]byte, error) {
	if p.ID == "" {
		return nil, fs.ErrNotExist
	}
	c, err := p.caller(ctx, "")
	if err != nil {
		return nil, err
	}
	res, err := secrets.NewSecretsClient(c.Conn()).GetSecret(c.Context(ctx), &secrets.GetSecretRequest{ID: id})
	if err != nil {
		return nil, missing(err)
	}
	return res.Data, nil
}

// missing is fs.ErrNotExist if err says that the client has no such thing.
func missing(err error) error {
	if code := grpcerrors.Code(err); code == codes.Unimplemented || code == codes.NotFound {
		return fs.ErrNotExist
	}
	return err
}

// DialAgent implements remote.SSH.
func (p *Peer) DialAgent(ctx context.Context, id string) (net.Conn, error) {
	if p.ID == "" {
		return nil, &sshagent.NoneError{}
	}
	c, err := p.caller(ctx, "")
	if err != nil {
		return nil, err
	}
	client := sshforward.NewSSHClient(c.Conn())
	if _, err := client.CheckAgent(c.Context(ctx), &sshforward.CheckAgentRequest{ID: id}); err != nil {
		switch grpcerrors.Code(err) {
		case codes.Unimplemented:
			return nil, &sshagent.NoneError{}
		case codes.Unavailable, codes.Canceled, codes.DeadlineExceeded:
			return nil, fmt.Errorf("ask the client: %w", err)
		}
		return nil, &sshagent.NoneError{Said: err.Error()} // BuildKit's client has no code for it
	}
	// The connection lasts longer than the call, but no longer than the build.
	sctx, cancel := context.WithCancel(c.Context(p.ctx))
	stream, err := client.ForwardAgent(metadata.NewOutgoingContext(sctx, metadata.Pairs(sshforward.KeySSHID, id)))
	if err != nil {
		cancel()
		return nil, err
	}
	ours, theirs, err := connPair()
	if err != nil {
		cancel()
		return nil, err
	}
	go func() {
		defer cancel()
		defer theirs.Close()
		_ = sshforward.Copy(sctx, theirs, stream, stream.CloseSend) // whoever reads sees the end
	}()
	return ours, nil
}

// connPair is a pair of connected sockets, of which either direction can be closed alone.
func connPair() (a, b net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("connect sockets: %w", err)
	}
	var conns [2]net.Conn
	var errs [2]error
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		conns[i], errs[i] = net.FileConn(f) // of its own descriptor
		f.Close()
	}
	if err := errors.Join(errs[:]...); err != nil {
		for _, c := range conns {
			if c != nil {
				c.Close()
			}
		}
		return nil, nil, fmt.Errorf("connect sockets: %w", err)
	}
	return conns[0], conns[1], nil
}

var (
	_ remote.Secrets = (*Peer)(nil)
	_ remote.SSH     = (*Peer)(nil)
)
