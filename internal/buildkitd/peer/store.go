package peer

import (
	"context"
	"errors"
	"fmt"
	"io"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/kiln-build/kiln/internal/image"
)

// storeHeader names the store that a request is for, among those that a client offers.
const storeHeader = "buildkit-attachable-store-id"

// store is a directory of blobs that the client offers: an OCI layout to read, a cache, an output.
type store struct {
	name   string // by which the client knows it
	caller session.Caller
	client contentapi.ContentClient
}

func (p *Peer) store(ctx context.Context, name string) (*store, error) {
	c, err := p.caller(ctx, "")
	if err != nil {
		return nil, err
	}
	if !supports(c, contentapi.Content_ServiceDesc.ServiceName, "Read") {
		return nil, fmt.Errorf("the client offers no directory %q", name)
	}
	return &store{name: name, caller: c, client: contentapi.NewContentClient(c.Conn())}, nil
}

func (s *store) with(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(s.caller.Context(ctx), storeHeader, s.name)
}

// has reports whether the blob is there.
func (s *store) has(ctx context.Context, d ocispec.Descriptor) (bool, error) {
	res, err := s.client.Info(s.with(ctx), &contentapi.InfoRequest{Digest: d.Digest.String()})
	switch {
	case grpcerrors.Code(err) == codes.NotFound:
		return false, nil
	case err != nil:
		return false, fmt.Errorf("look for blob %s at the client: %w", d.Digest, err)
	}
	return res.GetInfo().GetSize() == d.Size, nil
}

// document reads a small blob. It is not verified.
func (s *store) document(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, err
	}
	r := s.open(ctx, d.Digest)
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, image.MaxConfig+1))
	if err == nil && len(b) > image.MaxConfig {
		err = fmt.Errorf("blob %s has more than %d bytes", d.Digest, image.MaxConfig)
	}
	return b, err
}

// fetch opens a blob that is there. It is verified while it is read.
func (s *store) fetch(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, err
	}
	ok, err := s.has(ctx, d)
	if err == nil && !ok {
		err = fmt.Errorf("blob %s is not in the client's directory %q", d.Digest, s.name)
	}
	if err != nil {
		return nil, err
	}
	return image.Verified(s.open(ctx, d.Digest), d), nil
}

// open streams a blob.
func (s *store) open(ctx context.Context, d digest.Digest) io.ReadCloser {
	ctx, cancel := context.WithCancel(s.with(ctx))
	return &blob{ctx: ctx, cancel: cancel, store: s, digest: d}
}

// blob reads what the client sends of a blob.
type blob struct {
	ctx    context.Context //nolint:containedctx // the request's
	cancel context.CancelFunc
	store  *store
	digest digest.Digest
	stream grpc.ServerStreamingClient[contentapi.ReadContentResponse]
	rest   []byte
}

// Read implements io.Reader.
func (b *blob) Read(p []byte) (int, error) {
	if b.stream == nil {
		var err error
		if b.stream, err = b.store.client.Read(b.ctx, &contentapi.ReadContentRequest{Digest: b.digest.String()}); err != nil {
			return 0, b.failed(err)
		}
	}
	for len(b.rest) == 0 {
		m, err := b.stream.Recv()
		if errors.Is(err, io.EOF) {
			return 0, io.EOF
		}
		if err != nil {
			return 0, b.failed(err)
		}
		b.rest = m.Data
	}
	n := copy(p, b.rest)
	b.rest = b.rest[n:]
	return n, nil
}

func (b *blob) failed(err error) error {
	return fmt.Errorf("read blob %s from the client's directory %q: %w", b.digest, b.store.name, err)
}

// Close ends the transfer.
func (b *blob) Close() error {
	b.cancel()
	return nil
}

// writeChunk is how much of a blob goes into one message, in bytes.
const writeChunk = 1 << 20

// put writes a blob, unless it is there.
func (s *store) put(ctx context.Context, d ocispec.Descriptor, r io.Reader) error {
	if ok, err := s.has(ctx, d); ok || err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(s.with(ctx))
	defer cancel()
	stream, err := s.client.Write(ctx)
	if err != nil {
		return s.unwritten(d, err)
	}
	ref := "kiln-" + identity.NewID()
	send := func(action contentapi.WriteAction, offset int64, data []byte) error {
		err := stream.Send(&contentapi.WriteContentRequest{
			Action: action, Ref: ref, Total: d.Size, Expected: d.Digest.String(), Offset: offset, Data: data,
		})
		if err != nil && !errors.Is(err, io.EOF) { // the reason for which comes with Recv
			return err
		}
		_, err = stream.Recv()
		return err
	}
	buf, offset := make([]byte, min(writeChunk, max(d.Size, 1))), int64(0)
	for {
		n, err := io.ReadFull(r, buf)
		last := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !last {
			return err
		}
		if n > 0 {
			if err := send(contentapi.WriteAction_WRITE, offset, buf[:n]); err != nil {
				return s.unwritten(d, err)
			}
		}
		if offset += int64(n); last {
			break
		}
	}
	if err := send(contentapi.WriteAction_COMMIT, offset, nil); err != nil && grpcerrors.Code(err) != codes.AlreadyExists {
		return s.unwritten(d, err)
	}
	return nil
}

func (s *store) unwritten(d ocispec.Descriptor, err error) error {
	return fmt.Errorf("write blob %s to the client's directory %q: %w", d.Digest, s.name, err)
}
